"""Predictors that learn next to nothing: what a score must beat before it means anything.

Each is fitted on (a part of) the training split and scored on the test split; all deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from flexbench.interface import IGNORED, Batch, ProblemSpec
from flexbench.tasks.base import Split, TaskData

FIT_EXAMPLES = 20_000
CHUNK = 256

Features = Callable[[Batch], Tensor]


def majority(train: Split, test: Split) -> float:
    """Test accuracy of always answering the commonest class of the training split.

    Every label is read, at most `FIT_EXAMPLES` of the training split, evenly spaced.
    """
    train_labels = torch.cat([_asked(batch) for batch in _chunks(train)])
    test_labels = torch.cat([_asked(batch) for batch in _chunks(test, len(test))])
    commonest = torch.bincount(train_labels).argmax()
    return float((test_labels == commonest).double().mean())


def one_answer(test: Split, answer: Callable[[Tensor], Tensor]) -> float:
    """Test accuracy of one answer an example wherever it asks: `answer` takes inputs (examples,
    length) to (examples,).
    """
    right = []
    for batch in _chunks(test, len(test)):
        answers = answer(batch.inputs)[:, None].expand_as(batch.labels)
        right.append((answers == batch.labels)[batch.labels != IGNORED])
    return float(torch.cat(right).double().mean())


def commonest(test: Split, ids: range) -> float:
    """Test accuracy of answering an example's commonest token among `ids`, the lowest of equals."""

    def answer(tokens: Tensor) -> Tensor:
        counts = (tokens[:, :, None] == torch.arange(ids.start, ids.stop)).sum(1)
        return ids.start + counts.argmax(1)

    return one_answer(test, answer)


def linear(data: TaskData) -> float:
    """Test accuracy of a multinomial logistic regression on order-free features.

    The features are token counts (`counts`), for two towers how they compare (`pair_counts`), for
    values their histogram, mean and deviation (`value_statistics`).
    """
    return logistic_regression(data.train, data.test, features_for(data.spec), data.spec.classes)


def cosine(data: TaskData) -> float:
    """Test accuracy of a threshold on the cosine of two towers' `counts`: are the texts alike?

    The last feature of `pair_counts` alone: with a large vocabulary `linear` overfits the others.
    """
    return logistic_regression(
        data.train, data.test, lambda batch: pair_counts(batch, data.spec.vocab_size)[:, -1:], 2
    )


def features_for(spec: ProblemSpec) -> Features:
    """The order-free features that suit a problem."""
    if spec.input == "values":
        return value_statistics
    if spec.towers == 2:
        return lambda batch: pair_counts(batch, spec.vocab_size)
    return lambda batch: counts(batch, spec.vocab_size)


def counts(batch: Batch, vocab_size: int) -> Tensor:
    """log(1 + count) of every token, the logarithm of the length last: (rows, vocab + 1)."""
    weights = torch.ones(batch.inputs.shape)
    lengths = torch.full((len(batch.inputs),), batch.inputs.shape[1])
    if batch.lengths is not None:
        lengths = batch.lengths
        weights = (torch.arange(batch.inputs.shape[1]) < lengths[:, None]).float()
    table = torch.zeros(len(batch.inputs), vocab_size).scatter_add_(1, batch.inputs, weights)
    return torch.cat([table.log1p(), lengths[:, None].float().log()], dim=1)


def pair_counts(batch: Batch, vocab_size: int) -> Tensor:
    """Product and absolute difference of the towers' `counts`, and the cosine of the two."""
    first, second = counts(batch, vocab_size).unflatten(0, (-1, 2)).unbind(1)
    cosine = torch.nn.functional.cosine_similarity(first, second)[:, None]
    return torch.cat([first * second, (first - second).abs(), cosine], dim=1)


def value_statistics(batch: Batch) -> Tensor:
    """A histogram of 32 bins over the values (clipped to [-3, 3]), their mean and deviation:
    (examples, 34), all channels together.
    """
    values = batch.inputs.flatten(1)
    bins = ((values.clamp(-3, 3) + 3) * (31 / 6)).round().long()
    histogram = torch.zeros(len(values), 32).scatter_add_(1, bins, torch.ones(values.shape))
    deviation, mean = torch.std_mean(values, dim=1, keepdim=True, correction=0)
    return torch.cat([histogram / values.shape[1], mean, deviation], dim=1)


def logistic_regression(train: Split, test: Split, features: Features, classes: int) -> float:
    """Test accuracy of a multinomial logistic regression (L2 1e-4, L-BFGS) on `features`.

    Fitted on at most `FIT_EXAMPLES` training examples, evenly spaced; features are standardised by
    them. Scored on the whole test split. Takes seconds.
    """
    rows, labels = _table(train, features, FIT_EXAMPLES)
    mean, deviation = rows.mean(0), rows.std(0, correction=0).clamp_min(1e-6)
    rows = (rows - mean) / deviation
    weight = torch.zeros(rows.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = rows @ weight + bias
        loss = torch.nn.functional.cross_entropy(logits, labels) + 1e-4 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    correct = 0
    with torch.no_grad():
        for batch in _chunks(test, len(test)):
            logits = (features(batch) - mean) / deviation @ weight + bias
            correct += int((logits.argmax(1) == batch.labels).sum())
    return correct / len(test)


def _asked(batch: Batch) -> Tensor:
    return batch.labels[batch.labels != IGNORED]


def _table(split: Split, features: Features, limit: int) -> tuple[Tensor, Tensor]:
    parts = [(features(batch), batch.labels) for batch in _chunks(split, limit)]
    return torch.cat([rows for rows, _ in parts]), torch.cat([labels for _, labels in parts])


def _chunks(split: Split, limit: int = FIT_EXAMPLES) -> Iterator[Batch]:
    size = min(limit, len(split))
    chosen = np.arange(size) * len(split) // size
    for start in range(0, size, CHUNK):
        yield split.batch(chosen[start : start + CHUNK])
