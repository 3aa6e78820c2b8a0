"""What a running sweep looks like on a terminal, and in a log."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from tqdm import tqdm
from typing_extensions import Self

from flexbench.harness import Done, Event, Notice, Progress, Stage, Step, label
from flexbench.records import TrialConfig

STAGES = {"data": "data", "trials": "training", "speed": "speed"}
SHARE = "{desc} {percentage:3.0f} %|{bar:24}| {elapsed}, {remaining} left{postfix}"


class ProgressBars:
    """An observer of `flexbench.harness.run`: an overall bar and one line a running trial.

    Writes to stderr. Where that is no terminal there are no bars, only a line a finished trial.
    """

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._stage: tqdm[Any] | None = None
        self._trials: dict[str, tqdm[Any]] = {}
        self._shares: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def __call__(self, event: Event) -> None:
        match event:
            case Stage():
                self._enter(event)
            case Progress():
                self._advance(event)
            case Done():
                self._finish(event)
            case Step():
                self._step(event)
            case Notice():
                self._say(event.text)

    def _enter(self, stage: Stage) -> None:
        self._close()
        name = STAGES.get(stage.name, stage.name)
        if stage.total:
            self._stage = tqdm(
                total=stage.total, desc=name, bar_format=SHARE, leave=False, disable=not self._live
            )

    def _advance(self, event: Progress) -> None:
        key = event.trial.hash
        if self._live:
            bar = self._trials.get(key)
            if bar is None:
                bar = self._trials[key] = self._bar(event)
            bar.n = event.step
            figures = []
            if event.loss is not None:
                figures.append(f"loss {event.loss:.3f}")
            if event.validation_accuracy is not None:
                figures.append(f"val {100 * event.validation_accuracy:.1f} %")
            bar.set_postfix_str(", ".join(figures), refresh=False)
            bar.refresh()
        self._count(event.trial, event.step / event.steps)

    def _bar(self, event: Progress) -> tqdm[Any]:
        return tqdm(
            total=event.steps,
            desc=f"  {label(event.trial)}",
            bar_format="{desc}: step {n:.0f} of {total:.0f}{postfix}",
            position=1 + self._free_line(),
            leave=False,
        )

    def _free_line(self) -> int:
        taken = {abs(bar.pos) - 1 for bar in self._trials.values()}
        return min(set(range(len(taken) + 1)) - taken)

    def _finish(self, event: Done) -> None:
        bar = self._trials.pop(event.trial.hash, None)
        if bar is not None:
            bar.close()
        if not event.cached:
            self._count(event.trial, 1.0)
            self._say(f"{label(event.trial)}: {_outcome(event)}")
        elif self._stage is not None and self._stage.total:
            self._stage.total -= 1  # the time left is judged by what is trained here
            self._stage.refresh()

    def _step(self, event: Step) -> None:
        if self._stage is not None:
            self._stage.set_postfix_str(event.label, refresh=False)
            self._stage.update()

    def _count(self, trial: TrialConfig, share: float) -> None:
        self._shares[trial.hash] = share
        if self._stage is not None and self._stage.total:
            done = min(sum(self._shares.values()), self._stage.total)
            self._stage.update(done - self._stage.n)

    def _say(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def _close(self) -> None:
        for bar in (*self._trials.values(), self._stage):
            if bar is not None:
                bar.close()
        self._trials.clear()
        self._stage = None


def _outcome(event: Done) -> str:
    record = event.record
    if record.outcome == "finished" and record.metrics:
        accuracy = 100 * record.metrics["test_accuracy"]
        return f"test accuracy {accuracy:.1f} % after {record.seconds:.0f} s"
    lines = (record.error or "").strip().splitlines()
    return f"{record.outcome}: {lines[-1].strip()}" if lines else record.outcome
