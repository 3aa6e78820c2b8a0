"""What every task of fresh examples promises, on one that is easy to see through."""

from typing import ClassVar

import numpy as np
import torch

from flexbench.interface import ProblemSpec
from flexbench.tasks.base import registry
from flexbench.tasks.generated import GeneratedTask
from flexbench.tasks.store import Store


class Parity(GeneratedTask):
    """Is the sum of ten bits odd?"""

    suite: ClassVar[str] = "toy"
    chance: ClassVar[float] = 0.5

    @property
    def spec(self):
        return ProblemSpec(input="tokens", classes=2, max_length=10, vocab_size=2)

    def make(self, rng, examples):
        tokens = rng.integers(0, 2, (examples, 10))
        return tokens, tokens.sum(1) % 2

    def trivial_predictors(self, data):
        return {}


def data(**options):
    return Parity(validation=50, test=70, **options).load(Store(offline=True))


def test_a_batch_follows_from_its_indices_and_the_seed():
    first, again, other = data(), data(), data(data_seed=1)
    indices = np.array([5, 3, 99])
    batch = first.train.batch(indices)
    assert torch.equal(batch.inputs, again.train.batch(indices).inputs)
    assert not torch.equal(batch.inputs, other.train.batch(indices).inputs)
    assert not torch.equal(batch.inputs, first.train.batch(np.array([5, 3, 98])).inputs)
    assert batch.labels.tolist() == (batch.inputs.sum(1) % 2).tolist()


def test_evaluation_sets_are_fixed_whatever_the_batch():
    one, two = data(), data()
    whole = one.test.batch(np.arange(70))
    parts = [two.test.batch(np.arange(i, i + 7)).inputs for i in range(0, 70, 7)]
    assert torch.equal(whole.inputs, torch.cat(parts))
    assert len(one.validation) == 50
    assert not torch.equal(one.validation.batch(np.arange(50)).inputs, whole.inputs[:50])
    assert one.source.kind == "synthetic"


def test_presets_leave_sixteen_blocks_in_a_sequence():
    for name in registry:
        kind = registry.get(name)
        if not issubclass(kind, GeneratedTask):
            continue
        for preset in kind.presets.values():
            task = kind.parse(preset.options)
            assert task.spec.max_length >= 15 * preset.l0, name
