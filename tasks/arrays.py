"""Splits over memory-mapped arrays: batches by one vectorised gather, whatever the storage."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from flexbench.interface import Batch

Crop = Literal["head", "tail"]


class Ragged:
    """Sequences of different lengths, end to end.

    Args:
        flat: (total,) integers of any width; may be memory-mapped.
        offsets: (sequences + 1,) int64; sequence i is `flat[offsets[i] : offsets[i + 1]]`.
    """

    def __init__(self, flat: np.ndarray, offsets: np.ndarray) -> None:
        self.flat = flat
        self.offsets = np.asarray(offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def of_rows(cls, rows: np.ndarray) -> Ragged:
        """View (sequences, length) as sequences of one length."""
        count, length = rows.shape
        return cls(rows.reshape(-1), np.arange(count + 1, dtype=np.int64) * length)

    def gather(
        self, which: np.ndarray, max_length: int | None = None, crop: Crop = "head"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sequences `which`, right-padded with 0 to the longest, at most `max_length` of each.

        Returns:
            (rows, longest) int64 and the lengths, (rows,) int64.
        """
        starts = self.offsets[which]
        stops = self.offsets[which + 1]
        if max_length is not None:
            if crop == "head":
                stops = np.minimum(stops, starts + max_length)
            else:
                starts = np.maximum(starts, stops - max_length)
        lengths = stops - starts
        columns = np.arange(lengths.max())
        positions = np.minimum(starts[:, None] + columns, len(self.flat) - 1)
        real = columns < lengths[:, None]
        return np.where(real, self.flat[positions], 0).astype(np.int64), lengths


class TokenSplit:
    """Token sequences with one label an example.

    Args:
        sequences: ids, 0 being the pad; or (N, L) ids where all have one length.
        labels: (examples,) integers.
        which: (examples,) or (examples, towers): the sequences that make up an example, default
            sequence i for example i. A tower is a row of the batch, an example's rows adjacent.
        max_length: of a row, `end` included.
        crop: which part of a longer sequence is kept.
        end: id put after the last token of every row, if any.
    """

    def __init__(
        self,
        sequences: Ragged | np.ndarray,
        labels: np.ndarray,
        which: np.ndarray | None = None,
        max_length: int | None = None,
        crop: Crop = "head",
        end: int | None = None,
    ) -> None:
        self.fixed = isinstance(sequences, np.ndarray)
        self.sequences = (
            Ragged.of_rows(sequences) if isinstance(sequences, np.ndarray) else sequences
        )
        self.labels = np.asarray(labels)
        self.which = np.arange(len(self.labels)) if which is None else np.asarray(which)
        self.max_length = max_length
        self.crop = crop
        self.end = end

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray) -> Batch:
        """The examples at `indices`, in that order."""
        indices = np.asarray(indices)
        room = self.max_length
        if room is not None and self.end is not None:
            room -= 1
        tokens, lengths = self.sequences.gather(self.which[indices].reshape(-1), room, self.crop)
        if self.end is not None:
            tokens = np.pad(tokens, ((0, 0), (0, 1)))
            tokens[np.arange(len(tokens)), lengths] = self.end
            lengths = lengths + 1
        return Batch(
            inputs=torch.from_numpy(tokens),
            labels=torch.from_numpy(self.labels[indices].astype(np.int64)),
            lengths=None if self.fixed else torch.from_numpy(lengths),
        )


class ValueSplit:
    """Real-valued sequences of one length and one channel, stored as bytes.

    A byte v is the value `scale * v + shift`.

    Args:
        values: (sequences, length) uint8; may be memory-mapped.
        labels: (examples,) integers.
        which: (examples,) sequence of each example, default i.
    """

    def __init__(
        self,
        values: np.ndarray,
        labels: np.ndarray,
        which: np.ndarray | None = None,
        *,
        scale: float,
        shift: float,
    ) -> None:
        self.values = values
        self.labels = np.asarray(labels)
        self.which = np.arange(len(self.labels)) if which is None else np.asarray(which)
        self.scale = scale
        self.shift = shift

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray) -> Batch:
        """The examples at `indices`, in that order."""
        indices = np.asarray(indices)
        values = self.values[self.which[indices]].astype(np.float32)
        values = values * np.float32(self.scale) + np.float32(self.shift)
        return Batch(
            inputs=torch.from_numpy(values)[:, :, None],
            labels=torch.from_numpy(self.labels[indices].astype(np.int64)),
        )


def to_ragged(sequences: list[np.ndarray]) -> Ragged:
    """Join sequences of one dtype."""
    offsets = np.zeros(len(sequences) + 1, dtype=np.int64)
    np.cumsum([len(sequence) for sequence in sequences], out=offsets[1:])
    return Ragged(np.concatenate(sequences), offsets)


def hold_out(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split `range(len(labels))` in two, every class in proportion.

    Returns:
        The indices kept and the indices held out, a share `share` of each class; both ascending.
    """
    generator = np.random.default_rng(seed)
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        held[members[: round(share * len(members))]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)
