"""What tasks and models agree on: the shape of a problem and of a batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

IGNORED = -100
"""The label of a position where nothing is asked."""


@dataclass(frozen=True)
class ProblemSpec:
    """All that a model needs to know of a task.

    Attributes:
        input: "tokens" (integer ids below `vocab_size`) or "values" (`channels` floats a step).
        classes: number of classes to choose from.
        max_length: the longest sequence in steps.
        towers: sequences per example; 2 means that both are encoded alike and compared.
        output: one label a "sequence", or one a "token" (-100 where nothing is asked).
    """

    input: Literal["tokens", "values"]
    classes: int
    max_length: int
    vocab_size: int = 0
    channels: int = 0
    towers: int = 1
    output: Literal["sequence", "token"] = "sequence"


@dataclass(frozen=True)
class Batch:
    """Examples, right-padded to a common length. An example of two towers takes two adjacent rows.

    Attributes:
        inputs: (rows, length) int64 for tokens, (rows, length, channels) float32 for values, with
            rows = examples * towers.
        labels: (examples,) int64, or (examples, length) int64 with -100 where nothing is asked.
        lengths: (rows,) int64, at least 1, or None where every row fills the length.
    """

    inputs: Tensor
    labels: Tensor
    lengths: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        lengths = None if self.lengths is None else self.lengths.to(device)
        return replace(
            self, inputs=self.inputs.to(device), labels=self.labels.to(device), lengths=lengths
        )

    @property
    def tokens(self) -> int:
        """Real (unpadded) steps in the batch, all rows together."""
        if self.lengths is not None:
            return int(self.lengths.sum())
        return self.inputs.shape[0] * self.inputs.shape[1]
