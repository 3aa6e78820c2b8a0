"""Induction heads (Gu & Dao 2023, appendix E.1; Fu et al. 2023)."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
from pydantic import Field, PositiveInt

from flexbench.config import Preset, StackConfig, TrainingConfig
from flexbench.interface import IGNORED, ProblemSpec
from flexbench.tasks import trivial
from flexbench.tasks.base import FurtherTest, TaskData, registry
from flexbench.tasks.generated import OneByOne
from flexbench.tasks.store import Store
from flexbench.tasks.synthetic.lengths import MixedLengths


def ladder(top: int) -> list[int]:
    """Lengths 2^6, 2^7 … 2^top."""
    return [1 << power for power in range(6, top + 1)]


@registry.register("induction-heads")
class InductionHeads(MixedLengths):
    """What followed the special token? It stands somewhere in random tokens, and again at the end.

    Ids below `vocabulary` are ordinary, `vocabulary` is the special token. The label stands at the
    last step. `ladder` lists the lengths at which a model trained at `length` is tested as well.
    """

    suite = "synthetic"
    summary = "recall what followed a special token; tested at other lengths too"
    published: ClassVar[dict[str, float]] = {"mamba": 100.0}
    published_source = "arXiv 2312.00752, table 2: every length from 2^6 to 2^20"
    presets: ClassVar[dict[str, Preset]] = {
        "quick": Preset(
            l0=4,
            options={"length": 64, "ladder": ladder(14), "test": 1000},
            training=TrainingConfig(
                steps=1000, batch_size=32, learning_rates=(3e-3,), validation_examples=500
            ),
        ),
        "small": Preset(
            l0=16,
            options={"shortest": 16, "ladder": ladder(16)},
            training=TrainingConfig(
                steps=3000, batch_size=64, learning_rates=(4e-3,), evaluations=10
            ),
        ),
        "paper": Preset(
            l0=16,
            options={"ladder": ladder(20)},
            stack=StackConfig(d_model=64, n_layers=2),
            training=TrainingConfig(
                steps=25 * 8192, batch_size=8, learning_rates=(1e-3,), evaluations=25
            ),
        ),
    }

    length: int = Field(256, ge=3)
    vocabulary: PositiveInt = Field(16, description="ordinary tokens")
    ladder: tuple[int, ...] = Field((), description="lengths of further test sets")
    ladder_examples: PositiveInt = 100

    @property
    def spec(self) -> ProblemSpec:
        return ProblemSpec(
            input="tokens",
            classes=self.vocabulary,
            max_length=self.length,
            vocab_size=self.vocabulary + 1,
            output="token",
        )

    def chance_level(self) -> float:
        return 1 / self.vocabulary

    def make(self, rng: np.random.Generator, examples: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = rng.integers(0, self.vocabulary, (examples, self.length))
        rows, first = np.arange(examples), rng.integers(0, self.length - 2, examples)
        tokens[rows, first] = tokens[:, -1] = self.vocabulary
        labels = np.full_like(tokens, IGNORED)
        labels[:, -1] = tokens[rows, first + 1]
        return tokens, labels

    def load(self, store: Store) -> TaskData:
        further = {}
        for length in self.ladder:
            task = self.override({"length": length, "ladder": (), "shortest": None})
            split = OneByOne(task, stream=length, examples=self.ladder_examples)
            further[str(length)] = FurtherTest(split, length)
        return replace(super().load(store), further=further)

    def trivial_predictors(self, data: TaskData) -> dict[str, float]:
        return {
            "majority class": trivial.majority(data.train, data.test),
            "commonest token": trivial.commonest(data.test, range(self.vocabulary)),
        }
