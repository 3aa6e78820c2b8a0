"""Splits against plain loops, and trivial predictors against data whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexbench.interface import Batch, ProblemSpec
from flexbench.tasks import trivial
from flexbench.tasks.arrays import Ragged, TokenSplit, ValueSplit, hold_out, to_ragged
from flexbench.tasks.base import TaskData
from flexbench.tasks.store import DataSource

sequences = st.lists(st.lists(st.integers(1, 255), min_size=0, max_size=9), min_size=1, max_size=6)


@given(
    sequences,
    st.data(),
    st.integers(1, 2),
    st.sampled_from(["head", "tail"]),
    st.none() | st.integers(2, 8),
    st.booleans(),
)
def test_token_batches_equal_a_plain_loop(lists, data, towers, crop, max_length, ends):
    end = 2 if ends else None
    if not ends:
        lists = [sequence or [1] for sequence in lists]
    numbers = st.integers(0, len(lists) - 1)
    which = data.draw(st.lists(st.lists(numbers, min_size=towers, max_size=towers), min_size=1))
    labels = np.arange(len(which)) % 3
    indices = data.draw(st.lists(st.integers(0, len(which) - 1), min_size=1, max_size=5))
    ragged = to_ragged([np.array(sequence, dtype=np.uint8) for sequence in lists])
    split = TokenSplit(ragged, labels, np.array(which), max_length, crop, end)
    batch = split.batch(np.array(indices))

    rows = []
    for index in indices:
        for number in which[index]:
            row = lists[number]
            room = None if max_length is None else max_length - ends
            if room is not None and len(row) > room:
                row = row[:room] if crop == "head" else row[len(row) - room :]
            rows.append(row + [2] * ends)
    longest = max(map(len, rows))
    assert batch.inputs.dtype == torch.int64
    assert batch.inputs.tolist() == [row + [0] * (longest - len(row)) for row in rows]
    assert batch.lengths.tolist() == [len(row) for row in rows]
    assert batch.labels.tolist() == [labels[index] for index in indices]


def test_rows_of_one_length_need_no_lengths():
    rows = np.arange(12, dtype=np.uint16).reshape(3, 4)
    batch = TokenSplit(rows, np.array([0, 1, 2])).batch(np.array([2, 0]))
    assert batch.inputs.tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]
    assert batch.lengths is None


def test_batches_read_memory_maps_without_loading_them(tmp_path):
    np.save(tmp_path / "flat.npy", np.arange(1, 100, dtype=np.uint8))
    flat = np.load(tmp_path / "flat.npy", mmap_mode="r")
    split = TokenSplit(Ragged(flat, np.array([0, 60, 99])), np.array([0, 1]), max_length=3)
    assert isinstance(split.sequences.flat, np.memmap)
    assert split.batch(np.array([1])).inputs.tolist() == [[61, 62, 63]]


def test_values_are_scaled_and_have_one_channel():
    values = np.array([[0, 255], [51, 102], [1, 2]], dtype=np.uint8)
    split = ValueSplit(values, np.array([4, 5]), np.array([1, 0]), scale=2 / 255, shift=-1)
    batch = split.batch(np.array([0, 1]))
    assert batch.inputs.shape == (2, 2, 1)
    assert batch.inputs.dtype == torch.float32
    np.testing.assert_allclose(batch.inputs[..., 0], [[-0.6, -0.2], [-1.0, 1.0]], atol=1e-6)
    assert batch.labels.tolist() == [4, 5]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(0, 5))
def test_hold_out_keeps_every_class_in_proportion(labels, seed):
    labels = np.array(labels)
    kept, held = hold_out(labels, 0.25, seed)
    assert sorted([*kept, *held]) == list(range(len(labels)))
    for label in np.unique(labels):
        assert (labels[held] == label).sum() == round(0.25 * (labels == label).sum())
    assert [part.tolist() for part in hold_out(labels, 0.25, seed)] == [
        kept.tolist(),
        held.tolist(),
    ]


def task_data(train, test, spec: ProblemSpec) -> TaskData:
    return TaskData(spec, train, train, test, DataSource("synthetic"))


def counted(seed: int, examples: int) -> TokenSplit:
    """Label 1: more tokens 5 than tokens 6; lengths vary and tell nothing."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(20, 40, examples)
    rows = [generator.integers(3, 7, length).astype(np.uint8) for length in lengths]
    labels = np.array([(row == 5).sum() > (row == 6).sum() for row in rows], dtype=np.uint8)
    return TokenSplit(to_ragged(rows), labels)


def test_linear_on_counts_finds_what_counts_tell():
    data = task_data(counted(0, 2000), counted(1, 500), ProblemSpec("tokens", 2, 40, vocab_size=8))
    score = trivial.linear(data)
    assert score > 0.95
    assert trivial.linear(data) == score


def test_padding_is_not_counted():
    inputs = torch.tensor([[0, 3, 0, 0], [3, 3, 5, 0]])
    features = trivial.counts(Batch(inputs, torch.zeros(2), torch.tensor([2, 4])), 6)
    expected = [[1, 0, 0, 1, 0, 0], [1, 0, 0, 2, 0, 1]]
    torch.testing.assert_close(features[:, :6], torch.tensor(expected).float().log1p())


def test_linear_on_pairs_finds_equal_counts():
    def pairs(seed: int, examples: int) -> TokenSplit:
        generator = np.random.default_rng(seed)
        rows, labels = [], []
        for _ in range(examples):
            first = generator.choice(6, 30, p=generator.dirichlet(np.ones(6))) + 1
            alike = generator.random() < 0.5
            second = (
                generator.permutation(first)
                if alike
                else generator.choice(6, 30, p=generator.dirichlet(np.ones(6))) + 1
            )
            rows += [first.astype(np.uint8), second.astype(np.uint8)]
            labels.append(alike)
        return TokenSplit(np.array(rows), np.array(labels), np.arange(2 * examples).reshape(-1, 2))

    spec = ProblemSpec("tokens", 2, 30, vocab_size=8, towers=2)
    assert trivial.linear(task_data(pairs(0, 1500), pairs(1, 300), spec)) > 0.95


def test_linear_on_values_finds_brightness_and_majority_the_commonest():
    generator = np.random.default_rng(0)
    labels = (np.arange(600) % 3 == 0).astype(np.uint8)
    values = generator.integers(0, 200, (600, 16)).astype(np.uint8) + (50 * labels)[:, None]
    split = ValueSplit(values.astype(np.uint8), labels, scale=1 / 61, shift=-2)
    data = task_data(split, split, ProblemSpec("values", 2, 16, channels=1))
    assert trivial.linear(data) > 0.9
    assert trivial.majority(split, split) == pytest.approx(2 / 3)
