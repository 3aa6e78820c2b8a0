"""What a set of answers is worth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexbench.interface import IGNORED, ProblemSpec
from flexbench.tasks.base import Split

CHUNK = 256


@dataclass(frozen=True)
class Answers:
    """A model's answers to a split, one for every asked position in order.

    Attributes:
        loss: mean cross-entropy.
        labels, chosen: (asked,) int64, the right class and the model's.
    """

    loss: float
    labels: np.ndarray
    chosen: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        """(asked,) bool."""
        return self.labels == self.chosen


def accuracy(answers: Answers) -> float:
    return float(answers.correct.mean())


def asked(split: Split, spec: ProblemSpec) -> int | tuple[int, ...]:
    """Positions asked in each example of a split, in order; one number where all ask as many."""
    if spec.output == "sequence":
        return 1
    counts: list[int] = []
    for start in range(0, len(split), CHUNK):
        batch = split.batch(np.arange(start, min(start + CHUNK, len(split))))
        counts += (batch.labels != IGNORED).sum(1).tolist()
    return counts[0] if len(set(counts)) == 1 else tuple(counts)


def matthews(answers: Answers) -> float:
    """Matthews' correlation of labels and answers, for any number of classes (Gorodkin 2004):
    -1 to 1, and 0 where either is one class throughout.
    """
    size = 1 + max(answers.labels.max(), answers.chosen.max())
    truth = np.bincount(answers.labels, minlength=size) / len(answers.labels)
    guess = np.bincount(answers.chosen, minlength=size) / len(answers.labels)
    spread = (1 - truth @ truth) * (1 - guess @ guess)
    return float((accuracy(answers) - truth @ guess) / np.sqrt(spread)) if spread > 0 else 0.0


def f1(answers: Answers) -> float:
    """F1 of class 1, 0 where it is neither there nor chosen."""
    labels, chosen = answers.labels == 1, answers.chosen == 1
    either = int(labels.sum() + chosen.sum())
    return 2 * int((labels & chosen).sum()) / either if either else 0.0


def scores(answers: Answers, spec: ProblemSpec) -> dict[str, float]:
    """Every score that a problem of this shape has, by name."""
    found = {"accuracy": accuracy(answers)}
    if spec.output == "sequence":
        found["mcc"] = matthews(answers)
        if spec.classes == 2:
            found["f1"] = f1(answers)
    return found
