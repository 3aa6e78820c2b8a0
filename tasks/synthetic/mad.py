"""The six tasks of Mechanistic Architecture Design (Poli et al. 2024, athms/mad-lab).

Sequences are made as there, with one difference where MAD trains on the next token: what a question
asks for is blanked in the input, since a model that sees the future would read it there.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np
from pydantic import Field, PositiveInt, model_validator
from typing_extensions import Self

from flexbench.config import Preset, StackConfig, TrainingConfig
from flexbench.interface import IGNORED, ProblemSpec
from flexbench.tasks import trivial
from flexbench.tasks.base import TaskData, registry
from flexbench.tasks.generated import GeneratedTask

WIDEST = 3
"""Tokens of the longest motif of fuzzy recall."""


def presets(steps: int, examples: int = 12_800, **quick: int) -> dict[str, Preset]:
    """Quick with so many steps and these options; paper with so many training examples, two layers
    of width 128 and 200 epochs of batches of 128.
    """
    rates = (1e-4, 5e-4, 1e-3)
    return {
        "quick": Preset(
            l0=2,
            options={"test": 1000, **quick},
            training=TrainingConfig(
                steps=steps, batch_size=64, learning_rates=(3e-3,), validation_examples=500
            ),
        ),
        "small": Preset(
            l0=2,
            training=TrainingConfig(
                steps=10_000, batch_size=128, learning_rates=(1e-3, 2e-3, 4e-3), evaluations=20
            ),
        ),
        "paper": Preset(
            l0=2,
            options={"fresh": False, "examples": examples, "test": 1280},
            stack=StackConfig(d_model=128, n_layers=2),
            training=TrainingConfig(
                steps=max(1, examples // 128) * 200,
                batch_size=128,
                learning_rates=rates,
                weight_decay=0.0,
                evaluations=40,
            ),
        ),
    }


class _MAD(GeneratedTask):
    """`width` is the number of steps, `ids` that of different tokens."""

    suite = "synthetic"

    @property
    @abstractmethod
    def ids(self) -> int: ...

    @property
    @abstractmethod
    def width(self) -> int: ...

    @property
    @abstractmethod
    def answers(self) -> range:
        """The ids that are asked for."""

    def chance_level(self) -> float:
        return 1 / len(self.answers)

    @property
    def spec(self) -> ProblemSpec:
        return ProblemSpec(
            input="tokens",
            classes=self.answers.stop,
            max_length=self.width,
            vocab_size=self.ids,
            output="token",
        )

    def trivial_predictors(self, data: TaskData) -> dict[str, float]:
        return {
            "majority class": trivial.majority(data.train, data.test),
            "commonest token": trivial.commonest(data.test, self.answers),
        }


# -- recall in context ---------------------------------------------------------------------------


class _Recall(_MAD):
    """Keys and values in turn, a key's value the same throughout: the value of each key that has
    been shown before?

    The lower half of the ids are keys, the upper half values; then noise, then the blank that
    stands for every value asked for, then the pad. The label stands a step before its blank.
    """

    length: int = Field(128, ge=4 * WIDEST)
    vocabulary: int = Field(16, ge=8, description="keys and values")

    @property
    def answers(self) -> range:
        return range(self.vocabulary // 2, self.vocabulary)

    @property
    def ids(self) -> int:
        return self.vocabulary + 1

    @property
    def width(self) -> int:
        return self.length - 1


class _SingleRecall(_Recall):
    """Recall where keys and values are single tokens and a share of the pairs is noise."""

    noise: float = Field(0.0, ge=0.0, lt=1.0, description="share of pairs that are noise")
    noise_ids: PositiveInt = 16

    @property
    def ids(self) -> int:
        return self.vocabulary + self.noise_ids + 1

    def make(self, rng: np.random.Generator, examples: int) -> tuple[np.ndarray, np.ndarray]:
        half, pairs = self.vocabulary // 2, self.length // 2
        table = rng.integers(half, self.vocabulary, (examples, half))
        keys = rng.integers(0, half, (examples, pairs))
        noisy = rng.random((examples, pairs)) < self.noise
        noisy[np.arange(examples), rng.integers(0, pairs - 1, examples)] = False
        noisy[:, -1] = False
        shown = (keys[:, :, None] == np.arange(half)) & ~noisy[:, :, None]
        ever = shown[:, :-1].any(1)
        keys[:, -1] = np.where(ever, rng.random(ever.shape), -1).argmax(1)
        shown[:, -1] = keys[:, -1, None] == np.arange(half)
        before = shown.cumsum(1) - shown
        asked = np.take_along_axis(before, keys[:, :, None], 2)[:, :, 0].astype(bool) & ~noisy
        values = np.take_along_axis(table, keys, 1)
        tokens = np.stack([keys, np.where(asked, self.ids - 1, values)], axis=2)
        noise = rng.integers(self.vocabulary, self.vocabulary + self.noise_ids, tokens.shape)
        tokens = np.where(noisy[:, :, None], noise, tokens).reshape(examples, -1)
        labels = np.full_like(tokens, IGNORED)
        labels[:, ::2] = np.where(asked, values, IGNORED)
        return tokens[:, :-1], labels[:, :-1]


@registry.register("mad-recall")
class InContextRecall(_SingleRecall):
    """Keys and values are single tokens."""

    summary = "MAD: values of keys shown before, in context"
    presets: ClassVar[dict[str, Preset]] = presets(800, length=64)


@registry.register("mad-noisy-recall")
class NoisyRecall(_SingleRecall):
    """The same, with noise of other ids in a share of the pairs' places."""

    summary = "MAD: in-context recall among noise"
    presets: ClassVar[dict[str, Preset]] = presets(900, length=64)

    noise: float = Field(0.2, ge=0.0, lt=1.0, description="share of pairs that are noise")


@registry.register("mad-fuzzy-recall")
class FuzzyRecall(_Recall):
    """Keys and values are motifs of one to three different tokens.

    As many pairs as fit, padded on the left; the last one repeats the key of an earlier one. MAD
    tests with the longest keys alone; here all splits are alike.
    """

    summary = "MAD: in-context recall of motifs of tokens"
    presets: ClassVar[dict[str, Preset]] = presets(900, length=64)

    vocabulary: int = Field(15, ge=2 * WIDEST, description="keys and values")

    @property
    def ids(self) -> int:
        return self.vocabulary + 2

    def make(self, rng: np.random.Generator, examples: int) -> tuple[np.ndarray, np.ndarray]:
        blank, pad = self.ids - 2, self.ids - 1
        pairs, half = self.length // 2, self.vocabulary // 2
        keys = _motifs(rng, (examples, pairs), range(half))
        values = _motifs(rng, (examples, pairs), self.answers)
        rows = np.arange(examples)

        # The last pair repeats one of those before it that are sure to fit, or chosen to.
        sizes = (keys >= 0).sum(2) + (values >= 0).sum(2)
        fits = sizes.cumsum(1) <= self.length - 2 * WIDEST
        count = fits.sum(1)
        keys[rows, count] = keys[rows, rng.integers(0, count)]
        kept = np.arange(pairs) <= count[:, None]

        # A key's value is the one it had first.
        names = ((keys + 1) * (half + 1) ** np.arange(WIDEST)).sum(2)
        first = (names[:, :, None] == names[:, None, :]).argmax(2)
        values = np.take_along_axis(values, first[:, :, None], 1)
        asked = np.broadcast_to((first < np.arange(pairs))[:, :, None], values.shape)

        shown = np.concatenate([keys, np.where(asked & (values >= 0), blank, values)], axis=2)
        wanted = np.concatenate([np.full_like(keys, IGNORED), np.where(asked, values, IGNORED)], 2)
        there = (shown >= 0) & kept[:, :, None]
        shown, wanted, there = (part.reshape(examples, -1) for part in (shown, wanted, there))
        ends = there.cumsum(1)
        row, column = there.nonzero()
        place = (self.length - ends[:, -1:] + ends - 1)[row, column]
        tokens = np.full((examples, self.length), pad)
        labels = np.full((examples, self.length), IGNORED)
        tokens[row, place], labels[row, place] = shown[row, column], wanted[row, column]
        return tokens[:, :-1], labels[:, 1:]


def _motifs(rng: np.random.Generator, shape: tuple[int, int], ids: range) -> np.ndarray:
    """One to `WIDEST` different ids, then -1: (*shape, WIDEST)."""
    drawn = rng.random((*shape, len(ids))).argsort(-1)[..., :WIDEST] + ids.start
    size = rng.integers(1, WIDEST + 1, shape)
    return np.where(np.arange(WIDEST) < size[..., None], drawn, -1)


# -- the other three -----------------------------------------------------------------------------


@registry.register("mad-memorization")
class Memorization(_MAD):
    """Keys, a mark after each: the value of each key by a table that is the same in all examples.

    Nothing but the weights knows the table; the label stands at the mark.
    """

    summary = "MAD: a fixed table of keys and values, learnt by heart"
    presets: ClassVar[dict[str, Preset]] = presets(500, examples=256)

    length: PositiveInt = 32
    vocabulary: int = Field(255, ge=2, description="keys and values")

    @property
    def answers(self) -> range:
        return range(self.vocabulary // 2, self.vocabulary)

    @property
    def ids(self) -> int:
        return self.vocabulary + 1

    @property
    def width(self) -> int:
        return self.length

    def make(self, rng: np.random.Generator, examples: int) -> tuple[np.ndarray, np.ndarray]:
        table = np.random.default_rng(self.data_seed).permutation(self.answers)
        tokens = np.full((examples, self.length), self.vocabulary)
        tokens[:, ::2] = rng.integers(0, self.answers.start, (examples, (self.length + 1) // 2))
        labels = np.full_like(tokens, IGNORED)
        labels[:, 1::2] = table[tokens[:, :-1:2]]
        return tokens, labels


@registry.register("mad-compression")
class Compression(_MAD):
    """Random tokens, a mark, then a marker for each place: which token stood there?

    MAD decodes a model's output at the mark by an auto-encoder's MLP; here markers ask for what the
    state at the mark holds. A model that reads both ways is not held to it.
    """

    summary = "MAD: a whole random sequence from one state"
    presets: ClassVar[dict[str, Preset]] = presets(1000, length=16)

    length: int = Field(32, ge=2, description="random tokens and the mark")
    vocabulary: PositiveInt = Field(15, description="random tokens")

    @property
    def answers(self) -> range:
        return range(self.vocabulary)

    @property
    def ids(self) -> int:
        return self.vocabulary + self.length

    @property
    def width(self) -> int:
        return 2 * self.length - 1

    def make(self, rng: np.random.Generator, examples: int) -> tuple[np.ndarray, np.ndarray]:
        drawn = rng.integers(0, self.vocabulary, (examples, self.length - 1))
        marks = np.broadcast_to(self.vocabulary + np.arange(self.length), (examples, self.length))
        labels = np.full((examples, self.width), IGNORED)
        labels[:, self.length :] = drawn
        return np.concatenate([drawn, marks], axis=1), labels


@registry.register("mad-selective-copying")
class MADSelectiveCopying(_MAD):
    """Tokens with blanks between them, a mark, then blanks at which the tokens are read back."""

    summary = "MAD: read back 16 tokens scattered among blanks"
    presets: ClassVar[dict[str, Preset]] = presets(800, length=64, memorize=8)

    length: PositiveInt = 256
    memorize: PositiveInt = Field(16, description="tokens to remember")
    vocabulary: PositiveInt = Field(14, description="tokens")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.length <= 2 * self.memorize:
            raise ValueError(f"needs a length above {2 * self.memorize}")
        return self

    @property
    def answers(self) -> range:
        return range(self.vocabulary)

    @property
    def ids(self) -> int:
        return self.vocabulary + 2

    @property
    def width(self) -> int:
        return self.length

    def make(self, rng: np.random.Generator, examples: int) -> tuple[np.ndarray, np.ndarray]:
        blanks = self.length - 2 * self.memorize - 1
        wanted = rng.integers(0, self.vocabulary, (examples, self.memorize))
        gaps = rng.multinomial(blanks, np.full(self.memorize, 1 / self.memorize), examples)
        tokens = np.full((examples, self.length), self.vocabulary)
        np.put_along_axis(tokens, gaps.cumsum(1) + np.arange(self.memorize), wanted, axis=1)
        tokens[:, -self.memorize - 1] = self.vocabulary + 1
        labels = np.full_like(tokens, IGNORED)
        labels[:, -self.memorize :] = wanted
        return tokens, labels
