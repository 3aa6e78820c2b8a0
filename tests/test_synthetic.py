"""The synthetic tasks against plain loops: what is asked, what can be read, what is random."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexbench.config import PRESETS
from flexbench.errors import UserError
from flexbench.interface import IGNORED
from flexbench.tasks.base import registry, suites
from flexbench.tasks.store import Store
from flexbench.tasks.synthetic import distinct
from flexbench.tasks.synthetic.copying import Copying, SelectiveCopying
from flexbench.tasks.synthetic.induction import InductionHeads
from flexbench.tasks.synthetic.mad import (
    Compression,
    FuzzyRecall,
    InContextRecall,
    MADSelectiveCopying,
    Memorization,
    NoisyRecall,
)
from flexbench.tasks.synthetic.mqar import MQAR

STORE = Store(offline=True)

TASKS = [
    Copying(length=11, memorize=5, alphabet=7),
    SelectiveCopying(length=20, memorize=6, alphabet=9),
    InductionHeads(length=33, vocabulary=5),
    MQAR(length=64, pairs=7, vocabulary=120),
    InContextRecall(length=40, vocabulary=10),
    NoisyRecall(length=60, noise=0.4),
    FuzzyRecall(length=70),
    Memorization(length=31, vocabulary=21),
    Compression(length=9, vocabulary=4),
    MADSelectiveCopying(length=50, memorize=7, vocabulary=5),
]
"""One of each, with sizes that differ from one another, so that no axis is mistaken for another."""

each_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


def made(task, examples=40, seed=0):
    return task.make(np.random.default_rng(seed), examples)


def test_all_are_here():
    assert sorted(task.name for task in TASKS) == suites()["synthetic"]


# -- what is asked ---------------------------------------------------------------------------------


def recall(past, first_value, noise):
    """The value that followed the first showing of the motif of keys at the end of `past`."""
    keys, values, table, queried = [], [], {}, None
    for token in [*past, None]:
        if token is not None and token < first_value and values:
            table.setdefault(tuple(keys), values)
            keys, values = [], []
        if token is not None and token < first_value:
            keys.append(token)
        elif token is None:
            queried = tuple(keys)
        elif keys and token not in noise:
            values.append(token)
    return table[queried][len(values)]


def solve(task, past):
    """The label at the last of `past`, from these tokens alone."""
    now = past[-1]
    if isinstance(task, (Copying, SelectiveCopying)):
        return [token for token in past if 0 < token < task.alphabet - 1][
            past.count(task.alphabet - 1) - 1
        ]
    if isinstance(task, InductionHeads):
        return past[past.index(task.vocabulary) + 1]
    if isinstance(task, MQAR):
        return past[past[: 2 * task.pairs : 2].index(now) * 2 + 1]
    if isinstance(task, FuzzyRecall):
        return recall([token for token in past if token != task.ids - 1], task.vocabulary // 2, ())
    if isinstance(task, (InContextRecall, NoisyRecall)):
        noise = range(task.vocabulary, task.vocabulary + task.noise_ids)
        return recall([t for t in past if t not in noise], task.vocabulary // 2, noise)
    if isinstance(task, Memorization):
        table = np.random.default_rng(task.data_seed).permutation(task.answers)
        return table[past[-2]]
    if isinstance(task, Compression):
        return past[now - task.vocabulary - 1]
    assert isinstance(task, MADSelectiveCopying)
    mark = past.index(task.vocabulary + 1)
    return [token for token in past if token < task.vocabulary][len(past) - mark - 2]


@each_task
def test_every_label_follows_from_the_steps_up_to_it(task):
    tokens, labels = made(task)
    assert tokens.shape == labels.shape == (40, task.spec.max_length)
    assert 0 <= tokens.min() <= tokens.max() < task.spec.vocab_size
    assert labels.max() < task.spec.classes
    for row, wanted in zip(tokens.tolist(), labels.tolist(), strict=True):
        asked = [place for place, label in enumerate(wanted) if label != IGNORED]
        assert asked
        assert [solve(task, row[: place + 1]) for place in asked] == [wanted[p] for p in asked]


@each_task
def test_no_answer_stands_after_its_question(task):
    tokens, labels = made(task, 400)
    if isinstance(task, (InContextRecall, NoisyRecall, FuzzyRecall)):
        blank = task.vocabulary + (0 if isinstance(task, FuzzyRecall) else task.noise_ids)
        asked = np.argwhere(labels != IGNORED)
        inside = asked[asked[:, 1] + 1 < tokens.shape[1]]
        assert (tokens[inside[:, 0], inside[:, 1] + 1] == blank).all()
    elif isinstance(task, Memorization):
        assert not np.isin(tokens, task.answers).any()
    elif isinstance(task, MQAR):
        found = total = 0
        for row, place in np.argwhere(labels != IGNORED):
            found += (tokens[row, place + 1 :] == labels[row, place]).sum()
            total += tokens.shape[1] - place - 1
        assert found / total < 2 / task.vocabulary  # as often as any other id
    else:
        first = (labels != IGNORED).argmax(1).min()
        assert (tokens[:, first:] == tokens[0, first:]).all()


@given(
    length=st.integers(1, 12),
    memorize=st.integers(1, 9),
    alphabet=st.integers(3, 8),
    examples=st.integers(1, 5),
)
def test_copying_fits_any_size(length, memorize, alphabet, examples):
    for kind in (Copying, SelectiveCopying):
        task = kind(length=length, memorize=memorize, alphabet=alphabet)
        tokens, labels = made(task, examples)
        shown = tokens[:, : length + memorize]
        for row, wanted in zip(shown, labels[:, -memorize:], strict=True):
            assert row[row > 0].tolist() == wanted.tolist()
        assert (tokens[:, length + memorize :] == alphabet - 1).all()


def test_training_lengths_vary_between_batches_alone():
    for task, extra in (
        (SelectiveCopying(length=90, memorize=4, shortest=10), 8),
        (InductionHeads(length=90, shortest=10, ladder=(5,), ladder_examples=3), 0),
    ):
        data = task.load(STORE)
        batches = [data.train.batch(np.arange(8) + 8 * start) for start in range(60)]
        lengths = [batch.inputs.shape[1] - extra for batch in batches]
        assert min(lengths) < 20 < 60 < max(lengths)
        assert all(10 <= each <= 90 for each in lengths)
        assert all((batch.labels != IGNORED)[:, -1].all() for batch in batches)
        again = data.train.batch(np.arange(8))
        assert torch.equal(again.inputs, batches[0].inputs)
        assert data.validation.batch(np.arange(9)).inputs.shape[1] == 90 + extra
        for split in data.further.values():
            assert split.split.batch(np.arange(2)).inputs.shape[1] == 5
        for options in ({"shortest": 100}, {"fresh": False}):
            with pytest.raises(UserError, match="shortest must not exceed"):
                task.override(options)


def test_recall_asks_of_every_key_shown_before_and_of_one_at_the_end():
    tokens, labels = made(InContextRecall(length=40, vocabulary=10))
    keys = tokens[:, ::2]
    for row, asked in zip(keys.tolist(), labels[:, ::2], strict=True):
        assert [key in row[:i] for i, key in enumerate(row)] == (asked != IGNORED).tolist()
    assert (labels[:, -1] != IGNORED).all()
    assert (labels[:, 1::2] == IGNORED).all()


def test_a_share_of_pairs_is_noise():
    task = NoisyRecall(length=128)
    tokens, _ = made(task, 500)
    noisy = (tokens[:, ::2] >= task.vocabulary).mean()
    assert noisy == pytest.approx(0.2 * 62 / 64, abs=0.02)


# -- what is random --------------------------------------------------------------------------------


def test_distinct_draws_every_arrangement_alike():
    drawn = distinct(np.random.default_rng(0), 24_000, 3, 4)
    counts = Counter(map(tuple, drawn.tolist()))
    assert set(counts) == set(permutations(range(4), 3))
    assert max(abs(count - 1000) for count in counts.values()) < 4.5 * 1000**0.5


def test_slots_of_mqar_are_drawn_as_published():
    """Against numpy's sampling without replacement, which zoology calls a row at a time."""
    task, rows = MQAR(length=40, pairs=5, vocabulary=200), 8000
    tokens, labels = made(task, rows)
    keys = tokens[:, 0:10:2]
    asked = np.where(labels[:, 10::2] != IGNORED, tokens[:, 10::2], -1)
    ours = (asked[:, :, None] == keys[:, None, :]).mean(0)  # slot by number of the key
    weights = np.arange(1, 16) ** (0.01 - 1)
    generator = np.random.RandomState(1)
    theirs = np.zeros((15, 5))
    for _ in range(rows):
        slots = generator.choice(15, 5, replace=False, p=weights / weights.sum())
        theirs[slots, np.arange(5)] += 1 / rows
    np.testing.assert_allclose(ours, theirs, atol=5 * (2 * 0.25 / rows) ** 0.5)
    assert (np.sort(asked, 1)[:, :10] == -1).all()


def test_keys_and_values_of_mqar_never_repeat():
    tokens, _ = made(MQAR(length=64, pairs=16, vocabulary=40), 200)
    keys, values = tokens[:, 0:32:2], tokens[:, 1:32:2]
    for half, low, high in ((keys, 1, 19), (values, 20, 39)):
        assert low <= half.min() <= half.max() <= high
        assert all(len(set(row)) == 16 for row in half.tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 63}, "even length of at least 16"),
        ({"length": 64, "pairs": 17}, "at least 68"),
        ({"vocabulary": 8}, "more ids"),
    ],
)
def test_mqar_that_does_not_fit_is_one_sentence(options, message):
    with pytest.raises(UserError, match=message):
        MQAR.parse(options)


DIGESTS = {
    "copying": "36df6c458987",
    "selective-copying": "f75bd4a1bf00",
    "induction-heads": "81dbb36c2d00",
    "mqar": "8a5b9d56e82c",
    "mad-recall": "8620be2dad53",
    "mad-noisy-recall": "dcf835fbca37",
    "mad-fuzzy-recall": "e16e7f5e8233",
    "mad-memorization": "99cb407452c4",
    "mad-compression": "21c05d5cd245",
    "mad-selective-copying": "6760400d3812",
}


@each_task
def test_a_seed_gives_the_same_bits_everywhere(task):
    tokens, labels = made(task, 7, seed=3)
    content = np.concatenate([tokens, labels], axis=1).astype("<i8").tobytes()
    assert hashlib.sha256(content).hexdigest()[:12] == DIGESTS[task.name]


# -- splits ----------------------------------------------------------------------------------------


@each_task
def test_splits_differ(task):
    data = task.override({"validation": 20, "test": 20}).load(STORE)
    parts = [data.train, data.validation, data.test]
    rows = [split.batch(np.arange(20)).inputs.tolist() for split in parts]
    assert rows[0] != rows[1] != rows[2] != rows[0]


def test_a_fixed_training_set_is_seen_again():
    task = NoisyRecall(length=20, examples=30, fresh=False, validation=1, test=1)
    train = task.load(STORE).train
    assert len(train) == 30
    alone, among = train.batch(np.array([4])), train.batch(np.array([9, 4]))
    assert torch.equal(alone.inputs[0], among.inputs[1])
    assert torch.equal(alone.labels[0], among.labels[1])


def test_the_ladder_has_longer_tests_whatever_the_batch():
    data = InductionHeads(
        length=16, ladder=(64, 4096), ladder_examples=6, validation=1, test=1
    ).load(STORE)
    assert list(data.further) == ["64", "4096"]
    for length, test in ((64, data.further["64"]), (4096, data.further["4096"])):
        whole = test.split.batch(np.arange(6))
        parts = [test.split.batch(np.array([i])) for i in range(6)]
        assert whole.inputs.shape == (6, length) == (len(test.split), test.max_length)
        assert torch.equal(whole.inputs, torch.cat([part.inputs for part in parts]))
        assert torch.equal(whole.labels, torch.cat([part.labels for part in parts]))


@each_task
def test_chance_follows_the_options(task):
    _, labels = made(task, 4000)
    answers = len(set(labels[labels != IGNORED].tolist()))
    unused = isinstance(task, Memorization)  # a value more than there are keys
    assert task.chance_level() == pytest.approx(1 / (answers + unused))


@each_task
def test_trivial_predictors_know_little(task):
    scores = task.override({"examples": 2000, "test": 400}).load(STORE)
    found = task.trivial_predictors(scores)
    assert len(found) == 2
    assert all(0 <= score < 0.8 for score in found.values())


@pytest.mark.parametrize("name", suites()["synthetic"])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_or_left_out_with_a_reason(name, preset):
    task = registry.get(name)
    if preset in task.presets:
        assert task.parse(task.presets[preset].options).spec.max_length > 0
    else:
        assert task.omitted[preset]
