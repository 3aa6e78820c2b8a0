"""The points of an ablation, each with the row that stands for it or the reason there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from flexbench.records import AblationPoint, AblationRecord, scan
from flexbench.report.pairs import Pair, against
from flexbench.report.results import Row, SuiteResults, unnamed

NOT_ON_RECORD = "not on record"


@dataclass(frozen=True)
class Point:
    """A variant on a task.

    Attributes:
        name: its label; the baseline's says its values of a grid's factors.
        reason: why there is no row, "" where there is one.
    """

    declared: AblationPoint
    name: str
    row: Row | None
    reason: str

    @property
    def task(self) -> str:
        """Without its suite."""
        return self.declared.task.partition("/")[2]


@dataclass(frozen=True)
class AblationResults:
    """An ablation at one preset, in the order of its declaration."""

    record: AblationRecord
    points: tuple[Point, ...]

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def preset(self) -> str:
        return self.record.preset

    @property
    def rows(self) -> list[Row]:
        return [point.row for point in self.points if point.row]

    @property
    def suites(self) -> list[str]:
        return sorted({point.declared.task.partition("/")[0] for point in self.points})

    def of_task(self, task: str) -> list[Point]:
        """The points of a task named with its suite."""
        return [point for point in self.points if point.declared.task == task]

    @property
    def tasks(self) -> list[str]:
        """With their suites."""
        return list(dict.fromkeys(point.declared.task for point in self.points))

    @cached_property
    def variants(self) -> dict[str, Point]:
        """Every cell with a row that is compared, by its digest; the baseline's are none."""
        own = {point.row.cell for point in self.points if point.row and not point.declared.variant}
        return {
            point.row.cell: point
            for point in self.points
            if point.row and point.row.cell not in own
        }

    @cached_property
    def pairs(self) -> dict[str, Pair]:
        """Every variant against its task's baseline, by cell; Holm's family is the ablation."""
        baselines = {
            point.declared.task: point.row for point in self.points if not point.declared.variant
        }
        matches = [(each.row, baselines.get(each.declared.task)) for each in self.variants.values()]
        found = against((row, baseline) for row, baseline in matches if row)
        return {pair.row.cell: pair for pair in found}


def ablations(
    results: Path, suites: Sequence[SuiteResults], skipped: list[str]
) -> list[AblationResults]:
    """Every ablation on record, and in `skipped` a line for each that could not be read."""
    rows = {cell: row for suite in suites for row in suite.rows for cell in row.cells}
    older = {cell for suite in suites for row in suite.older for cell in row.cells}

    def point(record: AblationRecord, declared: AblationPoint) -> Point:
        row = rows.get(declared.cell or "")
        reason = "" if row else declared.reason or NOT_ON_RECORD
        if declared.cell in older:
            reason = "of an older version of the task or the model"
        return Point(declared, declared.variant or _baseline(record, declared), row, reason)

    return [
        AblationResults(record, tuple(point(record, each) for each in record.points))
        for record in scan(
            results, AblationRecord, skipped, lambda each: unnamed(each.name, each.preset)
        )
    ]


def _baseline(record: AblationRecord, declared: AblationPoint) -> str:
    """Its values of a grid's factors, or else its model."""
    own = declared.factors if "grid" in record.declaration else {}
    values = ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in own.items())
    return f"{values or record.model} (baseline)"
