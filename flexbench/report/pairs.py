"""Every model against the baseline, on the seeds that both ran."""

from __future__ import annotations

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
    """A model minus the baseline; `adjusted_p` is Holm's over all pairs of the suite and preset."""

    row: Row
    baseline: Row
    comparison: Comparison
    adjusted_p: float | None

    @property
    def verdict(self) -> Verdict:
        return self.comparison.verdict(self.adjusted_p)


def pairs(suite: SuiteResults) -> list[Pair]:
    """The comparisons of a suite at one preset, in the order of its rows."""
    found = []
    for row in suite.rows:
        baseline = suite.baseline_of(row)
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
    ours = [row.correct.get(seed) for seed in seeds]
    theirs = [baseline.correct.get(seed) for seed in seeds]
    known = [array for array in ours + theirs if array is not None]
    if (
        len(known) < 2 * len(seeds)
        or len({array.size for array in known}) != 1
        or not known[0].size
    ):
        return None
    return paired_bootstrap(np.stack(known[: len(seeds)]), np.stack(known[len(seeds) :]))
