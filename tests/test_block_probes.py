"""The probes that Flexible Block Mamba is asked: labels and layouts against plain loops."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from flexbench.errors import UserError
from flexbench.tasks.probes.hindsight import AFTER, BEFORE, VALUES, Hindsight
from flexbench.tasks.probes.needles import CLASSES, MARKER, SYMBOLS, Needles


@pytest.mark.parametrize(("length", "block"), [(512, 16), (256, 4), (1024, 64)])
def test_needles(length, block):
    task = Needles(length=length, block=block)
    tokens, labels = task.make(np.random.default_rng(0), 50)
    assert tokens.shape == (50, length)
    informative = task.informative(tokens)
    for row, label, told in zip(tokens.tolist(), labels, informative, strict=True):
        payloads, blocks = [], set()
        for t in range(length - len(MARKER)):
            if tuple(row[t : t + len(MARKER)]) == MARKER:
                payloads.append(row[t + len(MARKER)])
                blocks.add(t // block)
                assert t // block == (t + len(MARKER)) // block, "a needle lies in one block"
        chance = [p for p in payloads if p >= CLASSES]
        assert len(payloads) - len(chance) >= length // block // 4
        assert blocks == set(np.flatnonzero(told))
        counts = Counter(payloads).most_common()
        assert counts[0][0] == label
        assert counts[0][1] > counts[1][1]
    assert abs(informative.mean() - 0.25) < 0.01
    assert informative.mean(0).min() > 0, "they move"


def test_a_marker_s_symbols_tell_nothing_by_themselves():
    tokens, labels = Needles().make(np.random.default_rng(0), 2000)
    shares = np.bincount(tokens.ravel(), minlength=SYMBOLS) / tokens.size
    assert shares.min() > 0.9 / SYMBOLS
    assert np.bincount(labels, minlength=CLASSES).min() > 400


def test_hindsight():
    task = Hindsight()
    tokens, labels = task.make(np.random.default_rng(0), 100)
    asked = {BEFORE: 0, AFTER: 0}
    for row, answer in zip(
        tokens.reshape(-1, task.block), labels.reshape(-1, task.block), strict=True
    ):
        (query,) = [t for t, token in enumerate(row) if token in (BEFORE, AFTER)]
        values = [t for t, token in enumerate(row) if token < VALUES]
        before, after = [t for t in values if t < query], [t for t in values if t > query]
        assert len(before) == len(after) == 1
        assert answer[query] == row[(before if row[query] == BEFORE else after)[0]]
        assert (np.delete(answer, query) == -100).all()
        asked[row[query]] += 1
    assert abs(asked[BEFORE] / sum(asked.values()) - 0.5) < 0.05


def test_sizes_that_do_not_fit_are_one_sentence():
    with pytest.raises(UserError, match="multiple of 16 blocks"):
        Needles.parse({"length": 500})
    with pytest.raises(UserError, match="multiple of block"):
        Hindsight.parse({"length": 250})
