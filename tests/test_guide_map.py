"""The guide map and the merging behind it, against a plain recursion over an explicit tree."""

from __future__ import annotations

from functools import partial

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maps import map_lengths, random_attributes, random_map, seeds

from flexbench.models.flexblock import BlockType, GuideMap, build_guide_map
from flexbench.models.flexblock.guide import COLUMNS

leaf_sizes = st.integers(1, 9)


def rows_of(guide: GuideMap) -> list[tuple[int, ...]]:
    return list(map(tuple, guide.to_frame()[list(COLUMNS)].to_numpy().tolist()))


def plain_merge(
    attributes, lengths, l0, first, second=None, homogeneity=0.0, max_level=None, threshold=0.5
):
    """Steps 3 to 6 a sequence, a pair and a pass at a time."""
    found = []
    for b, length in enumerate(lengths):
        leaves = -(-length // l0)
        blocks = {}
        for i in range(leaves):
            tokens = min(l0, length - i * l0)
            blocks[0, i] = {
                "s": attributes.summary[b, i],
                "c": float(attributes.homogeneity[b, i]),
                "r": float(attributes.reverse[b, i]),
                "type": int(attributes.type_logits[b, i].argmax()),
                "tokens": tokens,
            }

        def sweep(blocks, limit, floor):
            for level in range(64 if max_level is None else max_level):
                for key in [key for key in sorted(blocks) if key[0] == level and not key[1] % 2]:
                    other = (level, key[1] + 1)
                    if key not in blocks or other not in blocks:
                        continue
                    one, two = blocks[key], blocks[other]
                    if one["type"] != two["type"]:
                        continue
                    if (one["r"] > threshold) != (two["r"] > threshold):
                        continue
                    if min(one["c"], two["c"]) < floor or float(one["s"] @ two["s"]) < limit:
                        continue
                    total = one["tokens"] + two["tokens"]
                    mixed = (one["s"] * one["tokens"] + two["s"] * two["tokens"]) / total
                    blocks[level + 1, key[1] // 2] = {
                        "s": mixed / mixed.norm().clamp_min(1e-6),
                        "c": min(one["c"], two["c"]),
                        "r": (one["r"] * one["tokens"] + two["r"] * two["tokens"]) / total,
                        "type": one["type"],
                        "tokens": total,
                    }
                    del blocks[key], blocks[other]

        sweep(blocks, first, homogeneity)
        if second is not None:
            sweep(blocks, second, 0.0)
        for (level, i), block in sorted(blocks.items(), key=lambda item: item[0][1] << item[0][0]):
            found.append(
                (b, i * l0 << level, block["tokens"], level, block["type"],
                 int(block["r"] > threshold))
            )  # fmt: skip
    return found


@settings(max_examples=150, deadline=None)
@given(
    map_lengths,
    leaf_sizes,
    seeds,
    st.sampled_from([-1.0, 0.0, 0.5, 0.9, 0.97, 2.0]),
    st.sampled_from([None, -1.0, 0.3, 0.8]),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([None, 0, 1, 2]),
)
def test_merging_equals_a_plain_recursion(lengths, l0, seed, first, second, homogeneity, top):
    if second is not None and second > first:
        second = first
    attributes = random_attributes(len(lengths), -(-max(lengths) // l0) + seed % 3, seed)
    guide = build_guide_map(
        attributes,
        torch.tensor(lengths),
        l0=l0,
        merge_threshold=first,
        remerge_threshold=second,
        homogeneity_threshold=homogeneity,
        max_level=top,
    )
    guide.validate()
    assert rows_of(guide) == plain_merge(attributes, lengths, l0, first, second, homogeneity, top)


@settings(max_examples=50, deadline=None)
@given(map_lengths, leaf_sizes, seeds, st.sampled_from([-1.0, 0.3, 0.8]))
def test_merging_again_is_merging_once_and_loosely(lengths, l0, seed, second):
    attributes = random_attributes(len(lengths), -(-max(lengths) // l0), seed)
    make = partial(build_guide_map, attributes, torch.tensor(lengths), l0=l0)
    once = rows_of(make(merge_threshold=second))
    for evenness in (0.0, 0.5):
        first = {"merge_threshold": 0.9, "homogeneity_threshold": evenness}
        assert rows_of(make(**first, remerge_threshold=second)) == once


@settings(max_examples=50, deadline=None)
@given(map_lengths, leaf_sizes, seeds)
def test_a_sequence_has_the_same_map_alone(lengths, l0, seed):
    attributes = random_attributes(len(lengths), -(-max(lengths) // l0), seed)
    both = {"l0": l0, "merge_threshold": 0.8, "remerge_threshold": 0.2}
    together = rows_of(build_guide_map(attributes, torch.tensor(lengths), **both))
    for b, length in enumerate(lengths):
        alone = type(attributes)(*(getattr(attributes, f)[b : b + 1] for f in vars(attributes)))
        rows = rows_of(build_guide_map(alone, torch.tensor([length]), **both))
        assert [row[1:] for row in rows] == [row[1:] for row in together if row[0] == b]


@settings(max_examples=100, deadline=None)
@given(map_lengths, leaf_sizes, seeds)
def test_a_map_tiles_and_survives_its_frame(lengths, l0, seed):
    guide = random_map(lengths, l0, seed)
    rows = rows_of(guide)
    for b, length in enumerate(lengths):
        covered = [range(r[1], r[1] + r[2]) for r in rows if r[0] == b]
        assert [t for part in covered for t in part] == list(range(length))
    for _, start, length, level, _, _ in rows:
        assert start % (l0 << level) == 0
        assert length <= l0 << level
    shuffled = guide.to_frame().sample(frac=1, random_state=0)
    assert rows_of(GuideMap.from_frame(shuffled)) == rows
    assert guide.lengths.tolist() == lengths


@settings(max_examples=100, deadline=None)
@given(
    map_lengths, leaf_sizes, seeds, st.integers(1, 5), st.sampled_from(["block", "fixed"]),
    st.booleans(),
)  # fmt: skip
def test_packing_equals_a_plain_loop(lengths, l0, seed, stride, resolution, padded):
    guide = random_map(lengths, l0, seed)
    row_length = max(lengths) + 2 if padded else None
    runs, bounds, sequences = [], [0], [0]
    order = []
    base = 0
    for b, total in enumerate(lengths):
        for _, start, length, level, kind, flag in (r for r in rows_of(guide) if r[0] == b):
            tokens = list(range(base + start, base + start + length))
            if flag:
                tokens.reverse()
            order += tokens
            m = {0: 1, 1: stride << (level if resolution == "block" else 0)}.get(kind, 0)
            runs += [tokens[i : i + m] for i in range(0, length, m)] if m else []
            bounds.append(len(runs))
        sequences.append(len(runs))
        base += row_length or total
    packing = guide.pack(stride, resolution, row_length)
    made = [
        list(range(s, s + c))
        for s, c in zip(packing.start.tolist(), packing.count.tolist(), strict=True)
    ]
    assert made == [sorted(run) for run in runs]
    assert packing.cu_blocks.tolist() == bounds
    assert packing.cu_seqlens.tolist() == sequences
    assert guide.permutation(row_length).tolist() == order
    computed = guide.stats(stride, resolution)["computed_token_ratio"]
    assert computed == pytest.approx(len(runs) / sum(lengths))


@settings(max_examples=30, deadline=None)
@given(map_lengths, leaf_sizes, seeds)
def test_reversal_is_an_involution(lengths, l0, seed):
    order = random_map(lengths, l0, seed).permutation()
    assert torch.equal(order[order], torch.arange(sum(lengths)))


def test_uniform_maps():
    guide = GuideMap.uniform(2, torch.tensor([5, 8]), 4, type=BlockType.REDUCED, rev=True)
    guide.validate()
    assert rows_of(guide) == [(0, 0, 4, 0, 1, 1), (0, 4, 1, 0, 1, 1), (1, 0, 4, 0, 1, 1),
                              (1, 4, 4, 0, 1, 1)]  # fmt: skip
    assert GuideMap.uniform(3, 10, 4).stats()["computed_token_ratio"] == 1.0
    shares = guide.stats()
    assert shares["rev_share"] == shares["reduced_share"] == 1.0
    assert shares["mean_block_length"] == 13 / 4
    with pytest.raises(ValueError, match="at least 1"):
        GuideMap.uniform(1, 0, 4)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"start": [0, 5, 8]}, "gap"),
        ({"length": [4, 4, 0]}, "empty"),
        ({"length": [4, 3, 2]}, "gap"),
        ({"level": [1, 0, 0]}, "2\\^level"),
        ({"type": [0, 3, 0]}, "type"),
        ({"flags": [0, 0, 2]}, "flag"),
        ({"level": [0, 0, -1]}, "negative level"),
        ({"batch": [0, 0, 2]}, "gap|missing"),
        ({"start": [4, 8, 10], "length": [4, 4, 2]}, "gap"),
    ],
)
def test_what_is_no_map_is_refused(change, problem):
    good = {"batch": [0, 0, 0], "start": [0, 4, 8], "length": [4, 4, 2], "level": [0, 0, 0]}
    good |= {"type": [0, 1, 2], "flags": [0, 1, 0]}
    assert len(GuideMap.from_frame(pd.DataFrame(good), l0=4)) == 3
    with pytest.raises(ValueError, match=problem):
        GuideMap.from_frame(pd.DataFrame({**good, **change}), l0=4)
    with pytest.raises(ValueError, match="name l0"):
        GuideMap.from_frame(pd.DataFrame(good))


def test_thresholds_out_of_order_are_refused():
    attributes = random_attributes(1, 4, 0)
    lengths = torch.tensor([16])
    with pytest.raises(ValueError, match="must not exceed"):
        build_guide_map(attributes, lengths, l0=4, merge_threshold=0.5, remerge_threshold=0.9)
    with pytest.raises(ValueError, match="do not cover"):
        build_guide_map(attributes, lengths + 1, l0=4, merge_threshold=0.5)
