"""Intervals and comparisons against cases worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from flexbench.report.statistics import (
    compare,
    holm,
    paired_bootstrap,
    proportion_interval,
    summarise,
)

shares = st.floats(0.0, 1.0, allow_nan=False)


def test_interval_of_three_seeds_by_hand() -> None:
    # mean 0.45, sd 0.05; t(0.975, 2 degrees) = 4.302653; half = 4.302653 * 0.05 / sqrt(3)
    summary = summarise([0.40, 0.45, 0.50])
    assert summary.mean == pytest.approx(0.45)
    assert summary.sd == pytest.approx(0.05)
    assert summary.interval == pytest.approx((0.45 - 0.124207, 0.45 + 0.124207), abs=1e-6)


def test_one_seed_has_no_interval() -> None:
    summary = summarise([0.4])
    assert (summary.mean, summary.sd, summary.n, summary.interval) == (0.4, None, 1, None)


@given(st.lists(shares, min_size=2, max_size=8), st.randoms(use_true_random=False))
def test_summary_ignores_order_and_covers_its_mean(values: list[float], random: object) -> None:
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert summarise(values) == summarise(shuffled)
    summary = summarise(values)
    assert summary.interval is not None
    assert summary.interval[0] <= summary.mean <= summary.interval[1]


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    hits = 0
    for sample in random.normal(0.5, 0.1, size=(2000, 4)):
        low, high = summarise(sample.tolist()).interval or (math.nan, math.nan)
        hits += low <= 0.5 <= high
    assert 0.935 <= hits / 2000 <= 0.965  # 95 %, plus or minus three standard errors


def test_wilson_interval_by_hand() -> None:
    # (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n) at p = 0.5, n = 100, z = 1.959964
    low, high = proportion_interval(50, 100)
    assert (low, high) == pytest.approx((0.403832, 0.596168), abs=1e-6)


def test_paired_comparison_by_hand() -> None:
    # differences .1 .2 .3: mean .2, sd .1, t = .2 / (.1 / sqrt 3) = 3.4641 with 2 degrees
    found = compare([0.5, 0.7, 0.9], [0.4, 0.5, 0.6])
    assert found.difference == pytest.approx(0.2)
    assert found.p == pytest.approx(0.0741799, abs=1e-6)
    assert found.interval == pytest.approx((-0.048414, 0.448414), abs=1e-6)
    assert found.verdict(found.p) == "undecided"


@given(st.lists(st.tuples(shares, shares), min_size=2, max_size=6))
def test_comparison_agrees_with_scipy_and_is_antisymmetric(
    pairs: list[tuple[float, float]],
) -> None:
    ours, theirs = map(list, zip(*pairs, strict=True))
    found, mirrored = compare(ours, theirs), compare(theirs, ours)
    assert found.difference == pytest.approx(-mirrored.difference, abs=1e-12)
    assert found.p == pytest.approx(mirrored.p, abs=1e-9) or found.p is mirrored.p is None
    differences = np.subtract(ours, theirs)
    if differences.std() > 1e-6:
        assert found.p == pytest.approx(stats.ttest_rel(ours, theirs).pvalue, rel=1e-6, abs=1e-9)


def test_equal_models_are_never_told_apart() -> None:
    found = compare([0.5, 0.6], [0.5, 0.6])
    assert (found.difference, found.p, found.interval) == (0.0, 1.0, (0.0, 0.0))
    assert found.verdict(found.p) == "undecided"


def test_the_same_difference_at_every_seed_has_no_t() -> None:
    found = compare([0.3, 0.7, 0.9], [0.2, 0.6, 0.8])  # the same but for rounding
    assert found.difference == pytest.approx(0.1)
    assert (found.interval, found.p) == (None, None)
    assert found.verdict(found.p) == "undecided"


def test_a_win_needs_both_the_interval_and_the_corrected_p() -> None:
    found = compare([0.50, 0.51, 0.52], [0.40, 0.409, 0.421])
    assert found.interval is not None
    assert found.interval[0] > 0
    assert found.verdict(0.01) == "win"
    assert found.verdict(0.06) == "undecided"
    assert found.verdict(None) == "undecided"
    loss = compare([0.40, 0.409, 0.421], [0.50, 0.51, 0.52])
    assert loss.verdict(0.01) == "loss"


def test_one_shared_seed_gives_a_difference_without_interval() -> None:
    found = compare([0.6], [0.5])
    assert found.difference == pytest.approx(0.1)
    assert (found.interval, found.p, found.n) == (None, None, 1)


def test_comparison_refuses_unpaired_values() -> None:
    with pytest.raises(ValueError, match="paired"):
        compare([0.5, 0.6], [0.5])


def test_holm_by_hand() -> None:
    # sorted .01 .03 .04 -> 3 * .01, max(.03, 2 * .03), max(.06, 1 * .04)
    assert holm([0.04, 0.01, None, 0.03]) == pytest.approx([0.06, 0.03, None, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(shares, min_size=1, max_size=10))
def test_holm_keeps_the_order_and_never_lowers_a_p(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    for raw, fixed in zip(p_values, adjusted, strict=True):
        assert fixed is not None
        assert raw <= fixed <= 1.0
    ranked = [adjusted[i] for i in np.argsort(p_values, kind="stable")]
    assert ranked == sorted(ranked)  # type: ignore[type-var]


answers = arrays(np.bool_, st.tuples(st.just(3), st.just(40)))


def ones(examples: int) -> np.ndarray:
    return np.ones(examples, np.int64)


@settings(max_examples=20, deadline=None)
@given(answers, answers)
def test_bootstrap_is_antisymmetric_and_repeatable(ours: np.ndarray, theirs: np.ndarray) -> None:
    asked = np.array([3, 0, 1, 16, 20])
    low, high = paired_bootstrap(ours, theirs, asked, resamples=200)
    assert (low, high) == paired_bootstrap(ours, theirs, asked, resamples=200)
    mirrored = paired_bootstrap(theirs, ours, asked, resamples=200)
    assert mirrored == pytest.approx((-high, -low), abs=1e-6)
    assert -1 <= low <= high <= 1


def test_bootstrap_over_examples_matches_the_normal_theory() -> None:
    random = np.random.default_rng(2)
    ours = random.random((1, 4000)) < 0.6
    theirs = random.random((1, 4000)) < 0.5
    difference = ours.astype(float) - theirs
    half = 1.96 * difference.std() / 4000**0.5
    low, high = paired_bootstrap(ours, theirs, ones(4000))
    assert low == pytest.approx(difference.mean() - half, abs=0.002)
    assert high == pytest.approx(difference.mean() + half, abs=0.002)


def test_bootstrap_widens_when_seeds_disagree() -> None:
    random = np.random.default_rng(3)
    theirs = random.random((4, 1000)) < 0.5
    alike = random.random((4, 1000)) < 0.6
    scattered = random.random((4, 1000)) < np.array([[0.4], [0.5], [0.7], [0.8]])
    narrow, wide = (paired_bootstrap(ours, theirs, ones(1000)) for ours in (alike, scattered))
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])


def test_bootstrap_of_a_model_with_itself_is_zero() -> None:
    one = np.random.default_rng(4).random((3, 50)) < 0.5
    assert paired_bootstrap(one, one, ones(50)) == (0.0, 0.0)


def test_bootstrap_refuses_different_test_sets() -> None:
    with pytest.raises(ValueError, match="equal"):
        paired_bootstrap(np.ones((2, 5), np.bool_), np.ones((2, 6), np.bool_), ones(5))
    with pytest.raises(ValueError, match="5 answers to 6 questions"):
        paired_bootstrap(np.ones((2, 5), np.bool_), np.ones((2, 5), np.bool_), ones(6))


def test_bootstrap_draws_an_example_with_all_of_its_answers() -> None:
    """Answers that are all alike within an example tell no more than one answer would."""
    random = np.random.default_rng(5)
    ours, theirs = random.random((2, 400)) < 0.6, random.random((2, 400)) < 0.5
    once = paired_bootstrap(ours, theirs, ones(400))
    repeated = (np.repeat(each, 9, axis=1) for each in (ours, theirs))
    assert paired_bootstrap(*repeated, 9 * ones(400)) == pytest.approx(once)


def test_longer_examples_weigh_more_in_the_bootstrap() -> None:
    """Half of the answers belong to one example of four: its draws decide the accuracy."""
    ours = np.array([[True] * 3 + [False] * 3])
    found = paired_bootstrap(ours, np.zeros_like(ours), np.array([1, 1, 1, 3]))
    thrice_of_four = 1 / (1 + 3 * 3)
    assert found == pytest.approx((thrice_of_four, 1.0))
