"""Steps 3 to 6: leaves with attributes to a guide map, a level of the tree at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexbench.models.flexblock.guide import REV, GuideMap

FLOOR = 1e-6
"""Smallest norm by which a summary is divided."""


@dataclass(frozen=True, eq=False)
class BlockAttributes:
    """What the scorer says of each leaf; leaves past a sequence's end may hold anything finite.

    Attributes:
        summary: (batch, leaves, features), of unit length.
        homogeneity: (batch, leaves), in [0, 1].
        reverse: (batch, leaves), probability that the block is to be read from its end.
        type_logits: (batch, leaves, 3), by `BlockType`.
        bidirectional: (batch, leaves), probability that it needs both directions; None: ½.
    """

    summary: Tensor
    homogeneity: Tensor
    reverse: Tensor
    type_logits: Tensor
    bidirectional: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Level:
    """The nodes of one level of the aligned tree, whether or not they are blocks.

    Attributes:
        summary: (batch, nodes, features), of unit length.
        homogeneity, reverse, bidirectional: (batch, nodes).
        type: (batch, nodes) int64, of the node's first leaf: alike below whatever merges.
        tokens: (batch, nodes) int64, real tokens below the node, 0 where there are none.
    """

    summary: Tensor
    homogeneity: Tensor
    reverse: Tensor
    bidirectional: Tensor
    type: Tensor
    tokens: Tensor

    @property
    def sibling_tokens(self) -> Tensor:
        """(batch, nodes) int64, real tokens below each node's sibling, 0 where there is none."""
        return _pairs(self.tokens).flip(2).flatten(1)[:, : self.tokens.shape[1]]

    @property
    def features(self) -> Tensor:
        """(batch, nodes, features + 3): summary, homogeneity, reverse, bidirectional."""
        scalars = torch.stack([self.homogeneity, self.reverse, self.bidirectional], dim=-1)
        return torch.cat([self.summary, scalars], dim=-1)

    def parents(self) -> Level:
        """The level above: summaries are renormalised length-weighted means, homogeneity the
        smaller one, probabilities length-weighted means."""
        tokens = _pairs(self.tokens)
        weight = tokens.to(self.summary.dtype)
        share = weight / weight.sum(-1, keepdim=True).clamp_min(1)
        mean = lambda x: (_pairs(x) * share).sum(-1)  # noqa: E731
        summary = (_pairs(self.summary) * share[..., None]).sum(2)
        real = tokens > 0
        homogeneity = _pairs(self.homogeneity).masked_fill(~real, 1.0)
        return Level(
            summary=unit(summary),
            homogeneity=homogeneity.amin(-1),
            reverse=mean(self.reverse),
            bidirectional=mean(self.bidirectional),
            type=_pairs(self.type)[..., 0],
            tokens=tokens.sum(-1),
        )

    def alike(self, rev_threshold: float) -> tuple[Tensor, Tensor]:
        """Of each pair of siblings: the cosine of their summaries, and whether both are real, of
        one type and of one REV flag. (batch, parents) each."""
        first, second = _pairs(self.summary).unbind(2)
        flags = _pairs(self.reverse > rev_threshold)
        types = _pairs(self.type)
        real = (_pairs(self.tokens) > 0).all(-1)
        same = (types[..., 0] == types[..., 1]) & (flags[..., 0] == flags[..., 1])
        return (first * second).sum(-1).clamp(-1, 1), same & real


def at_nodes(levels: list[Tensor], batch: Tensor, level: Tensor, index: Tensor) -> Tensor:
    """(n, ...) the values of n nodes, given (batch, nodes, ...) those of every level."""
    widths = torch.tensor([values.shape[1] for values in levels], device=level.device)
    first = widths.cumsum(0) - widths
    return torch.cat(levels, 1)[batch, first[level] + index]


def unit(x: Tensor) -> Tensor:
    """x along its last axis divided by its norm, which is floored."""
    return x / x.norm(dim=-1, keepdim=True).clamp_min(FLOOR)


def build_tree(attributes: BlockAttributes, lengths: Tensor, l0: int) -> list[Level]:
    """All levels of the aligned tree, leaves first, up to the one with a single node.

    Raises:
        ValueError: on the CPU, fewer leaves than the longest sequence needs.
    """
    leaves = attributes.reverse.shape[1]
    # Asked on the CPU, where it costs nothing: a GPU would have to be waited for.
    if lengths.device.type == "cpu" and leaves * l0 < int(lengths.max()):
        raise ValueError(f"{leaves} leaves of {l0} tokens do not cover {int(lengths.max())} tokens")
    begins = torch.arange(leaves, device=lengths.device) * l0
    bidirectional = attributes.bidirectional
    if bidirectional is None:
        bidirectional = torch.full_like(attributes.reverse, 0.5)
    level = Level(
        summary=attributes.summary,
        homogeneity=attributes.homogeneity,
        reverse=attributes.reverse,
        bidirectional=bidirectional,
        type=attributes.type_logits.argmax(-1),
        tokens=(lengths[:, None] - begins).clamp(0, l0),
    )
    tree = [level]
    while level.tokens.shape[1] > 1:
        level = level.parents()
        tree.append(level)
    return tree


def merge(
    tree: list[Level],
    *,
    merge_threshold: float,
    remerge_threshold: float | None = None,
    homogeneity_threshold: float = 0.0,
    max_level: int | None = None,
    rev_threshold: float = 0.5,
) -> Tensor:
    """Steps 3 and 4: (batch, leaves) int64, the level of the block that each leaf is part of.

    Raises:
        ValueError: a second threshold above the first.
    """
    if remerge_threshold is not None and remerge_threshold > merge_threshold:
        raise ValueError(
            f"remerge_threshold {remerge_threshold} must not exceed merge_threshold "
            f"{merge_threshold}"
        )
    top = len(tree) - 1 if max_level is None else min(max_level, len(tree) - 1)
    similar = [level.alike(rev_threshold) for level in tree[:top]]
    whole = [tree[0].tokens > 0]
    for level, (cosine, same) in zip(tree, similar, strict=False):
        even = (_pairs(level.homogeneity) >= homogeneity_threshold).all(-1)
        both = _pairs(whole[-1]).all(-1)
        whole.append(both & same & even & (cosine >= merge_threshold))
    if remerge_threshold is not None:
        for k, (cosine, same) in enumerate(similar):
            # A parent of step 3 stands; another forms where both halves are blocks of this level.
            loose = _pairs(whole[k]).all(-1) & same & (cosine >= remerge_threshold)
            whole[k + 1] = whole[k + 1] | loose
    leaves = tree[0].tokens.shape[1]
    level_of_leaf = torch.zeros_like(tree[0].type)
    for k, exists in enumerate(whole):
        below = exists.repeat_interleave(1 << k, dim=1)[:, :leaves]
        level_of_leaf = torch.where(below, k, level_of_leaf)
    return level_of_leaf


def to_map(
    tree: list[Level], level_of_leaf: Tensor, l0: int, rev_threshold: float = 0.5
) -> GuideMap:
    """Step 6: the blocks that `level_of_leaf` says, with types and flags from the tree."""
    leaves = tree[0]
    lengths = leaves.tokens.sum(1)
    index = torch.arange(leaves.tokens.shape[1], device=lengths.device)
    heads = (index % (1 << level_of_leaf) == 0) & (leaves.tokens > 0)
    batch, leaf = heads.nonzero(as_tuple=True)
    level = level_of_leaf[batch, leaf]
    start = leaf * l0
    flags = REV * (leaves.reverse[batch, leaf] > rev_threshold)
    return GuideMap(
        batch=batch,
        start=start,
        length=torch.minimum(l0 << level, lengths[batch] - start),
        level=level,
        type=leaves.type[batch, leaf],
        flags=flags.long(),
        lengths=lengths,
        l0=l0,
    )


def build_guide_map(
    attributes: BlockAttributes,
    lengths: Tensor,
    *,
    l0: int,
    merge_threshold: float,
    remerge_threshold: float | None = None,
    homogeneity_threshold: float = 0.0,
    max_level: int | None = None,
    rev_threshold: float = 0.5,
) -> GuideMap:
    """Merge like siblings of the aligned binary tree, bottom up, and write down the blocks.

    Two siblings merge into their parent when both exist whole, have the same type and the same REV
    flag, are at least `homogeneity_threshold` homogeneous and have summaries with a cosine of at
    least `merge_threshold`; a pair that fails takes no part at higher levels. A second pass merges
    what the first has left, where the cosine reaches `remerge_threshold`. Every level is one
    vectorised operation over the batch.

    Args:
        attributes: of the leaves.
        lengths: (batch,) int64, tokens of each sequence, at least 1.
        l0: tokens of a leaf.
        merge_threshold: above 1 nothing merges, at -1 everything of one type and flag.
        remerge_threshold: at most `merge_threshold`; None: no second pass.
        homogeneity_threshold: 0: no condition.
        max_level: the highest level of a block; None: no limit.
        rev_threshold: a block is read from its end where its probability is above it.

    Raises:
        ValueError: thresholds out of order, or too few leaves.
    """
    tree = build_tree(attributes, lengths, l0)
    level_of_leaf = merge(
        tree,
        merge_threshold=merge_threshold,
        remerge_threshold=remerge_threshold,
        homogeneity_threshold=homogeneity_threshold,
        max_level=max_level,
        rev_threshold=rev_threshold,
    )
    return to_map(tree, level_of_leaf, l0, rev_threshold)


def _pairs(x: Tensor) -> Tensor:
    """(batch, nodes, ...) to (batch, parents, 2, ...) or (batch, parents, 2) + features last.

    A last node without a sibling gets a twin of zeros, which is no real node.
    """
    if x.shape[1] % 2:
        x = torch.cat([x, torch.zeros_like(x[:, :1])], dim=1)
    return x.unflatten(1, (-1, 2))
