"""Block gating: what a guide map made from the context tells the gates of every step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexbench.models.base import untraced
from flexbench.models.flexblock.guide import BlockType, GuideMap
from flexbench.models.flexblock.merge import build_tree, merge, to_map
from flexbench.models.flexblock.router import of_blocks
from flexbench.models.flexblock.scorer import Scorer


class BlockStructure(nn.Module):
    """Flexible Block Mamba's map of the context, and each step's place in it.

    The structure of a step is that of its block: summary, homogeneity, probabilities of REV and of
    both directions, type (one-hot), log2 of the length; and the step's position in the block, from
    0. The scorer learns through them; a type has the gradient of its leaf's probabilities. No
    gradient reaches the context.

    Args:
        width: of the context.
        l0: tokens of a leaf.
        merge_threshold: siblings merge where their summaries' cosine is at least this.
    """

    def __init__(self, width: int, l0: int, merge_threshold: float) -> None:
        super().__init__()
        self.l0, self.merge_threshold = l0, merge_threshold
        self.scorer = Scorer(width, l0)
        self.width = self.scorer.sizes[0] + 3 + len(BlockType) + 2

    def forward(self, context: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, GuideMap]:
        """The structure, (batch, length, `width`), and the map; `context` as for every mixer."""
        return untraced(self._find)(context, cu_seqlens)

    def _find(self, context: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, GuideMap]:
        if cu_seqlens is None:
            lengths = torch.full((len(context),), context.shape[1], device=context.device)
            padded = context
        else:
            lengths = cu_seqlens.diff().long()
            parts = context.detach()[0].split(lengths.tolist())
            padded = nn.utils.rnn.pad_sequence(parts, batch_first=True)
        found = self.scorer(padded, lengths)
        tree = build_tree(found, lengths, self.l0)
        guide = to_map(tree, merge(tree, merge_threshold=self.merge_threshold), self.l0)
        nodes = of_blocks([level.features for level in tree], guide)
        # Blocks tile every sequence in order, so that their steps in turn are the batch's.
        block = torch.arange(len(guide), device=nodes.device).repeat_interleave(guide.length)
        place = torch.arange(len(block), device=nodes.device)
        place = place - (guide.length.cumsum(0) - guide.length)[block]
        leaf = (guide.start[block] + place) // self.l0
        likely = found.type_logits.softmax(-1)[guide.batch[block], leaf]
        kind = F.one_hot(guide.type[block], len(BlockType)) + likely - likely.detach()
        size = guide.length[block].to(nodes.dtype)
        structure = torch.cat(
            [nodes[block], kind, size.log2()[:, None], (place / size)[:, None]],
            dim=-1,
        )
        return structure.view(*context.shape[:2], -1), guide
