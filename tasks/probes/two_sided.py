"""Queries about the marked values on either side, for models that read in both directions.

A sequence holds plain digits, marked digits and queries. What a query asks for depends on the last
marked digit before it and the next one after it; plain digits never matter.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, model_validator
from typing_extensions import Self

from flexbench.config import Preset, StackConfig, TrainingConfig
from flexbench.interface import ProblemSpec
from flexbench.tasks.base import Split, TaskData, registry
from flexbench.tasks.generated import GeneratedTask
from flexbench.tasks.store import Store

IGNORED = -100
DIGITS = 10
MARKED = DIGITS
"""The token of marked digit v is MARKED + v; plain digits are their own tokens."""
BEFORE, AFTER, SUM = range(2 * DIGITS, 2 * DIGITS + 3)
"""The query tokens."""


def neighbours(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At every position the last marked digit before it and the next after it; -1 without one.

    Args:
        tokens: (examples, length).

    Returns:
        Two arrays of the same shape.
    """

    def last_before(tokens: np.ndarray) -> np.ndarray:
        length = tokens.shape[1]
        marked = (tokens >= MARKED) & (tokens < BEFORE)
        place = np.maximum.accumulate(np.where(marked, np.arange(length), -1), axis=1)
        place = np.concatenate([np.full((len(tokens), 1), -1), place[:, :-1]], axis=1)
        digit = np.take_along_axis(tokens, np.maximum(place, 0), axis=1) - MARKED
        return np.where(place >= 0, digit, -1)

    return last_before(tokens), last_before(tokens[:, ::-1])[:, ::-1]


class TwoSided(GeneratedTask):
    """Plain digits, marked ones at `marks` of the positions, queries at `queries` of them.

    A query without a marked digit on both sides is a plain digit instead.
    """

    suite: ClassVar[str] = "probes"
    chance: ClassVar[float] = 1 / DIGITS
    license: ClassVar[str] = "generated"
    omitted: ClassVar[dict[str, str]] = {"paper": "nothing is published"}

    length: int = Field(64, ge=4)
    marks: float = Field(0.1, gt=0.0, lt=1.0, description="share of marked digits")
    queries: float = Field(0.3, gt=0.0, lt=1.0, description="share of queries")

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.marks + self.queries > 1:
            raise ValueError("marks and queries must be at most 1 together")
        return self

    @property
    def spec(self) -> ProblemSpec:
        return ProblemSpec(
            input="tokens",
            classes=DIGITS,
            max_length=self.length,
            vocab_size=SUM + 1,
            output="token",
        )

    def symbols(self, store: Store) -> list[str]:
        digits = [str(digit) for digit in range(DIGITS)]
        return [*digits, *(f"[{digit}]" for digit in digits), "<", ">", "+"]

    @abstractmethod
    def ask(self, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        """Query tokens, one for every position."""

    def make(self, rng: np.random.Generator, examples: int) -> tuple[np.ndarray, np.ndarray]:
        shape = (examples, self.length)
        plain, digits = rng.integers(0, DIGITS, (2, *shape))
        asked = self.ask(rng, shape)
        kind = rng.random(shape)
        is_query = kind >= 1 - self.queries
        tokens = np.where(kind < self.marks, MARKED + digits, np.where(is_query, asked, plain))
        before, after = neighbours(tokens)
        is_query &= (before >= 0) & (after >= 0)
        tokens = np.where((tokens >= BEFORE) & ~is_query, plain, tokens)
        answers = np.select([tokens == BEFORE, tokens == AFTER], [before, after], before + after)
        return tokens, np.where(is_query, answers % DIGITS, IGNORED)

    def trivial_predictors(self, data: TaskData) -> dict[str, float]:
        fitted, scored = _asked(data.train), _asked(data.test)
        return {
            "majority class": _commonest(fitted[:, 2:], scored[:, 2:]),
            "the digit before alone": _commonest(fitted, scored),
        }


def _preset(options: dict[str, Any], *, steps: int, batch_size: int, l0: int) -> Preset:
    """Seconds on a core; one layer, so that only the fusion can bring both sides together."""
    return Preset(
        l0=l0,
        options={**options, "validation": 300, "test": 400},
        stack=StackConfig(d_model=48, n_layers=1),
        training=TrainingConfig(
            steps=steps, batch_size=batch_size, learning_rates=(5e-3, 1e-2), evaluations=4
        ),
    )


SMALL = Preset(
    l0=4,
    options={"length": 64, "marks": 0.15},
    stack=StackConfig(d_model=48, n_layers=1),
    training=TrainingConfig(steps=3000, batch_size=32, learning_rates=(5e-3,), evaluations=6),
)


def _asked(split: Split) -> np.ndarray:
    """(queries, 3): query token, marked digit before it and answer of every query."""
    batch = split.batch(np.arange(min(len(split), 2000)))
    tokens, labels = batch.inputs.numpy(), batch.labels.numpy()
    asked = labels != IGNORED
    return np.stack([tokens[asked], neighbours(tokens)[0][asked], labels[asked]], axis=1)


def _commonest(fitted: np.ndarray, scored: np.ndarray) -> float:
    """Accuracy of the commonest answer, the last column, given the other columns."""
    count = np.zeros((SUM + 1,) * fitted.shape[1])
    np.add.at(count, tuple(fitted.T), 1)
    return float((count.argmax(-1)[tuple(scored.T[:-1])] == scored[:, -1]).mean())


@registry.register("either-side")
class EitherSide(TwoSided):
    """The query's token says which side is asked: each direction can answer its own queries."""

    summary: ClassVar[str] = "recall the last marked digit before, or the next after, as flagged"
    presets: ClassVar[dict[str, Preset]] = {
        "quick": _preset(
            {"length": 96, "marks": 0.05, "queries": 0.1}, steps=300, batch_size=16, l0=4
        ),
        "small": SMALL,
    }

    def ask(self, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        return rng.integers(BEFORE, AFTER + 1, shape)


@registry.register("both-sides")
class BothSides(TwoSided):
    """The sum of both digits modulo ten, which no sum of two one-sided logits can tell.

    Some queries of the training split ask for one side, as in `EitherSide`: neither digit alone
    says anything of the sum, so that without them a model has no reason to carry either.
    Validation and test ask for sums alone.
    """

    summary: ClassVar[str] = "the sum modulo ten of the marked digits on both sides"
    presets: ClassVar[dict[str, Preset]] = {
        "quick": _preset({"length": 32, "marks": 0.2}, steps=800, batch_size=32, l0=2),
        "small": SMALL,
    }

    hints: float = Field(0.5, ge=0.0, lt=1.0, description="share of one-sided training queries")

    def ask(self, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        one_sided = rng.integers(BEFORE, AFTER + 1, shape)
        return np.where(rng.random(shape) < self.hints, one_sided, SUM)

    def load(self, store: Store) -> TaskData:
        data = super().load(store)
        if not self.hints:
            return data
        exam = self.override({"hints": 0.0}).load(store)
        return replace(data, validation=exam.validation, test=exam.test)
