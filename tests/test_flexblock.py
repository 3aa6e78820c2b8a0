"""Flexible Block Mamba against a plain walk over an explicit tree, token by token, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from maps import random_map, seeds

from flexbench.models.flexblock import BlockType, FlexBlockMamba, GuideMap, Route
from flexbench.models.flexblock.gates import gated_nodes
from flexbench.models.flexblock.readings import TwoReadings
from flexbench.models.mamba import Mamba

F64 = torch.float64
D_MODEL, STRIDE = 4, 2
lengths_of_batch = st.lists(st.integers(1, 22), min_size=1, max_size=3)


def mixer(seed: int = 0, **options) -> FlexBlockMamba:
    torch.manual_seed(seed)
    made = FlexBlockMamba(
        D_MODEL, 3, 3, d_inner=5, l0=4, reduce_stride=STRIDE, dt_rank=2, **options
    ).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made.eval()


def inputs(lengths: list[int], seed: int) -> torch.Tensor:
    """(1, total, d_model), and the same padded by `pad`."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(1, sum(lengths), D_MODEL, dtype=F64, generator=draw)


def pad(x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(x[0].split(lengths), batch_first=True)


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def walk(mamba, x, guide, *, form="none", which="all", alpha=None, other=None, resolution="block"):
    """The definition: (1, total, d_model) to the same.

    alpha(batch, level, index): the gate of a node. other: by row of the map, the weight of the
    reading against the flag.
    """
    every = list(guide.to_frame().itertuples())
    out = torch.zeros_like(x[0])

    def visit_sequence(b, length, base):
        rows = [row for row in every if row.batch == b]
        history: list[torch.Tensor] = []  # projected u of the hard reading so far
        state = torch.zeros(mamba.d_inner, mamba.d_state, dtype=F64)

        def runs(row, turned):
            tokens = list(range(base + row.start, base + row.start + row.length))
            if bool(row.flags & 1) != turned:
                tokens.reverse()
            m = 1
            if row.type == BlockType.REDUCED:
                m = STRIDE << (row.level if resolution == "block" else 0)
            return [tokens[i : i + m] for i in range(0, len(tokens), m)]

        def read(row, turned):
            """Projected, convolved tokens of a block: a list of (run, u, z)."""
            before = list(history)
            found = []
            for run in runs(row, turned):
                u, z = (F.linear(x[0, run].mean(0), w) for w in mamba.in_proj.weight.chunk(2))
                before.append(u)
                c = mamba.conv1d.bias.clone()
                for k in range(mamba.d_conv):
                    if k < len(before):
                        c = c + mamba.conv1d.weight[:, 0, mamba.d_conv - 1 - k] * before[-1 - k]
                found.append((run, F.silu(c), z))
            return found, before

        def step(h, run, u, z, weight):
            dt, B, C = mamba.x_proj(u).split([mamba.dt_rank, mamba.d_state, mamba.d_state])
            delta = F.softplus(mamba.dt_proj(dt))[:, None]
            A = -torch.exp(mamba.A_log)
            steps = len(run)
            if mamba.options.reduce == "euler":
                delta, steps = delta * steps, 1
            for _ in range(steps):
                h = torch.exp(delta * A) * h + delta * B * u[:, None]
            y = ((h * C).sum(-1) + mamba.D * u) * F.silu(z)
            out[run] += weight * mamba.out_proj(y)
            return h

        def gated(level, index, inside, row):
            """Whether a node carries a gate."""
            if form == "none":
                return False
            if form.startswith("leaf"):
                return not inside and row is not None and row.level == level
            sibling = (index ^ 1) * (4 << level) < length
            if inside:
                return sibling and row.type == BlockType.FULL and which in ("merged", "all")
            return sibling and which in ("above", "all")

        def mix(h, after, level, index, inside, row):
            if not gated(level, index, inside, row):
                return after
            a = alpha(b, level, index)[:, None]
            return a * after + (1 - a) * h

        def read_inside(row, level, index, tokens, h, weight, turned):
            """Nodes below a block, in the order of the reading; eats `tokens`."""
            if level == 0 or row.type != BlockType.FULL:
                size = len(tokens)
                if row.type == BlockType.FULL:
                    size = min(4, length - index * 4)
                for _ in range(size):
                    h = step(h, *tokens.pop(0), weight)
                return h
            backwards = bool(row.flags & 1) != turned
            for child in (2 * index + 1, 2 * index) if backwards else (2 * index, 2 * index + 1):
                if child * (4 << (level - 1)) < length:
                    after = read_inside(row, level - 1, child, tokens, h, weight, turned)
                    h = mix(h, after, level - 1, child, True, row)
            return h

        def visit(level, index, h):
            start = index * (4 << level)
            found = [row for row in rows if row.start == start and row.level == level]
            if found:
                row = found[0]
                if row.type == BlockType.IDENTITY:
                    return h
                w = 0.0 if other is None else other[row.Index]
                tokens, after_block = read(row, False)
                ends = read_inside(row, level, index, tokens, h, 1 - w, False)
                if other is not None and not torch.isnan(torch.as_tensor(w)):
                    tokens, _ = read(row, True)
                    second = read_inside(row, level, index, tokens, h, w, True)
                    ends = (1 - w) * ends + w * second
                history[:] = after_block
                return ends
            for child in (2 * index, 2 * index + 1):
                if child * (4 << (level - 1)) < length:
                    row = next(r for r in rows if r.start == child * (4 << (level - 1)))
                    h = mix(h, visit(level - 1, child, h), level - 1, child, False, row)
            return h

        top = 0
        while 4 << top < length:
            top += 1
        row = rows[0]
        after = visit(top, 0, state)
        mix(state, after, top, 0, False, row)

    for b, length in enumerate(guide.lengths.tolist()):
        visit_sequence(b, length, int(guide.lengths[:b].sum()))
    return out[None]


def table(tree, channels: int, seed: int):
    """α by node, and the same as a module that looks it up."""
    draw = torch.Generator().manual_seed(seed)
    values = {
        (b, level, i): torch.rand(channels, dtype=F64, generator=draw)
        for level, nodes in enumerate(tree)
        for b in range(nodes.tokens.shape[0])
        for i in range(nodes.tokens.shape[1])
    }

    class LookUp(torch.nn.Module):
        def forward(self, nodes):
            rows = torch.stack([nodes.batch, nodes.level, nodes.index], 1).tolist()
            found = [values[tuple(row)] for row in rows]
            return torch.stack(found) if found else torch.zeros(0, channels, dtype=F64)

    return lambda *node: values[node], LookUp()


@settings(max_examples=25, deadline=None)
@given(
    lengths_of_batch,
    seeds,
    st.sampled_from(["block", "fixed"]),
    st.sampled_from(["exact", "euler"]),
)
def test_any_map_equals_the_walk(lengths, seed, resolution, reduce):
    flex = mixer(seed, resolution=resolution, reduce=reduce)
    x, guide = inputs(lengths, seed), random_map(lengths, 4, seed)
    wanted = walk(flex, x, guide, resolution=resolution)
    packed = flex(x, guide=guide, cu_seqlens=bounds(lengths))
    assert torch.allclose(packed, wanted, atol=1e-12)
    padded = flex(pad(x, lengths), torch.tensor(lengths), guide)
    assert torch.allclose(padded, pad(wanted, lengths), atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    lengths_of_batch,
    seeds,
    st.sampled_from(["leaf-scalar", "leaf-channel", "tree-scalar", "tree-channel"]),
    st.sampled_from(["merged", "above", "all"]),
    st.booleans(),
)
def test_gates_and_forks_equal_the_walk(lengths, seed, form, which, forked):
    flex = mixer(seed, gate_form=form, gate_nodes=which)
    x, guide = inputs(lengths, seed), random_map(lengths, 4, seed)
    tree = flex.router.tree(x, cu_seqlens=bounds(lengths))
    alpha, flex.node_gate = table(tree, 1 if form.endswith("scalar") else flex.d_inner, seed)
    route = Route.by_hand(guide, STRIDE)
    route = replace(route, gates=gated_nodes(tree, guide, route.packing, form, which))
    other = None
    if forked:
        draw = torch.Generator().manual_seed(seed)
        twice = torch.rand(len(guide), generator=draw) < 0.6
        weight = torch.rand(len(guide), dtype=F64, generator=draw)
        other = torch.where(twice, weight, torch.nan)
        readings = TwoReadings(guide, route.packing, twice, STRIDE, "block", None)
        reversal = torch.where(guide.reverse, 1 - weight, weight)
        route = replace(route, readings=readings, reversal=reversal)
        other = [float(w) if t else float("nan") for w, t in zip(weight, twice, strict=True)]
    got = flex(x, guide=route, cu_seqlens=bounds(lengths))
    if other is not None:
        plain = [0.0 if w != w else w for w in other]
        wanted = walk(flex, x, guide, form=form, which=which, alpha=alpha, other=plain)
    else:
        wanted = walk(flex, x, guide, form=form, which=which, alpha=alpha)
    assert torch.allclose(got, wanted, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(lengths_of_batch, seeds)
def test_a_map_of_full_forward_blocks_is_plain_mamba(lengths, seed):
    flex = mixer(seed)
    plain = Mamba(D_MODEL, 3, 3, d_inner=5, dt_rank=2).double()
    plain.load_state_dict({k: v for k, v in flex.state_dict().items() if k in plain.state_dict()})
    x = inputs(lengths, seed)
    guide = random_map(lengths, 4, seed, types=(0,), rev=False)
    wanted = plain(x, bounds(lengths))
    assert torch.allclose(flex(x, guide=guide, cu_seqlens=bounds(lengths)), wanted, atol=1e-12)
    route = replace(Route.by_hand(guide), factor=torch.ones(len(lengths), 9, dtype=F64))
    assert not route.is_plain
    by_blocks = flex(x, guide=route, cu_seqlens=bounds(lengths))
    assert torch.allclose(by_blocks, wanted, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), seeds)
def test_one_reversed_block_is_a_scan_from_right_to_left(length, seed):
    flex = mixer(seed)
    back = Mamba(D_MODEL, 3, 3, d_inner=5, dt_rank=2, reverse=True).double()
    back.load_state_dict({k: v for k, v in flex.state_dict().items() if k in back.state_dict()})
    guide = GuideMap.uniform(1, length, length, rev=True)
    x = inputs([length], seed)
    assert torch.allclose(flex(x, guide=guide), back(x), atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(lengths_of_batch, seeds)
def test_reversal_is_permute_mamba_permute_back(lengths, seed):
    flex = mixer(seed)
    x, guide = inputs(lengths, seed), random_map(lengths, 4, seed, types=(0,))
    order = guide.permutation()
    plain = random_map(lengths, 4, seed, types=(0,), rev=False)
    mixed = flex(x[:, order], guide=plain, cu_seqlens=bounds(lengths))
    back = torch.empty_like(mixed)
    back[:, order] = mixed
    assert torch.allclose(flex(x, guide=guide, cu_seqlens=bounds(lengths)), back, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(
    lengths_of_batch, seeds, st.sampled_from(["none", "leaf-channel", "tree-scalar"]),
    st.sampled_from(["hard", "soft"]),
)  # fmt: skip
def test_a_sequence_does_not_depend_on_its_batch(lengths, seed, form, rev_gate):
    flex = mixer(seed, gate_form=form, rev_gate=rev_gate, merge_threshold=0.3, target_ratio=0.5)
    flex.router.thresholds.copy_(torch.tensor([0.1, -0.1]))
    x = inputs(lengths, seed)
    together = flex(x, cu_seqlens=bounds(lengths))
    for part, wanted in zip(x[0].split(lengths), together[0].split(lengths), strict=True):
        assert torch.allclose(flex(part[None])[0], wanted, atol=1e-10)


def test_identity_blocks_are_zero_and_pass_the_state():
    flex = mixer(0)
    x = inputs([12], 0)
    guide = replace(GuideMap.uniform(1, 12, 4), type=torch.tensor([0, 2, 0]))
    y = flex(x, guide=guide)
    assert not y[:, 4:8].any()
    joined = flex(x[:, [0, 1, 2, 3, 8, 9, 10, 11]], guide=GuideMap.uniform(1, 8, 4))
    assert torch.allclose(y[:, [0, 1, 2, 3, 8, 9, 10, 11]], joined, atol=1e-12)
    nothing = GuideMap.uniform(1, 12, 4, type=BlockType.IDENTITY)
    assert not flex(x, guide=nothing).any()


def test_reduced_blocks_of_equal_tokens_are_exact_for_the_scan():
    flex = mixer(0)
    with torch.no_grad():  # a convolution that sees the present alone
        flex.conv1d.weight[..., :-1] = 0
    x = inputs([4], 0).repeat_interleave(4, 1)
    reduced = GuideMap.uniform(1, 16, 16, type=BlockType.REDUCED)
    y = mixer_with_stride(flex, 4)(x, guide=reduced)
    full = flex(x, guide=GuideMap.uniform(1, 16, 16))
    assert torch.allclose(y[:, 3::4], full[:, 3::4], atol=1e-12)


def mixer_with_stride(flex: FlexBlockMamba, stride: int) -> FlexBlockMamba:
    flex.options = flex.options.override({"reduce_stride": stride})
    return flex


@pytest.mark.parametrize(
    "options",
    [
        {"gate_form": "tree-channel"},
        {"gate_form": "leaf-scalar", "rev_gate": "soft"},
        {"gate_form": "tree-scalar", "rev_gate": "soft", "router_gradient": "gate"},
    ],
)
def test_gradcheck(options):
    flex = mixer(3, merge_threshold=0.0, **options)
    flex.router.thresholds.copy_(torch.tensor([0.0, -0.3]))
    lengths = [9, 6]
    x = inputs(lengths, 3).requires_grad_()
    names = [n for n, p in flex.named_parameters() if not n.startswith("router.scorer.")]
    leaves = [dict(flex.named_parameters())[n] for n in names]
    # The router does not send gradients to x; hold its map still.
    with torch.no_grad():
        route = flex.router(x, cu_seqlens=bounds(lengths))

    def run(x, *tensors):
        return torch.func.functional_call(
            flex, dict(zip(names, tensors, strict=False)), (x,),
            {"guide": route, "cu_seqlens": bounds(lengths)}, strict=False,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, (x, *leaves))


def test_what_does_not_fit_is_refused():
    flex, x = mixer(0), inputs([9], 0)
    with pytest.raises(ValueError, match="sequences of"):
        flex(x, guide=GuideMap.uniform(1, 8, 4))
    follower = FlexBlockMamba(D_MODEL, l0=4, own_router=False)
    with pytest.raises(ValueError, match="hand it a guide"):
        follower(x.float())
    gated = FlexBlockMamba(D_MODEL, l0=4, own_router=False, gate_form="tree-scalar")
    with pytest.raises(ValueError, match="attributes"):
        gated(x.float(), guide=GuideMap.uniform(1, 9, 4))
    with pytest.raises(Exception, match="remerge_threshold"):
        FlexBlockMamba(D_MODEL, merge_threshold=0.5, remerge_threshold=0.9)


def test_a_root_and_an_only_child_have_no_gate():
    flex = mixer(0, gate_form="tree-scalar")
    guide = random_map([9], 4, 0, types=(0,), split=1.0)
    tree = flex.router.tree(inputs([9], 0))
    nodes = gated_nodes(tree, guide, guide.pack(), "tree-scalar", "all")
    found = sorted(zip(nodes.level.tolist(), nodes.index.tolist(), strict=True))
    assert found == [(0, 0), (0, 1), (1, 0), (1, 1)]  # not leaf 2, an only child, nor the root
