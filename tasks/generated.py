"""Tasks whose examples are made when asked for: fresh ones at every step, and nothing on disk."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from typing_extensions import Self

from flexbench.interface import Batch, ProblemSpec
from flexbench.tasks.arrays import TokenSplit
from flexbench.tasks.base import DataSource, Split, Task, TaskData
from flexbench.tasks.store import Store

TRAIN, VALIDATION, TEST = range(3)
"""The streams of random numbers, one a split."""


class GeneratedTask(Task):
    """A task of token sequences of one length that a formula makes.

    Subclasses say what the problem is (`spec`) and how examples are made (`make`). Validation and
    test sets are made once, from `data_seed`; a training batch is made from `data_seed` and its
    indices, which follow from the trial's seed, so that no example is seen twice; or, with `fresh`
    off, the training set too is made once.
    """

    examples: PositiveInt = Field(1 << 20, description="training examples in an epoch")
    fresh: bool = Field(True, description="new training examples in every epoch")
    validation: PositiveInt = 1000
    test: PositiveInt = 2000
    data_seed: NonNegativeInt = 0

    @property
    @abstractmethod
    def spec(self) -> ProblemSpec:
        """The problem's shape."""

    @abstractmethod
    def make(self, rng: np.random.Generator, examples: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (examples, length) and labels (examples,), or (examples, length) with -100."""

    def varied(self, rng: np.random.Generator) -> Self:
        """The task that the next fresh training batch is made by: this one, unless lengths vary."""
        return self

    def prepare(self, store: Store) -> None:
        """Nothing to do."""

    def load(self, store: Store) -> TaskData:
        return TaskData(
            spec=self.spec,
            train=_Fresh(self) if self.fresh else self._fixed(TRAIN, self.examples),
            validation=self._fixed(VALIDATION, self.validation),
            test=self._fixed(TEST, self.test),
            source=DataSource("synthetic", f"seed {self.data_seed}"),
        )

    def _fixed(self, stream: int, examples: int) -> Split:
        tokens, labels = self.make(np.random.default_rng([self.data_seed, stream]), examples)
        return TokenSplit(
            tokens.astype(np.min_scalar_type(self.spec.vocab_size)), labels.astype(np.int32)
        )


class _Fresh:
    """The training split: a batch is a function of its indices and of the data's seed."""

    def __init__(self, task: GeneratedTask) -> None:
        self.task = task

    def __len__(self) -> int:
        return self.task.examples

    def batch(self, indices: np.ndarray) -> Batch:
        rng = np.random.default_rng([self.task.data_seed, TRAIN, *np.asarray(indices).tolist()])
        return _batch(*self.task.varied(rng).make(rng, len(indices)))


class OneByOne:
    """A fixed test set of which only the batch at hand is in memory: an example is a function of
    its index, the stream and the data's seed.

    Args:
        task: makes the examples.
        stream: a number of the set's own, above `TEST`.
        examples: how many there are.
    """

    def __init__(self, task: GeneratedTask, stream: int, examples: int) -> None:
        self.task = task
        self.stream = stream
        self.examples = examples

    def __len__(self) -> int:
        return self.examples

    def batch(self, indices: np.ndarray) -> Batch:
        seeds = [[self.task.data_seed, self.stream, index] for index in indices.tolist()]
        made = [self.task.make(np.random.default_rng(seed), 1) for seed in seeds]
        tokens, labels = zip(*made, strict=True)
        return _batch(np.concatenate(tokens), np.concatenate(labels))


def _batch(tokens: np.ndarray, labels: np.ndarray) -> Batch:
    return Batch(
        inputs=torch.from_numpy(tokens.astype(np.int64)),
        labels=torch.from_numpy(labels.astype(np.int64)),
    )
