"""Every model, or every change of an ablation, against its baseline on the seeds that both ran."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from flexbench.report.results import Row, SuiteResults
from flexbench.report.statistics import (
    Comparison,
    Interval,
    Verdict,
    compare,
    holm,
    paired_bootstrap,
)


@dataclass(frozen=True)
class Pair:
    """A row minus its baseline; `adjusted_p` is Holm's over all pairs of the table."""

    row: Row
    baseline: Row
    comparison: Comparison
    adjusted_p: float | None

    @property
    def verdict(self) -> Verdict:
        return self.comparison.verdict(self.adjusted_p)


def pairs(suite: SuiteResults) -> list[Pair]:
    """The comparisons of a suite at one preset, in the order of its rows.

    Variants that an ablation compares with a baseline of its own are left to it.
    """
    rows = [row for row in suite.rows if row.cell not in suite.ablated]
    return against((row, suite.baseline_of(row)) for row in rows)


def against(matches: Iterable[tuple[Row, Row | None]]) -> list[Pair]:
    """Each row against its baseline, where there is one and they share a finished seed."""
    found = []
    for row, baseline in matches:
        shared = sorted(row.accuracies.keys() & baseline.accuracies.keys()) if baseline else []
        if baseline and shared:
            comparison = compare(
                [row.accuracies[seed] for seed in shared],
                [baseline.accuracies[seed] for seed in shared],
                _bootstrap(row, baseline, shared),
            )
            found.append((row, baseline, comparison))
    adjusted = holm([comparison.p for _, _, comparison in found])
    return [Pair(*each, p) for each, p in zip(found, adjusted, strict=True)]


def _bootstrap(row: Row, baseline: Row, seeds: list[int]) -> Interval | None:
    """None where the answers, or whose they are, were not kept or are not of the same test set."""
    if row.config.task_options != baseline.config.task_options:
        return None
    answers = [each.correct.get(seed) for each in (row, baseline) for seed in seeds]
    known = [array for array in answers if array is not None]
    if (
        len(known) < 2 * len(seeds)
        or len({array.size for array in known}) != 1
        or not known[0].size
        or row.asked is None
        or row.asked.sum() != known[0].size
    ):
        return None
    ours, theirs = np.stack(known[: len(seeds)]), np.stack(known[len(seeds) :])
    return paired_bootstrap(ours, theirs, row.asked)
