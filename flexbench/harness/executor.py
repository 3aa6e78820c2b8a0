"""Where trials run: in this process, in a pool of processes, later on a cluster."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from flexbench.errors import UserError
from flexbench.harness.environment import cores
from flexbench.harness.events import Observer
from flexbench.harness.locks import Busy
from flexbench.harness.process import Died, Process, Raised, Returned, ready, stop
from flexbench.records import Record, TrialConfig

Work = Callable[[TrialConfig, Observer], Record]
"""Trains one trial; picklable. Raises Busy or UserError where it cannot, and nothing else."""


@dataclass(frozen=True)
class Trained:
    """The work returned this record."""

    trial: TrialConfig
    record: Record


@dataclass(frozen=True)
class Postponed:
    """The work raised Busy: another invocation is at this trial."""

    trial: TrialConfig


@dataclass(frozen=True)
class Lost:
    """The work ended without a record; `reason` says how."""

    trial: TrialConfig
    reason: str


End = Trained | Postponed | Lost


class Executor(Protocol):
    """A way to run trials, in whatever order and place.

    Yields one Trained, Postponed or Lost for each, as they end; `observe` hears the work's events.
    A UserError of the work stops the run and is raised here. Closing the iterator, or Ctrl-C,
    stops what is under way, which leaves its checkpoint.
    """

    def run(
        self, trials: Sequence[TrialConfig], work: Work, observe: Observer
    ) -> Iterator[End]: ...


def make_executor(workers: int | None = None, *, device: str = "cpu", threads: int = 1) -> Executor:
    """Trials in this process (`workers=0`) or one process a trial, `workers` at once.

    None: as many as there are cores for `threads` threads each; one on a GPU.
    """
    if workers is None:
        workers = 1 if device == "cuda" else max(1, cores() // threads)
    return Pool(workers) if workers else Inline()


class Inline:
    """One trial after the other in this process, for debuggers."""

    def run(self, trials: Sequence[TrialConfig], work: Work, observe: Observer) -> Iterator[End]:
        for trial in trials:
            try:
                yield Trained(trial, work(trial, observe))
            except Busy:
                yield Postponed(trial)


class Pool:
    """A process for each trial, at most `workers` at once: one that dies takes nothing with it."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def run(self, trials: Sequence[TrialConfig], work: Work, observe: Observer) -> Iterator[End]:
        waiting = deque(trials)
        running: dict[Process, TrialConfig] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.workers:
                    trial = waiting.popleft()
                    running[Process(work, trial)] = trial
                for process in ready(running):
                    message = process.read()
                    if isinstance(message, (Returned, Raised, Died)):
                        yield _end(running.pop(process), message)
                    else:
                        observe(message)
        finally:
            stop(running)


def _end(trial: TrialConfig, message: Returned | Raised | Died) -> End:
    if isinstance(message, Returned):
        return Trained(trial, message.value)
    if isinstance(message, Died):
        return Lost(trial, message.reason)
    if isinstance(message.error, Busy):
        return Postponed(trial)
    if isinstance(message.error, UserError):
        raise message.error
    return Lost(trial, message.text)
