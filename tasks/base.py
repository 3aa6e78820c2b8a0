"""What a task is: typed options, a preparation step, splits that yield batches, its facts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import numpy as np

from flexbench.config import Preset, StrictModel
from flexbench.interface import Batch, ProblemSpec
from flexbench.registry import Registry
from flexbench.tasks.store import DataSource as DataSource
from flexbench.tasks.store import Resource, Store
from flexbench.tasks.store import SourceKind as SourceKind


class Split(Protocol):
    """Indexed examples. `batch` is a pure function of the indices, so that any order replays."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray) -> Batch: ...


@dataclass(frozen=True)
class FurtherTest:
    """A test set beside a task's own, of sequences of at most `max_length` steps."""

    split: Split
    max_length: int


@dataclass(frozen=True)
class TaskData:
    """A loaded task. Arrays stay memory-mapped; nothing holds a split as Python objects.

    `further` holds test sets that no training leads up to (other lengths, other recordings), by
    name. They too are read once, at the end: `test_accuracy@<name>` in the record.
    """

    spec: ProblemSpec
    train: Split
    validation: Split
    test: Split
    source: DataSource
    further: Mapping[str, FurtherTest] = field(default_factory=dict)


class Task(StrictModel, ABC):
    """A task: an instance holds the options that change the data, the class its facts.

    Subclass it in one module under `tasks/`, decorate with `@registry.register("name")`, and it is
    in `flexbench ls tasks` and in its suite. `name` is set by the decorator.

    Class attributes:
        suite: the suite it belongs to.
        version: raised whenever the data or the protocol changes: older records are set apart.
        summary: one line for `flexbench ls tasks`.
        metric: the score that is customary for it, "accuracy", "mcc" or "f1". Selection and tables
            go by accuracy; another metric is on record beside it, and in the tables' notes.
        chance: accuracy of a uniform guess among the answers there are. Where options decide how
            many, override `chance_level` instead.
        license: licence or owner of the data.
        requires_causal: True refuses models that see the future.
        published: figures by model name, percent, never mixed with ours; `published_source` cites.
        presets: how to run it at each size.
        view: how a sample of values is drawn: as a curve, or as a square picture.
        resources: raw data it is made from, if any, for `flexbench data`.
        omitted: presets it is left out of, each with the reason that tables print.
    """

    name: ClassVar[str]
    suite: ClassVar[str]
    version: ClassVar[int] = 1
    summary: ClassVar[str]
    metric: ClassVar[str] = "accuracy"
    chance: ClassVar[float]
    license: ClassVar[str] = ""
    requires_causal: ClassVar[bool] = False
    published: ClassVar[dict[str, float]] = {}
    published_source: ClassVar[str] = ""
    presets: ClassVar[dict[str, Preset]]
    view: ClassVar[Literal["sequence", "image"]] = "sequence"
    resources: ClassVar[tuple[Resource, ...]] = ()
    omitted: ClassVar[dict[str, str]] = {}

    @abstractmethod
    def prepare(self, store: Store) -> None:
        """Fetch or generate into the store's cache, with progress. Quick when already done.

        Raises:
            DataUnavailable: no source answered; the message names the command that fetches it.
        """

    @abstractmethod
    def load(self, store: Store) -> TaskData:
        """Open the prepared data; touches no network.

        Raises:
            DataUnavailable: `prepare` has not been run.
        """

    def chance_level(self) -> float:
        """Accuracy of a uniform guess at these options, in [0, 1]."""
        return self.chance

    def symbols(self, store: Store) -> list[str] | None:
        """What token ids stand for, where that can be written; `load` must work."""
        return None

    @abstractmethod
    def trivial_predictors(self, data: TaskData) -> dict[str, float]:
        """Test accuracy, in [0, 1], of predictors that learn next to nothing, by name.

        Fitted on the training split, scored on the test split.
        """


registry: Registry[type[Task]] = Registry("task", "flexbench.tasks", "flexbench.tasks")


def suites() -> dict[str, list[str]]:
    """Task names by suite, in order of definition within a suite."""
    found: dict[str, list[str]] = {}
    for name in registry:
        found.setdefault(registry.get(name).suite, []).append(name)
    return dict(sorted(found.items()))
