"""Hindsight: half of the queries ask for what comes after them in their block."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field, PositiveInt, model_validator
from typing_extensions import Self

from flexbench.config import Preset, StackConfig, TrainingConfig
from flexbench.interface import ProblemSpec
from flexbench.tasks.base import TaskData, registry
from flexbench.tasks.generated import GeneratedTask

VALUES = 8
NOISE = 6
BEFORE, AFTER = VALUES + NOISE, VALUES + NOISE + 1
"""Tokens: values 0 to 7, noise, and the two queries."""


@registry.register("hindsight")
class Hindsight(GeneratedTask):
    """The value before the query, or the one after it, as the query says.

    Every block of noise holds a value, a query after it, and another value after the query. One
    kind of query asks for the value before it, the other for the value after it, each half of the
    time; either value may be in the block, so a reading from the left alone can answer no more
    than the first half.
    """

    suite: ClassVar[str] = "probes"
    summary: ClassVar[str] = "the value before or after each query in its block, 8 classes"
    chance: ClassVar[float] = 1 / VALUES
    license: ClassVar[str] = "generated"
    presets: ClassVar[dict[str, Preset]] = {
        "quick": Preset(
            stack=StackConfig(d_model=32, n_layers=2),
            training=TrainingConfig(
                steps=800,
                batch_size=32,
                learning_rates=(5e-3,),
                evaluations=5,
                validation_examples=500,
            ),
            l0=16,
        ),
        "small": Preset(
            options={"length": 512, "block": 32},
            stack=StackConfig(d_model=32, n_layers=2),
            training=TrainingConfig(
                steps=1200,
                batch_size=16,
                learning_rates=(5e-3,),
                evaluations=5,
                validation_examples=500,
            ),
            l0=32,
        ),
    }
    omitted: ClassVar[dict[str, str]] = {"paper": "nothing is published"}

    length: PositiveInt = 256
    block: int = Field(16, ge=4, description="tokens of a block")

    @model_validator(mode="after")
    def _blocks_fit(self) -> Self:
        if self.length % self.block:
            raise ValueError("length must be a multiple of block")
        return self

    @property
    def spec(self) -> ProblemSpec:
        return ProblemSpec(
            input="tokens",
            classes=VALUES,
            max_length=self.length,
            vocab_size=AFTER + 1,
            output="token",
        )

    def make(self, rng: np.random.Generator, examples: int) -> tuple[np.ndarray, np.ndarray]:
        blocks = self.length // self.block
        shape = (examples, blocks)
        tokens = rng.integers(VALUES, VALUES + NOISE, size=(*shape, self.block))
        labels = np.full(tokens.shape, -100)
        places = np.sort(
            rng.permuted(np.broadcast_to(np.arange(self.block), tokens.shape), axis=2)[..., :3]
        )
        values = rng.integers(VALUES, size=(*shape, 2))
        after = rng.integers(2, size=shape)
        for place, what in zip(
            np.moveaxis(places, 2, 0),
            (values[..., 0], np.where(after, AFTER, BEFORE), values[..., 1]),
            strict=True,
        ):
            np.put_along_axis(tokens, place[..., None], what[..., None], axis=2)
        answer = np.where(after, values[..., 1], values[..., 0])
        np.put_along_axis(labels, places[..., 1:2], answer[..., None], axis=2)
        return tokens.reshape(examples, -1), labels.reshape(examples, -1)

    def trivial_predictors(self, data: TaskData) -> dict[str, float]:
        return {"the value before, or a guess": 0.5 + 0.5 / VALUES}
