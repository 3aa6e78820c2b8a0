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
        attributes: (nodes, summary + 4), what the tree knows of each, and its level.
    """

    batch: Tensor
    level: Tensor
    index: Tensor
    start: Tensor
    end: Tensor
    block: Tensor
    attributes: Tensor


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
    levels = list(reversed(range(len(tree))))
    widths = [tree[k].tokens.shape[1] for k in levels]
    tokens = torch.cat([tree[k].tokens for k in levels], 1)
    node, batch = (tokens > 0).T.nonzero(as_tuple=True)
    device = node.device
    level = torch.tensor(levels, device=device).repeat_interleave(
        torch.tensor(widths, device=device), output_size=sum(widths)
    )[node]
    index = torch.cat([torch.arange(n, device=device) for n in widths])[node]
    tokens = tokens[batch, node]
    head = index << level
    row = row_of[batch, head]
    inside = guide.level[row] > level
    if form.startswith("leaf"):
        chosen = guide.level[row] == level
    else:
        siblings = torch.cat([tree[k].sibling_tokens for k in levels], 1)
        merged = inside & (guide.type[row] == BlockType.FULL)
        wanted = {"merged": merged, "above": ~inside, "all": merged | ~inside}
        chosen = (siblings[batch, node] > 0) & wanted[which]
    tail = torch.minimum((index + 1) << level, -(-guide.lengths[batch] // l0)) - 1
    # Inside a block tokens are counted from its start, or from its end where it is reversed.
    offset = head * l0 - guide.start[row]
    offset = torch.where(guide.reverse[row], guide.length[row] - offset - tokens, offset)
    start = torch.where(inside, bounds[row] + offset, bounds[row])
    end = torch.where(inside, start + tokens, bounds[row_of[batch, tail] + 1])
    block = torch.where(inside, row, -1)
    kept = (chosen & (end > start)).nonzero()[:, 0]
    columns = (batch, level, index, start, end, block)
    batch, level, index, start, end, block = (column[kept] for column in columns)
    known = at_nodes([nodes.features for nodes in tree], batch, level, index)
    attributes = torch.cat([known, level[:, None].to(known.dtype)], dim=-1)
    return Nodes(batch, level, index, start, end, block, attributes)


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

    def forward(self, nodes: Nodes) -> Tensor:
        """(nodes, channels)."""
        return self.output(F.gelu(self.hidden(nodes.attributes))).sigmoid()
