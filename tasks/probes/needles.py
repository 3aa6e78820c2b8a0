"""Needles: few informative blocks among noise of the same symbols, and they move."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field, PositiveInt, model_validator
from typing_extensions import Self

from flexbench.config import Preset, StackConfig, TrainingConfig
from flexbench.interface import ProblemSpec
from flexbench.tasks.base import TaskData, registry
from flexbench.tasks.generated import GeneratedTask
from flexbench.tasks.trivial import linear, majority

SYMBOLS = 16
CLASSES = 4
MARKER = (3, 7, 11)
"""Three symbols in a row that stand before a payload, and nowhere else."""

STACK = StackConfig(d_model=32, n_layers=2)


@registry.register("needles")
class Needles(GeneratedTask):
    """Which payload is the commonest?

    A sequence is uniform noise over 16 symbols. A quarter of its blocks, different ones in every
    sequence, hold the marker somewhere, followed by a payload, one of the first four symbols. Half
    of the payloads are of one kind, the label; no other kind has more than a quarter. Nothing else
    tells an informative block: the marker's symbols are noise as often as any other.
    """

    suite: ClassVar[str] = "probes"
    summary: ClassVar[str] = "commonest payload of the few blocks that hold a marker, 4 classes"
    chance: ClassVar[float] = 1 / CLASSES
    license: ClassVar[str] = "generated"
    presets: ClassVar[dict[str, Preset]] = {
        "quick": Preset(
            stack=STACK,
            training=TrainingConfig(
                steps=1200,
                batch_size=32,
                learning_rates=(5e-3,),
                evaluations=5,
                validation_examples=500,
            ),
            l0=16,
        ),
        "small": Preset(
            options={"length": 1024},
            stack=STACK,
            training=TrainingConfig(
                steps=1000,
                batch_size=16,
                learning_rates=(5e-3,),
                evaluations=5,
                validation_examples=500,
            ),
            l0=16,
        ),
    }
    omitted: ClassVar[dict[str, str]] = {"paper": "nothing is published"}

    length: PositiveInt = 512
    block: int = Field(16, ge=len(MARKER) + 1, description="tokens of a block")

    @model_validator(mode="after")
    def _blocks_fit(self) -> Self:
        if self.length % (16 * self.block):
            raise ValueError("length must be a multiple of 16 blocks")
        return self

    @property
    def spec(self) -> ProblemSpec:
        return ProblemSpec(
            input="tokens", classes=CLASSES, max_length=self.length, vocab_size=SYMBOLS
        )

    def make(self, rng: np.random.Generator, examples: int) -> tuple[np.ndarray, np.ndarray]:
        blocks = self.length // self.block
        needles = blocks // 4
        labels = rng.integers(CLASSES, size=examples)
        others = (
            labels[:, None] + rng.permuted(np.tile([1, 2, 3], (examples, 1)), axis=1)
        ) % CLASSES
        shares = np.array([needles // 2, needles // 4, needles // 8])
        counts = np.r_[shares, needles - shares.sum()]
        kinds = np.repeat(np.column_stack([labels, others]), counts, axis=1)
        kinds = rng.permuted(kinds, axis=1)

        tokens = without_marker(rng, rng.integers(SYMBOLS, size=(examples, self.length)))
        where = rng.permuted(np.tile(np.arange(blocks), (examples, 1)), axis=1)[:, :needles]
        offset = rng.integers(self.block - len(MARKER), size=where.shape)
        start = where * self.block + offset
        rows = np.arange(examples)[:, None]
        for place, symbol in enumerate(MARKER):
            tokens[rows, start + place] = symbol
        tokens[rows, start + len(MARKER)] = kinds
        return tokens, labels

    def informative(self, tokens: np.ndarray) -> np.ndarray:
        """(examples, blocks) bool: which blocks hold a marker."""
        blocks = _marked(tokens).reshape(len(tokens), -1, self.block)
        return np.asarray(blocks.any(axis=2))

    def trivial_predictors(self, data: TaskData) -> dict[str, float]:
        return {
            "majority class": majority(data.train, data.test),
            "linear on symbol counts": linear(data),
        }


def without_marker(rng: np.random.Generator, tokens: np.ndarray) -> np.ndarray:
    """The noise with the last symbol of every chance marker drawn again."""
    while (found := _marked(tokens)).any():
        rows, columns = found.nonzero()
        tokens[rows, columns + len(MARKER) - 1] = rng.integers(SYMBOLS, size=len(rows))
    return tokens


def _marked(tokens: np.ndarray) -> np.ndarray:
    """(examples, length) bool: where a marker begins."""
    found = np.ones(tokens.shape, bool)
    for place, symbol in enumerate(MARKER):
        found &= np.roll(tokens, -place, axis=1) == symbol
    found[:, -(len(MARKER) - 1) :] = False
    return found
