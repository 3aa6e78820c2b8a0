"""The guide map: which stretch of a sequence is computed how, and in which direction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

Resolution = Literal["block", "fixed"]

COLUMNS = ("batch", "start", "length", "level", "type", "flags")
REV = 1
"""Bit of `GuideMap.flags`: the block is read from its end."""


class BlockType(IntEnum):
    """What the mixer computes of a block.

    FULL: every token. REDUCED: a few tokens, each the mean of a run. IDENTITY: none; the state
    passes through and the output is zero.
    """

    FULL = 0
    REDUCED = 1
    IDENTITY = 2


@dataclass(frozen=True, eq=False)
class GuideMap:
    """A partition of every sequence of a batch into blocks: a row a block, by batch and start.

    Attributes:
        batch, start, length, level, type, flags: (blocks,) int64. A block of level k is a node of
            the aligned binary tree over leaves of `l0` tokens: its start is a multiple of
            l0 * 2^k and its length is that too, except that a sequence's tail is cut short.
        lengths: (sequences,) int64, tokens of each sequence, at least 1.
        l0: tokens of a leaf.
    """

    batch: Tensor
    start: Tensor
    length: Tensor
    level: Tensor
    type: Tensor
    flags: Tensor
    lengths: Tensor
    l0: int

    def __len__(self) -> int:
        return len(self.start)

    @classmethod
    def uniform(
        cls,
        batch: int,
        length: int | Tensor,
        l0: int,
        *,
        type: BlockType = BlockType.FULL,
        rev: bool = False,
    ) -> GuideMap:
        """Every leaf a block of its own, all alike; `length` may be (batch,) different lengths.

        Raises:
            ValueError: a length or `l0` below 1.
        """
        lengths = torch.as_tensor(length, dtype=torch.int64).expand(batch)
        if l0 < 1 or bool((lengths < 1).any()):
            raise ValueError(f"l0 and every length must be at least 1, not {l0} and {length}")
        leaves = (lengths + l0 - 1) // l0
        rows = torch.arange(batch, device=lengths.device).repeat_interleave(leaves)
        start = l0 * (torch.arange(len(rows), device=lengths.device) - _before(leaves)[rows])
        fill = torch.zeros_like(rows)
        return cls(
            batch=rows,
            start=start,
            length=(lengths[rows] - start).clamp(max=l0),
            level=fill,
            type=fill + int(type),
            flags=fill + REV * rev,
            lengths=lengths,
            l0=l0,
        )

    def to_frame(self) -> pd.DataFrame:
        """A row a block with the columns of the map, all integers; `attrs["l0"]` is `l0`."""
        import pandas as pd

        frame = pd.DataFrame({name: getattr(self, name).cpu().numpy() for name in COLUMNS})
        frame.attrs["l0"] = self.l0
        return frame

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, *, l0: int | None = None) -> GuideMap:
        """The map that `to_frame` shows, rows in any order, validated.

        Args:
            frame: with the columns of `COLUMNS`.
            l0: tokens of a leaf; None: what `to_frame` left in `frame.attrs`.

        Raises:
            ValueError: a missing column, no `l0`, or no map (see `validate`).
        """
        missing = [name for name in COLUMNS if name not in frame]
        if missing:
            raise ValueError(f"a guide map needs the columns {', '.join(missing)}")
        l0 = frame.attrs.get("l0") if l0 is None else l0
        if l0 is None:
            raise ValueError("name l0, the tokens of a leaf: this table was not made by to_frame")
        frame = frame.sort_values(["batch", "start"], kind="stable")
        columns = {name: torch.tensor(frame[name].to_numpy(dtype="int64")) for name in COLUMNS}
        sequences = int(columns["batch"].max()) + 1 if len(frame) else 0
        lengths = torch.zeros(sequences, dtype=torch.int64)
        lengths.index_add_(0, columns["batch"], columns["length"])
        made = cls(**columns, lengths=lengths, l0=l0)
        made.validate()
        return made

    def validate(self) -> None:
        """Check that this is a map.

        Raises:
            ValueError: rows out of order, a sequence not tiled exactly, a block that is no node of
                the tree, or an unknown type or flag; the message names the first such block.
        """
        ends = self.start + self.length
        first = torch.ones_like(self.batch, dtype=torch.bool)
        first[1:] = self.batch[1:] != self.batch[:-1]
        last = torch.ones_like(first)
        last[:-1] = first[1:]
        begins = torch.zeros_like(self.start)
        begins[1:] = ends[:-1]
        begins[first] = 0
        whole = self.l0 << self.level.clamp(0, 40)
        total = self.lengths[self.batch.clamp(0, max(0, len(self.lengths) - 1))]
        reach = torch.minimum(self.start + whole, total)
        checks = {
            "an empty block": self.length < 1,
            "a negative level": self.level < 0,
            "a gap, an overlap or rows out of order": self.start != begins,
            "a sequence that ends too early": last & (ends != total),
            "a start that is no multiple of the block's size": self.start % whole != 0,
            "a length that is not l0 * 2^level": ends != reach,
            "a tail whose upper half is empty": (self.level > 0) & (self.length * 2 <= whole),
            "an unknown type": (self.type < 0) | (self.type > max(BlockType)),
            "an unknown flag": (self.flags < 0) | (self.flags > REV),
        }
        for problem, found in checks.items():
            if bool(found.any()):
                raise ValueError(f"not a guide map: {problem} in row {int(found.nonzero()[0])}")
        if self.batch.unique_consecutive().tolist() != list(range(len(self.lengths))):
            raise ValueError("not a guide map: sequences are missing or out of order")

    @property
    def reverse(self) -> Tensor:
        """(blocks,) bool: which blocks are read from their end."""
        return (self.flags & REV).bool()

    def turned(self) -> GuideMap:
        """The map with every block read the other way."""
        return replace(self, flags=self.flags ^ REV)

    def run_length(self, reduce_stride: int, resolution: Resolution) -> Tensor:
        """(blocks,) tokens that one computed token stands for: 1 in full blocks."""
        levels = self.level if resolution == "block" else torch.zeros_like(self.level)
        return torch.where(self.type == BlockType.REDUCED, reduce_stride << levels, 1)

    def computed(self, reduce_stride: int = 4, resolution: Resolution = "block") -> Tensor:
        """(blocks,) tokens that the mixer computes of each."""
        runs = self.run_length(reduce_stride, resolution)
        return ((self.length + runs - 1) // runs) * (self.type != BlockType.IDENTITY)

    def stats(self, reduce_stride: int = 4, resolution: Resolution = "block") -> dict[str, float]:
        """What the map comes to; shares are of tokens, those of levels of blocks.

        Keys: computed_token_ratio, rev_share, full_share, reduced_share, identity_share,
        mean_block_length, level_0_share, level_1_share, …
        """
        tokens = float(self.length.sum())
        computed = self.computed(reduce_stride, resolution)
        found = {
            "computed_token_ratio": float(computed.sum()) / tokens,
            "rev_share": float(self.length[self.reverse].sum()) / tokens,
        }
        for kind in BlockType:
            share = float(self.length[self.type == kind].sum()) / tokens
            found[f"{kind.name.lower()}_share"] = share
        found["mean_block_length"] = tokens / len(self)
        for level, count in enumerate(torch.bincount(self.level).tolist()):
            found[f"level_{level}_share"] = count / len(self)
        return found

    def first_tokens(self, row_length: int | None = None) -> Tensor:
        """(sequences,) where each sequence begins among the batch's tokens.

        Args:
            row_length: of a padded batch (sequences, row_length); None: sequences lie end to end.
        """
        if row_length is None:
            return _before(self.lengths)
        return torch.arange(len(self.lengths), device=self.lengths.device) * row_length

    def permutation(self, row_length: int | None = None) -> Tensor:
        """(tokens,) int64: the batch's tokens in the order in which the map reads them.

        Types play no part. `row_length` as in `first_tokens`.
        """
        block = _repeat(self.length)
        place = torch.arange(len(block), device=block.device) - _before(self.length)[block]
        mirrored = self.length[block] - 1 - place
        place = torch.where(self.reverse[block], mirrored, place)
        return self.first_tokens(row_length)[self.batch[block]] + self.start[block] + place

    def pack(
        self,
        reduce_stride: int = 4,
        resolution: Resolution = "block",
        row_length: int | None = None,
    ) -> Packing:
        """What to gather, so that the mixer sees only what it computes, in reading order.

        Args:
            reduce_stride, resolution: a reduced block of level k has runs of reduce_stride * 2^k
                tokens ("block"), or of `reduce_stride` ("fixed").
            row_length: as in `first_tokens`.
        """
        runs = self.run_length(reduce_stride, resolution)
        computed = self.computed(reduce_stride, resolution)
        block = _repeat(computed)
        offset = torch.arange(len(block), device=block.device) - _before(computed)[block]
        offset = offset * runs[block]
        length = self.length[block]
        count = torch.minimum(runs[block], length - offset)
        start = torch.where(self.reverse[block], length - offset - count, offset)
        first_tokens = self.first_tokens(row_length)
        start = start + first_tokens[self.batch[block]] + self.start[block]
        per_sequence = torch.zeros_like(self.lengths).index_add_(0, self.batch, computed)
        return Packing(
            start=start,
            count=count,
            block=block,
            cu_blocks=F.pad(computed.cumsum(0), (1, 0)).int(),
            cu_seqlens=F.pad(per_sequence.cumsum(0), (1, 0)).int(),
            first_tokens=first_tokens,
            reduced=bool((self.type == BlockType.REDUCED).any()),
        )


@dataclass(frozen=True, eq=False)
class Packing:
    """The computed tokens of a batch, one packed sequence after another, in reading order.

    Attributes:
        start: (computed,) int64, first token (in the batch's memory) of the run a token stands for.
        count: (computed,) int64, tokens of the run.
        block: (computed,) int64, the row of the map it belongs to.
        cu_blocks: (blocks + 1,) int32 bounds of the blocks in the packed sequence.
        cu_seqlens: (sequences + 1,) int32 bounds of the sequences in it.
        first_tokens: (sequences,) int64, where each sequence begins in the batch's memory.
        reduced: whether any run may be longer than 1.
    """

    start: Tensor
    count: Tensor
    block: Tensor
    cu_blocks: Tensor
    cu_seqlens: Tensor
    first_tokens: Tensor
    reduced: bool

    def __len__(self) -> int:
        return len(self.start)

    @property
    def repeats(self) -> Tensor | None:
        """(1, computed) for the scan, None where every token stands for itself."""
        return self.count[None] if self.reduced else None


def _before(counts: Tensor) -> Tensor:
    """The exclusive prefix sum."""
    return counts.cumsum(0) - counts


def _repeat(counts: Tensor) -> Tensor:
    """Index i, counts[i] times, for every i."""
    return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
