"""Training at mixed lengths, where one length alone takes more steps than a CPU has time for."""

from __future__ import annotations

import numpy as np
from pydantic import Field, PositiveInt, model_validator
from typing_extensions import Self

from flexbench.tasks.generated import GeneratedTask


class MixedLengths(GeneratedTask):
    """A task of one `length` whose training batches may be shorter: each has one, log-uniform."""

    length: int
    shortest: PositiveInt | None = Field(
        None, description="of the training batches; None: all are as long as the tests"
    )

    @model_validator(mode="after")
    def _shortest_fits(self) -> Self:
        if self.shortest is not None and (self.shortest > self.length or not self.fresh):
            raise ValueError("shortest must not exceed length, and needs fresh training examples")
        return self

    def varied(self, rng: np.random.Generator) -> Self:
        if self.shortest is None:
            return self
        length = np.exp(rng.uniform(np.log(self.shortest), np.log(self.length + 1)))
        return self.model_copy(update={"length": int(length)})
