"""Blocks read in both directions, one reading next to the other in the packed sequence."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flexbench import kernels
from flexbench.models.flexblock.gates import Nodes
from flexbench.models.flexblock.guide import GuideMap, Packing, Resolution

CONTEXT = 3
"""Steps before its block that a convolution may see: of the widest one."""


class TwoReadings:
    """The computed tokens of a map, those of some blocks a second time in the other direction.

    The readings of a block lie next to each other, the one that its flag says first. Both begin
    from the state carried to the block, and what is carried on is a mix of the two: a fork, in the
    terms of `block_scan`. In either one the block's convolution sees its predecessor in the order
    of the predecessor's flag.

    Args:
        guide, packing: the map and what it computes.
        forked: (blocks,) bool, the blocks that are read twice.
        reduce_stride, resolution, row_length: what `packing` was made with.

    Attributes:
        start, count: (again,) int64 runs of the second readings, as in `Packing`.
        block: (again,) int64, the block of each.
        cu_blocks, cu_seqlens: int32 bounds of the blocks and sequences, second readings included.
        repeats: (1, computed + again), or None.
        forked: (blocks,) bool, the blocks of which there is anything to read twice.
        forks: (forked, 3) int64 nodes (start, middle, end) for `block_scan`.
    """

    def __init__(
        self,
        guide: GuideMap,
        packing: Packing,
        forked: Tensor,
        reduce_stride: int,
        resolution: Resolution,
        row_length: int | None,
    ) -> None:
        self.packing = packing
        other = guide.turned().pack(reduce_stride, resolution, row_length)
        again = forked[packing.block]
        self.start, self.count, self.block = (
            t[again] for t in (other.start, other.count, other.block)
        )
        self.bounds = packing.cu_blocks.long()
        self.first_of_sequence = packing.cu_seqlens.long()[guide.batch]
        self.computed = self.bounds.diff()
        self.twice = self.computed * forked
        self.before = F.pad(self.twice.cumsum(0), (1, 0))  # second readings before each block
        self._place = torch.arange(len(packing), device=forked.device)
        first = self._place + self.before[packing.block]
        second = first[again] + self.computed[self.block]
        self._places = torch.cat([first, second])
        self._order = _inverse(self._places)
        starts = self.bounds[:-1] + self.before[:-1]
        forks = torch.stack([starts, starts + self.computed, starts + 2 * self.computed], 1)
        self.forked = forked & (self.computed > 0)
        self.forks = forks[self.forked]
        self.cu_blocks = (self.bounds + self.before).int()
        sequences = F.pad(torch.zeros_like(guide.lengths), (1, 0))
        sequences[1:].index_add_(0, guide.batch, self.computed + self.twice)
        self.cu_seqlens = sequences.cumsum(0).int()
        self.repeats = None
        if packing.reduced:
            self.repeats = torch.cat([packing.count, self.count])[self._order][None]
        # What a convolution sees of a second reading: steps before its block, then its own.
        before = (self.bounds[:-1] - self.first_of_sequence).clamp(max=CONTEXT) * self.forked
        lengths = before + self.twice
        base = lengths.cumsum(0) - lengths
        owner = torch.arange(len(before), device=forked.device).repeat_interleave(before)
        step = torch.arange(len(owner), device=forked.device) - (before.cumsum(0) - before)[owner]
        index = torch.arange(len(self.block), device=forked.device) - self.before[self.block]
        self._context = (self.bounds[:-1] - before)[owner] + step
        self._own = (base + before)[self.block] + index
        self._seen = _inverse(torch.cat([base[owner] + step, self._own]))
        self._cu_seen = F.pad(lengths.cumsum(0), (1, 0)).int()

    def interleave(self, first: Tensor, second: Tensor) -> Tensor:
        """(computed, dim) and (again, dim) to (computed + again, dim)."""
        return pick(torch.cat([first, second]), self._order)

    def separate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `interleave`."""
        picked = pick(x, self._places)
        return picked[: len(self.packing)], picked[len(self.packing) :]

    def convolve(
        self, x: Tensor, second: Tensor, convolve: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """The second readings (again, dim) convolved, given the first ones, (computed, dim)."""
        seen = pick(torch.cat([x[self._context], second]), self._seen)
        return pick(convolve(seen[None], self._cu_seen)[0], self._own)

    def gates(self, nodes: Nodes) -> tuple[Tensor, Tensor]:
        """Bounds (n, 3) of gates here, and (n,) which of `nodes` each is: one inside a block has a
        twin in the block's other reading."""
        block_of = self.packing.block
        first, last = block_of[nodes.start], block_of[nodes.end - 1]
        inside = nodes.block >= 0
        start = nodes.start + self.before[first]
        end = nodes.end + torch.where(inside, self.before[first], self.before[last + 1])
        twins = (inside & self.forked[first]).nonzero()[:, 0]
        block = first[twins]
        # Token i of a block's first reading is token 2 * computed - 1 - i from the first one on.
        mirror = 2 * (self.bounds + self.before)[block] + 2 * self.computed[block]
        start = torch.cat([start, mirror - end[twins]])
        end = torch.cat([end, mirror - nodes.start[twins] - self.before[block]])
        which = torch.cat([torch.arange(len(inside), device=start.device), twins])
        return torch.stack([start, start, end], 1), which


def pick(rows: Tensor, which: Tensor) -> Tensor:
    """Rows by index, no index twice."""
    return kernels.gather_runs(rows, which, torch.ones_like(which))


def _inverse(permutation: Tensor) -> Tensor:
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(permutation), device=permutation.device)
    return inverse
