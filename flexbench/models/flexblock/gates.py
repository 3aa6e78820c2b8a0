"""Which nodes of the tree carry gates, and what is known of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexbench.models.flexblock.guide import BlockType, GuideMap, Packing
from flexbench.models.flexblock.merge import Level, at_nodes

GateForm = Literal["none", "leaf-scalar", "leaf-channel", "tree-scalar", "tree-channel"]
GateNodes = Literal["merged", "above", "all"]

OPEN_BIAS = 3.0
"""Gates start at sigmoid(3) = 0.95, nearly open."""


@dataclass(frozen=True, eq=False)
class Nodes:
    """Nodes of the tree that carry a gate.

    Attributes:
        batch, level, index: (nodes,) int64, where they lie in the tree.
        start, end: (nodes,) int64 bounds among the computed tokens, start < end.
        block: (nodes,) int64, the row of the map that the node lies in, -1 if it is one or more.
    """

    batch: Tensor
    level: Tensor
    index: Tensor
    start: Tensor
    end: Tensor
    block: Tensor


def gated_nodes(
    tree: list[Level], guide: GuideMap, packing: Packing, form: GateForm, which: GateNodes
) -> Nodes:
    """The nodes whose summary is gated, outer ones first.

    A leaf form gates every block. A tree form gates both children of every internal node of the
    aligned tree that has two real ones: those inside `full` blocks ("merged"), those that are
    blocks or lie above them ("above"), or "all".
    """
    l0 = guide.l0
    bounds = packing.cu_blocks.long()
    leaves = guide.length.sub(1).div(l0, rounding_mode="floor").add(1)
    first_leaf = guide.start // l0
    # By (sequence, leaf): the row of the map, and the computed tokens before the leaf's block.
    width = tree[0].tokens.shape[1]
    row_of = torch.zeros(len(guide.lengths), width, dtype=torch.int64, device=bounds.device)
    owner = torch.arange(len(guide), device=bounds.device).repeat_interleave(leaves)
    place = torch.arange(len(owner), device=bounds.device) - (leaves.cumsum(0) - leaves)[owner]
    row_of[guide.batch[owner], first_leaf[owner] + place] = owner
    found: list[tuple[Tensor, ...]] = []
    for level in reversed(range(len(tree))):
        batch, index = (tree[level].tokens > 0).nonzero(as_tuple=True)
        head = index << level
        row = row_of[batch, head]
        inside = guide.level[row] > level
        if form.startswith("leaf"):
            chosen = guide.level[row] == level
        else:
            sibling = (index ^ 1).clamp(max=tree[level].tokens.shape[1] - 1)
            paired = (sibling != index) & (tree[level].tokens[batch, sibling] > 0)
            merged = inside & (guide.type[row] == BlockType.FULL)
            wanted = {"merged": merged, "above": ~inside, "all": merged | ~inside}
            chosen = paired & wanted[which]
        batch, index, head, row, inside = (t[chosen] for t in (batch, index, head, row, inside))
        tail = torch.minimum((index + 1) << level, -(-guide.lengths[batch] // l0)) - 1
        # Inside a block tokens are counted from its start, or from its end where it is reversed.
        tokens = tree[level].tokens[batch, index]
        offset = head * l0 - guide.start[row]
        offset = torch.where(guide.reverse[row], guide.length[row] - offset - tokens, offset)
        start = torch.where(inside, bounds[row] + offset, bounds[row])
        end = torch.where(inside, start + tokens, bounds[row_of[batch, tail] + 1])
        block = torch.where(inside, row, -1)
        kept = end > start
        columns = (batch, torch.full_like(batch, level), index, start, end, block)
        found.append(tuple(column[kept] for column in columns))
    return Nodes(*(torch.cat(parts) for parts in zip(*found, strict=True)))


class NodeGate(nn.Module):
    """α of every node from its attributes: a scalar or one value a channel.

    Args:
        summary: width of the leaves' summary vectors.
        channels: 1, or the channels of the scan.
    """

    def __init__(self, summary: int, channels: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(summary + 4, 16)
        self.output = nn.Linear(16, channels)
        nn.init.zeros_(self.output.weight)
        nn.init.constant_(self.output.bias, OPEN_BIAS)

    def forward(self, tree: list[Level], nodes: Nodes) -> Tensor:
        """(nodes, channels)."""
        chosen = at_nodes([level.features for level in tree], nodes.batch, nodes.level, nodes.index)
        chosen = torch.cat([chosen, nodes.level[:, None].to(chosen.dtype)], dim=-1)
        return self.output(F.gelu(self.hidden(chosen))).sigmoid()
