"""Scores against their definitions by counting, and test sets beside a task's own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexbench.config import StackConfig
from flexbench.harness import plan
from flexbench.harness.scores import Answers, accuracy, asked, f1, matthews, scores
from flexbench.harness.trial import train_trial
from flexbench.interface import IGNORED, Batch, ProblemSpec
from flexbench.models import build, resolve
from flexbench.tasks.base import FurtherTest
from flexbench.tasks.store import Store


def answers(pairs: list[tuple[int, int]]) -> Answers:
    labels, chosen = np.array(pairs).T
    return Answers(0.0, labels, chosen)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=40))
def test_matthews_is_the_correlation_of_indicators(pairs):
    labels, chosen = (np.eye(4)[list(side)] for side in zip(*pairs, strict=True))
    truth, guess = labels - labels.mean(0), chosen - chosen.mean(0)
    spread = np.sqrt((truth**2).sum() * (guess**2).sum())
    expected = (truth * guess).sum() / spread if spread > 1e-9 else 0.0
    assert matthews(answers(pairs)) == pytest.approx(expected, abs=1e-9)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40))
def test_f1_is_the_harmonic_mean_of_precision_and_recall(pairs):
    hits = sum(pair == (1, 1) for pair in pairs)
    expected = 0.0
    if hits:
        precision = hits / sum(chosen for _, chosen in pairs)
        recall = hits / sum(label for label, _ in pairs)
        expected = 2 * precision * recall / (precision + recall)
    assert f1(answers(pairs)) == pytest.approx(expected)


def test_a_problem_has_the_scores_of_its_shape():
    some = answers([(0, 0), (1, 0), (1, 1), (1, 1)])
    two = ProblemSpec("tokens", classes=2, max_length=4, vocab_size=4)
    assert accuracy(some) == 0.75
    assert set(scores(some, two)) == {"accuracy", "mcc", "f1"}
    assert set(scores(some, replace(two, classes=3))) == {"accuracy", "mcc"}
    assert set(scores(some, replace(two, output="token"))) == {"accuracy"}


@pytest.mark.parametrize(("counts", "expected"), [([2, 0, 3], (2, 0, 3)), ([2, 2, 2], 2)])
def test_asked_positions_are_counted_by_example(monkeypatch, counts, expected):
    class Counted:
        def __len__(self):
            return len(counts)

        def batch(self, indices):
            labels = torch.full((len(indices), 4), IGNORED)
            for row, index in enumerate(indices):
                labels[row, : counts[index]] = 1
            return Batch(torch.zeros(len(indices), 4, dtype=torch.long), labels)

    monkeypatch.setattr("flexbench.harness.scores.CHUNK", 2)
    spec = ProblemSpec("tokens", classes=3, max_length=4, vocab_size=4, output="token")
    assert asked(Counted(), spec) == expected
    assert asked(Counted(), replace(spec, output="sequence")) == 1


@pytest.mark.parametrize("lengths", [None, [5, 3]])
def test_answers_are_the_asked_rows_of_the_logits(lengths):
    torch.manual_seed(0)
    spec = ProblemSpec("tokens", classes=3, max_length=5, vocab_size=4, output="token")
    model = build(spec, StackConfig(d_model=8, n_layers=1), resolve("mamba").parse({}))
    labels = torch.tensor([[IGNORED, 1, IGNORED, 2, 0], [IGNORED, IGNORED, 2, IGNORED, IGNORED]])
    inputs = torch.randint(0, 4, labels.shape)
    batch = Batch(inputs, labels, None if lengths is None else torch.tensor(lengths))
    torch.testing.assert_close(model.answers(batch), model(batch)[labels != IGNORED])


def test_further_tests_are_read_once_at_the_end_in_bounded_batches(toys, monkeypatch, tmp_path):
    sizes: list[int] = []
    load, batch = toys.Toy.load, toys.Rows.batch

    def longer(self, store):
        rows = toys.Rows(toys.Toy(length=80), 3, 30)
        return replace(load(self, store), further={"80": FurtherTest(rows, 80)})

    def logged(self, indices):
        if self.split == 3:
            sizes.append(len(indices))
        return batch(self, indices)

    monkeypatch.setattr(toys.Toy, "load", longer)
    monkeypatch.setattr(toys.Rows, "batch", logged)
    trial = plan("toy", models=["toys:Mixer"]).cells[0].grid[0]
    record = train_trial(trial, tmp_path, Store())
    room = trial.training.evaluation_batch_size * 8 // 80
    assert sizes == [room, room, 30 - 2 * room]
    assert 0 <= record.metrics["test_accuracy@80"] <= 1
    assert -1 <= record.metrics["test_mcc"] <= 1
