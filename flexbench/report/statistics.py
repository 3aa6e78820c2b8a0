"""What the seeds and the test examples say of an accuracy, and of the difference of two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.95
RESAMPLES = 2000
ROUNDING = 1e-12
"""A smaller deviation is rounding: accuracies are multiples of one over the test examples."""

Interval = tuple[float, float]
Verdict = Literal["win", "loss", "undecided"]


@dataclass(frozen=True)
class Summary:
    """Accuracies of one cell over its seeds, in [0, 1].

    Attributes:
        mean: over the seeds.
        sd: sample standard deviation (n - 1), None for one seed.
        n: number of seeds.
        interval: 95 % Student t interval of the mean, None for one seed.
    """

    mean: float
    sd: float | None
    n: int
    interval: Interval | None


def summarise(values: Sequence[float]) -> Summary:
    """Mean, standard deviation and 95 % t interval of at least one value."""
    n = len(values)
    ordered = np.sort(np.asarray(values, dtype=np.float64))  # the same sum in any order
    mean = float(ordered.mean())
    if n < 2:
        return Summary(mean, None, n, None)
    sd = float(ordered.std(ddof=1))
    if sd < ROUNDING:
        return Summary(mean, 0.0, n, (mean, mean))
    low, high = stats.t.interval(LEVEL, n - 1, loc=mean, scale=stats.sem(ordered))
    return Summary(mean, sd, n, (float(low), float(high)))


def proportion_interval(correct: int, total: int) -> Interval:
    """95 % Wilson score interval of a proportion: the noise of a finite test set."""
    low, high = stats.binomtest(correct, total).proportion_ci(LEVEL, method="wilson")
    return float(low), float(high)


@dataclass(frozen=True)
class Comparison:
    """A model minus the baseline on the seeds that both ran, in [-1, 1].

    Attributes:
        difference: mean of the differences seed by seed.
        interval: 95 % paired t interval over seeds. None for one seed, and where all seeds differ
            by the same and not by nothing: t has no value there.
        p: two-sided p-value of the paired t test, None where there is no interval.
        n: number of shared seeds.
        bootstrap: 95 % percentile interval of the paired bootstrap over seeds and test examples
            (over examples alone for one seed); None where the examples were not kept.
    """

    difference: float
    interval: Interval | None
    p: float | None
    n: int
    bootstrap: Interval | None = None

    def verdict(self, adjusted_p: float | None) -> Verdict:
        """A win or a loss only where the interval is clear of zero and `adjusted_p` < 0.05."""
        if self.interval is None or adjusted_p is None or adjusted_p >= 1 - LEVEL:
            return "undecided"
        low, high = self.interval
        return "win" if low > 0 else "loss" if high < 0 else "undecided"


def compare(
    model: Sequence[float], baseline: Sequence[float], bootstrap: Interval | None = None
) -> Comparison:
    """Paired comparison of accuracies, the same seed at the same place in both."""
    if len(model) != len(baseline) or not len(model):
        raise ValueError("a paired comparison needs equally many values, at least one")
    summary = summarise([a - b for a, b in zip(model, baseline, strict=True)])
    interval, p = summary.interval, None
    if summary.sd:
        p = float(stats.ttest_rel(model, baseline).pvalue)
    elif abs(summary.mean) >= ROUNDING:
        interval = None
    elif interval:
        p = 1.0
    return Comparison(summary.mean, interval, p, summary.n, bootstrap)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment (1979) of the p-values of one family; None stays None."""
    ranked = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(ranked):
        largest = max(largest, min(1.0, (len(ranked) - rank) * p))
        adjusted[place] = largest
    return adjusted


def paired_bootstrap(
    model: NDArray[np.bool_],
    baseline: NDArray[np.bool_],
    asked: NDArray[np.int64],
    resamples: int = RESAMPLES,
) -> Interval:
    """95 % percentile interval of the difference of two accuracies.

    Each resample draws seeds and, independently, test examples with replacement, the same ones for
    both models; with one seed only the examples vary. An example is drawn with all of its answers,
    which err together. The draws are fixed, so the same arrays give the same interval.

    Args:
        model, baseline: (seeds, answers), whether each was correct, those of an example together.
        asked: (examples,), answers of each example, in order.
    """
    if model.shape != baseline.shape or model.ndim != 2 or not model.size:
        raise ValueError("the bootstrap needs two equal, non-empty (seeds, answers) arrays")
    if asked.sum() != model.shape[1]:
        raise ValueError(f"{model.shape[1]} answers to {asked.sum()} questions")
    difference = model.astype(np.float64) - baseline.astype(np.float64)
    sizes = asked[asked > 0]
    seeds, examples = len(difference), len(sizes)
    sums = np.add.reduceat(difference, np.cumsum(sizes) - sizes, axis=1)
    random = np.random.default_rng(0)
    draws = np.empty(resamples)
    for i in range(resamples):
        times = np.bincount(random.integers(examples, size=examples), minlength=examples)
        chosen = sums[random.integers(seeds, size=seeds)]
        draws[i] = (chosen @ times).mean() / (sizes @ times)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)
