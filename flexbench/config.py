"""Typed configs: what a run is, written down so that it can be checked, hashed and repeated."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from typing_extensions import Self

from flexbench.errors import UserError, did_you_mean

M = TypeVar("M", bound="StrictModel")


class StrictModel(BaseModel):
    """An immutable pydantic model that refuses unknown keys by naming the nearest known one."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @classmethod
    def parse(cls, values: dict[str, Any], *, where: str = "") -> Self:
        """Validate `values`; `where` ("training", "listops") prefixes keys in messages.

        Raises:
            UserError: an unknown key or a value of the wrong type or range, in one sentence.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            # A misspelt key may be the reason why another one is missing.
            first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
            path = [str(part) for part in first["loc"]]
            key = ".".join(([where] if where else []) + path)
            if first["type"] == "extra_forbidden":
                known = cls.model_fields if len(path) == 1 else ()
                raise UserError(f"unknown key '{key}'{did_you_mean(path[-1], known)}") from None
            if first["type"] == "missing":
                raise UserError(f"'{key}' is missing") from None
            message = first["msg"].removeprefix("Value error, ")
            got = first.get("input")
            raise UserError(f"bad value for '{key}': {message} (got {got!r})") from None

    def override(self, values: dict[str, Any], *, where: str = "") -> Self:
        """A copy with some fields replaced, checked like `parse`."""
        return self.parse({**self.model_dump(mode="json"), **values}, where=where)


def digest(value: Any, length: int = 12) -> str:
    """The first hex digits of the SHA-256 of a JSON-able value's canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


class StackConfig(StrictModel):
    """The body that every model shares: encoder, `n_layers` pre-norm residual mixers, decoder."""

    d_model: PositiveInt = 64
    n_layers: PositiveInt = 2
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    norm: Literal["rms", "layer"] = "rms"
    pool: Literal["mean", "last", "max"] = "mean"


class TrainingConfig(StrictModel):
    """The budget and the optimiser, the same for every model of a task.

    AdamW with linear warm-up over a share `warmup` of the steps, then cosine to zero. Parameters
    marked `_no_weight_decay` (A_log, D, Δ bias), norms and biases are not decayed; state-space
    parameters learn at most at `ssm_learning_rate` where that is given (the S4 protocol).
    """

    steps: PositiveInt = 1000
    batch_size: PositiveInt = 32
    learning_rates: tuple[float, ...] = Field(
        (3e-3,), min_length=1, description="grid; the best on validation at the first seed is used"
    )
    ssm_learning_rate: float | None = Field(None, gt=0.0)
    weight_decay: float = Field(0.01, ge=0.0)
    warmup: float = Field(0.1, ge=0.0, le=1.0)
    clip: float = Field(1.0, gt=0.0, description="largest global gradient norm")
    evaluations: PositiveInt = Field(8, description="validation passes, evenly spaced")
    evaluation_batch_size: PositiveInt = 128
    validation_examples: PositiveInt = Field(2000, description="at most so many, the first ones")


class Preset(StrictModel):
    """How a task is run at one size: its options, the stack and the training budget.

    `l0` is the smallest block, in steps, of models that cut sequences into blocks; it leaves at
    least 16 in a sequence.
    """

    options: dict[str, Any] = {}
    stack: StackConfig = StackConfig()
    training: TrainingConfig = TrainingConfig()
    l0: PositiveInt = 64


PRESETS = ("quick", "small", "paper")
