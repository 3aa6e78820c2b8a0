"""Random guide maps and attributes, made and read the plain, recursive way."""

from __future__ import annotations

import random

import pandas as pd
import torch
from hypothesis import strategies as st

from flexbench.models.flexblock import BlockAttributes, GuideMap
from flexbench.models.flexblock.merge import unit


def random_map(
    lengths: list[int],
    l0: int,
    seed: int,
    *,
    types: tuple[int, ...] = (0, 1, 2),
    rev: bool = True,
    split: float = 0.6,
) -> GuideMap:
    """Every sequence's tree cut at random nodes, each block of a random type and direction."""
    chance = random.Random(seed)
    rows: list[tuple[int, ...]] = []

    def cut(batch: int, level: int, node: int) -> None:
        start, size = node * (l0 << level), l0 << level
        length = min(size, lengths[batch] - start)
        if length <= 0:
            return
        if level and (2 * length <= size or chance.random() < split):
            cut(batch, level - 1, 2 * node)
            cut(batch, level - 1, 2 * node + 1)
        else:
            flag = int(rev and chance.random() < 0.5)
            rows.append((batch, start, length, level, chance.choice(types), flag))

    for batch, length in enumerate(lengths):
        height = 0
        while l0 << height < length:
            height += 1
        cut(batch, height, 0)
    columns = ["batch", "start", "length", "level", "type", "flags"]
    return GuideMap.from_frame(pd.DataFrame(rows, columns=columns), l0=l0)


def random_attributes(batch: int, leaves: int, seed: int, features: int = 3) -> BlockAttributes:
    """Attributes in which many siblings are alike: few types, summaries in clusters."""
    draw = torch.Generator().manual_seed(seed)
    uniform = lambda *shape: torch.rand(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    centres = unit(uniform(2, features) - 0.5)
    which = torch.randint(2, (batch, leaves), generator=draw)
    logits = uniform(batch, leaves, 3)
    logits[..., 0] += 0.7
    return BlockAttributes(
        summary=unit(centres[which] + 0.3 * (uniform(batch, leaves, features) - 0.5)),
        homogeneity=uniform(batch, leaves),
        reverse=uniform(batch, leaves) ** 2,
        type_logits=logits,
        bidirectional=uniform(batch, leaves),
    )


map_lengths = st.lists(st.integers(1, 70), min_size=1, max_size=4)
seeds = st.integers(0, 2**20)
