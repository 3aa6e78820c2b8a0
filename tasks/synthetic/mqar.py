"""Multi-query associative recall (Arora et al. 2023, HazyResearch/zoology)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field, PositiveInt, model_validator
from typing_extensions import Self

from flexbench.config import Preset, StackConfig, TrainingConfig
from flexbench.interface import IGNORED, ProblemSpec
from flexbench.tasks import trivial
from flexbench.tasks.base import TaskData, registry
from flexbench.tasks.generated import GeneratedTask
from flexbench.tasks.synthetic import distinct


@registry.register("mqar")
class MQAR(GeneratedTask):
    """Pairs of a key and a value, then the keys again, in any order: the value of each?

    Keys are ids from 1 below vocabulary / 2, values the ids from there on; both without
    repetition. After the pairs every second step is a slot; key i asks in the i-th slot drawn
    without replacement, slot j (from 1) with weight j ** (power - 1). The label stands at the key;
    all else is random ids.
    """

    suite = "synthetic"
    summary = "values of many keys, shown once as pairs"
    presets: ClassVar[dict[str, Preset]] = {
        "small": Preset(
            l0=4,
            training=TrainingConfig(
                steps=6000, batch_size=256, learning_rates=(4e-3,), evaluations=10
            ),
        ),
        "paper": Preset(
            l0=32,
            options={"length": 512, "pairs": 64, "examples": 100_000, "fresh": False, "test": 3000},
            stack=StackConfig(d_model=128, n_layers=2),
            training=TrainingConfig(
                steps=64 * 781,
                batch_size=128,
                learning_rates=(1e-4, 4.6e-4, 2.2e-3, 1e-2),
                weight_decay=0.1,
                evaluations=64,
            ),
        ),
    }

    omitted: ClassVar[dict[str, str]] = {
        "quick": "baseline Mamba does not get beyond guessing among the values within a minute"
    }

    length: PositiveInt = 64
    pairs: PositiveInt = Field(4, description="keys, and values, in a sequence")
    vocabulary: int = Field(8192, ge=8)
    power: float = Field(0.01, description="of the slots' weights; 1 is uniform")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.length % 2 or self.length < 4 * self.pairs:
            raise ValueError(f"needs an even length of at least {4 * self.pairs}")
        if self.pairs >= self.vocabulary // 2:
            raise ValueError("needs more ids than keys and values")
        return self

    @property
    def spec(self) -> ProblemSpec:
        return ProblemSpec(
            input="tokens",
            classes=self.vocabulary,
            max_length=self.length,
            vocab_size=self.vocabulary,
            output="token",
        )

    def chance_level(self) -> float:
        return 1 / (self.vocabulary - self.vocabulary // 2)

    def make(self, rng: np.random.Generator, examples: int) -> tuple[np.ndarray, np.ndarray]:
        half, context = self.vocabulary // 2, 2 * self.pairs
        keys = 1 + distinct(rng, examples, self.pairs, half - 1)
        values = half + distinct(rng, examples, self.pairs, self.vocabulary - half)
        # The largest of log-weights with Gumbel noise are draws without replacement, in order.
        weights = (self.power - 1) * np.log(np.arange(1, (self.length - context) // 2 + 1))
        noisy = weights + rng.gumbel(size=(examples, len(weights)))
        slots = context + 2 * np.argsort(-noisy, axis=1)[:, : self.pairs]
        tokens = rng.integers(0, self.vocabulary, (examples, self.length))
        tokens[:, 0:context:2], tokens[:, 1:context:2] = keys, values
        np.put_along_axis(tokens, slots, keys, axis=1)
        labels = np.full_like(tokens, IGNORED)
        np.put_along_axis(labels, slots, values, axis=1)
        return tokens, labels

    def trivial_predictors(self, data: TaskData) -> dict[str, float]:
        return {
            "majority class": trivial.majority(data.train, data.test),
            "first value": trivial.one_answer(data.test, lambda tokens: tokens[:, 1]),
        }
