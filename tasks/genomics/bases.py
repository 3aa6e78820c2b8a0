"""Bases as ids: 0 is N and pads, then A, C, G, T; reverse complements."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from flexbench.interface import Batch
from flexbench.tasks.base import Split

LETTERS = "NACGT"
COMPLEMENT = np.array([0, 4, 3, 2, 1], dtype=np.uint8)

_CODES = np.zeros(256, dtype=np.uint8)
for _code, _letter in enumerate(LETTERS):
    _CODES[[ord(_letter), ord(_letter.lower())]] = _code


def encode(sequence: bytes) -> np.ndarray:
    """Ids of ASCII bases, of either case; whatever is not A, C, G or T is N: (length,) uint8."""
    return _CODES[np.frombuffer(sequence, dtype=np.uint8)]


class EitherStrand:
    """A split in which, each time, half of the sequences at random are read from the other strand.

    Which ones follows from the whole batch's indices, so that a step replays and another epoch
    chooses anew.
    """

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def batch(self, indices: np.ndarray) -> Batch:
        batch = self.split.batch(indices)
        rows, length = batch.inputs.shape
        flip = np.random.default_rng(np.asarray(indices)).random(rows) < 0.5
        flipped = reverse_complement(batch)
        chosen = torch.from_numpy(flip)[:, None].expand(rows, length)
        return replace(batch, inputs=torch.where(chosen, flipped.inputs, batch.inputs))


def reverse_complement(batch: Batch) -> Batch:
    """The other strand of every sequence, padding still on the right."""
    rows, length = batch.inputs.shape
    lengths = torch.full((rows,), length) if batch.lengths is None else batch.lengths
    places = lengths[:, None] - 1 - torch.arange(length)
    turned = batch.inputs.gather(1, places.clamp_min(0))
    complement = torch.from_numpy(COMPLEMENT.astype(np.int64))
    return replace(batch, inputs=torch.where(places >= 0, complement[turned], 0))
