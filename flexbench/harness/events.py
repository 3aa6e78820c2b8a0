"""What a running sweep tells whoever watches it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flexbench.records import Record, TrialConfig


@dataclass(frozen=True)
class Stage:
    """The sweep enters a stage: "data", "trials" or "speed", of `total` pieces of work."""

    name: str
    total: int


@dataclass(frozen=True)
class Progress:
    """A trial is under way; sent a few times a second at most.

    `step` of `steps` are done. `loss` is the mean training loss since the last evaluation,
    `validation_accuracy` the latest one in [0, 1], None before the first.
    """

    trial: TrialConfig
    step: int
    steps: int
    loss: float | None = None
    validation_accuracy: float | None = None


@dataclass(frozen=True)
class Done:
    """A trial has an outcome. `cached`: it was read from an earlier or another invocation's."""

    trial: TrialConfig
    record: Record
    cached: bool = False


@dataclass(frozen=True)
class Step:
    """One more piece of the stage "data" or "speed" is done; `label` names it."""

    label: str


@dataclass(frozen=True)
class Notice:
    """One line that a user should see, such as a checkpoint that could not be read."""

    text: str


Event = Stage | Progress | Done | Step | Notice
Observer = Callable[[Event], None]


def label(trial: TrialConfig) -> str:
    """A short name for progress bars: `listops mamba seed 0 lr 0.003`."""
    return f"{trial.task} {trial.model} seed {trial.seed} lr {trial.learning_rate:g}"
