"""The two-sided probes: labels by a plain loop, and answers that only the marked digits tell."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbench.tasks.base import registry, suites
from flexbench.tasks.probes.two_sided import (
    AFTER,
    BEFORE,
    IGNORED,
    MARKED,
    SUM,
    BothSides,
    EitherSide,
    TwoSided,
    neighbours,
)
from flexbench.tasks.store import Store

KINDS: list[type[TwoSided]] = [EitherSide, BothSides]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=["either-side", "both-sides"])


def label(row: list[int], place: int) -> int:
    """The answer at one place, by looking left and right."""

    def search(places: range) -> int | None:
        return next((row[p] - MARKED for p in places if MARKED <= row[p] < BEFORE), None)

    if row[place] < BEFORE:
        return IGNORED
    before, after = search(range(place - 1, -1, -1)), search(range(place + 1, len(row)))
    assert before is not None
    assert after is not None
    return {BEFORE: before, AFTER: after, SUM: (before + after) % 10}[row[place]]


@each_kind
@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(4, 60),
    marks=st.floats(0.01, 0.5),
    queries=st.floats(0.01, 0.5),
    seed=st.integers(0, 2**20),
)
def test_labels_are_those_of_a_plain_loop(kind, length, marks, queries, seed):
    task = kind(length=length, marks=marks, queries=queries)
    tokens, labels = task.make(np.random.default_rng(seed), 4)
    assert tokens.shape == labels.shape == (4, length)
    assert tokens.min() >= 0
    assert tokens.max() < task.spec.vocab_size
    for row, wanted in zip(tokens.tolist(), labels.tolist(), strict=True):
        assert [label(row, place) for place in range(length)] == wanted


@each_kind
def test_shares_are_those_asked_for(kind):
    tokens, labels = kind(length=200, marks=0.3, queries=0.2).make(np.random.default_rng(0), 500)
    assert (tokens >= BEFORE).mean() == pytest.approx(0.2, abs=0.02)
    assert ((tokens >= MARKED) & (tokens < BEFORE)).mean() == pytest.approx(0.3, abs=0.02)
    answers = labels[labels != IGNORED]
    assert np.bincount(answers, minlength=10) / len(answers) == pytest.approx(0.1, abs=0.01)


@each_kind
def test_the_answer_is_in_the_marked_digits_and_nowhere_else(kind):
    """Another pair of marked neighbours gives another answer; plain digits say nothing."""
    rng = np.random.default_rng(1)
    tokens, labels = kind(length=40).make(rng, 200)
    plain = tokens < MARKED
    other = np.where(plain, rng.integers(0, 10, tokens.shape), tokens)
    assert np.array_equal(neighbours(other)[0], neighbours(tokens)[0])
    marked = (tokens >= MARKED) & (tokens < BEFORE)
    shifted = np.where(marked, MARKED + (tokens - MARKED + 1) % 10, tokens)
    asked = labels != IGNORED
    step = np.where(tokens == SUM, 2, 1)
    moved = [[label(row, p) for p in range(40)] for row in shifted.tolist()]
    assert np.array_equal(np.array(moved)[asked], ((labels + step) % 10)[asked])


def test_a_sum_cannot_be_told_from_one_side():
    tokens, labels = BothSides(length=64, hints=0.0).make(np.random.default_rng(2), 4000)
    asked = labels != IGNORED
    for side in neighbours(tokens):
        table = np.zeros((10, 10))
        np.add.at(table, (side[asked], labels[asked]), 1)
        shares = table / table.sum(1, keepdims=True)
        assert np.abs(shares - 0.1).max() < 0.04


def test_sums_alone_are_examined():
    data = BothSides(validation=20, test=30).load(Store(offline=True))
    for split, size in ((data.validation, 20), (data.test, 30)):
        assert len(split) == size
        tokens = split.batch(np.arange(size)).inputs
        assert set(tokens[tokens >= BEFORE].tolist()) == {SUM}
    tokens = data.train.batch(np.arange(30)).inputs
    assert set(tokens[tokens >= BEFORE].tolist()) == {BEFORE, AFTER, SUM}


def test_every_token_has_a_name():
    task = EitherSide()
    names = task.symbols(Store(offline=True))
    assert len(names) == len(set(names)) == task.spec.vocab_size
    assert (names[7], names[MARKED + 7], names[SUM]) == ("7", "[7]", "+")


def test_trivial_predictors_are_what_they_must_be():
    store = Store(offline=True)
    one_sided = EitherSide()
    found = one_sided.trivial_predictors(one_sided.load(store))
    assert found["majority class"] == pytest.approx(0.1, abs=0.02)
    assert found["the digit before alone"] == pytest.approx(0.55, abs=0.03)
    both = BothSides()
    assert max(both.trivial_predictors(both.load(store)).values()) < 0.13


def test_the_suite_has_both():
    assert {"both-sides", "either-side"} <= set(suites()["probes"])
    for kind in KINDS:
        assert registry.get(kind.name) is kind
