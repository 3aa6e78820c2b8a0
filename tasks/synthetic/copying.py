"""Copying and selective copying (Gu & Dao 2023, appendix E.1; Arjovsky et al. 2016)."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np
from pydantic import Field, PositiveInt

from flexbench.config import Preset, StackConfig, TrainingConfig
from flexbench.interface import IGNORED, ProblemSpec
from flexbench.tasks import trivial
from flexbench.tasks.base import TaskData, registry
from flexbench.tasks.synthetic import distinct
from flexbench.tasks.synthetic.lengths import MixedLengths


class _Copying(MixedLengths):
    """`memorize` tokens among blanks (0), then as many markers, at which they are read back.

    Tokens are uniform over 1 … alphabet - 2, the marker is alphabet - 1; a sequence has
    length + 2 * memorize steps. A label stands at each marker.
    """

    suite = "synthetic"
    presets: ClassVar[dict[str, Preset]] = {
        "quick": Preset(
            l0=4,
            options={"length": 48, "memorize": 8, "test": 1000},
            training=TrainingConfig(
                steps=800, batch_size=64, learning_rates=(3e-3,), validation_examples=500
            ),
        ),
        "small": Preset(
            options={"length": 1024, "shortest": 32},
            training=TrainingConfig(
                steps=10_000, batch_size=32, learning_rates=(4e-3,), evaluations=10
            ),
        ),
        "paper": Preset(
            stack=StackConfig(d_model=64, n_layers=2),
            training=TrainingConfig(
                steps=400_000, batch_size=64, learning_rates=(1e-4,), evaluations=40
            ),
        ),
    }

    length: PositiveInt = Field(4096, description="blanks; the tokens and markers come on top")
    memorize: PositiveInt = Field(16, description="tokens to remember")
    alphabet: int = Field(16, ge=3, description="ids in all: tokens, blank and marker")

    @property
    def spec(self) -> ProblemSpec:
        return ProblemSpec(
            input="tokens",
            classes=self.alphabet,
            max_length=self.length + 2 * self.memorize,
            vocab_size=self.alphabet,
            output="token",
        )

    def chance_level(self) -> float:
        return 1 / (self.alphabet - 2)

    @abstractmethod
    def places(self, rng: np.random.Generator, examples: int) -> np.ndarray:
        """Where the tokens stand among length + memorize steps, ascending: (examples, memorize)."""

    def make(self, rng: np.random.Generator, examples: int) -> tuple[np.ndarray, np.ndarray]:
        asked = slice(self.length + self.memorize, None)
        wanted = rng.integers(1, self.alphabet - 1, (examples, self.memorize))
        tokens = np.zeros((examples, self.length + 2 * self.memorize), dtype=np.int64)
        np.put_along_axis(tokens, self.places(rng, examples), wanted, axis=1)
        tokens[:, asked] = self.alphabet - 1
        labels = np.full_like(tokens, IGNORED)
        labels[:, asked] = wanted
        return tokens, labels

    def trivial_predictors(self, data: TaskData) -> dict[str, float]:
        return {
            "majority class": trivial.majority(data.train, data.test),
            "commonest token": trivial.commonest(data.test, range(1, self.alphabet - 1)),
        }


@registry.register("copying")
class Copying(_Copying):
    """The tokens come first, all together: a matter of keeping time."""

    summary = "read back 16 tokens after a long blank"

    def places(self, rng: np.random.Generator, examples: int) -> np.ndarray:
        return np.broadcast_to(np.arange(self.memorize), (examples, self.memorize))


@registry.register("selective-copying")
class SelectiveCopying(_Copying):
    """The tokens are scattered among the blanks: a matter of content."""

    summary = "read back 16 tokens scattered among blanks"
    published: ClassVar[dict[str, float]] = {"s4": 18.3, "h3": 57.0, "mamba": 99.8}
    published_source = "arXiv 2312.00752, table 1"

    def places(self, rng: np.random.Generator, examples: int) -> np.ndarray:
        return np.sort(distinct(rng, examples, self.memorize, self.length + self.memorize), axis=1)
