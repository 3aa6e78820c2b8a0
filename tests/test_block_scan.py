"""The block scan: the explicit definition, and every backend against it."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import (
    F64,
    assert_close,
    bounds,
    compiled,
    outputs_and_gradients,
    poison,  # noqa: F401  (what a kernel forgets to write shows as NaN)
    scan_inputs,
)

from flexbench.kernels import block_scan, selective_scan

Bounds = list[tuple[int, int, int]]


def random_nodes(lengths: list[int], seed: int) -> Bounds:
    """Nodes that nest: gates and forks, side by side, one in another, some with equal bounds."""
    chance = random.Random(seed)
    nodes: Bounds = []

    def fill(start: int, end: int, depth: int) -> None:
        while start < end:
            start += chance.randint(0, max(1, (end - start) // 2))
            stop = min(end, start + chance.randint(1, 20))
            if start >= stop:
                return
            if chance.random() < 0.2:
                nodes.append((start, start, start))
            middle = start if chance.random() < 0.6 else chance.randrange(start, stop)
            nodes.append((start, middle, stop))
            if depth:
                fill(start, middle, depth - 1)
                fill(middle, stop, depth - 1)
            start = stop

    at = 0
    for length in lengths:
        fill(at, at + length, 3)
        at += length
    outer_first = sorted(nodes, key=lambda node: node[0] - node[2])
    return outer_first if seed % 2 else nodes


def random_cuts(lengths: list[int], seed: int) -> torch.Tensor:
    chance = random.Random(seed)
    edges = bounds(lengths).tolist()
    inner = chance.choices(range(edges[-1] + 1), k=chance.randint(0, 9)) if edges[-1] else []
    return torch.tensor(sorted({*edges, *inner})).int()


def inputs_with(nodes: Bounds, lengths: list[int], dim: int, state: int, seed: int, wide: bool):
    inputs = scan_inputs(1, sum(lengths), dim, state, seed, len(lengths))
    draw = torch.Generator().manual_seed(seed)
    alpha = torch.rand(len(nodes), dim if wide else 1, dtype=F64, generator=draw)
    return {**inputs, "alpha": alpha}


def plain_walk(lengths, nodes, u, delta, A, B, C, D, z, delta_bias, initial_state, alpha, repeats):
    """Token by token, a stack of the states at which the open nodes began."""
    delta = torch.nn.functional.softplus(delta + delta_bias)
    edges = bounds(lengths).tolist()
    y, last = [], []
    for i, (start, end) in enumerate(itertools.pairwise(edges)):
        real = [k for k, node in enumerate(nodes) if node[0] < node[2]]
        inside = [k for k in real if start <= nodes[k][0] and nodes[k][2] <= end]
        inside.sort(key=lambda k: (nodes[k][0], -nodes[k][2], k))
        h, first = initial_state[i], {}
        entered = {}
        for t in range(start, end + 1):
            for k in reversed(inside):
                if nodes[k][2] == t:
                    h = (1 - alpha[k][:, None]) * first[k] + alpha[k][:, None] * h
            for k in inside:
                if nodes[k][0] == t:
                    entered[k] = first[k] = h
                if nodes[k][1] == t and nodes[k][0] < t:
                    first[k], h = h, entered[k]
            if t < end:
                for _ in range(1 if repeats is None else int(repeats[0, t])):
                    step = delta[0, t, :, None]
                    h = torch.exp(step * A) * h + step * B[0, t] * u[0, t, :, None]
                out = (h * C[0, t]).sum(-1) + D * u[0, t]
                y.append(out * torch.nn.functional.silu(z[0, t]))
        last.append(h)
    return torch.stack(y)[None], torch.stack(last)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 25), min_size=1, max_size=3), st.booleans(), st.booleans(),
    st.integers(0, 2**20),
)  # fmt: skip
def test_reference_equals_a_walk_with_a_stack(lengths, wide, repeated, seed):
    nodes = random_nodes(lengths, seed)
    inputs = inputs_with(nodes, lengths, 3, 2, seed, wide)
    repeats = torch.randint(1, 5, (1, sum(lengths))) if repeated else None
    got = block_scan(
        **inputs,
        cu_blocks=random_cuts(lengths, seed),
        cu_seqlens=bounds(lengths),
        nodes=torch.tensor(nodes).reshape(-1, 3).int(),
        delta_softplus=True,
        repeats=repeats,
        return_last_state=True,
        backend="reference",
    )
    assert_close(list(got), list(plain_walk(lengths, nodes, **inputs, repeats=repeats)), 1e-10)


@compiled
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=3),
    st.integers(1, 40),
    st.sampled_from([1, 3, 8, 16, 17]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**20),
)
def test_cpu_equals_reference(lengths, dim, state, wide, repeated, seed):
    nodes = random_nodes(lengths, seed)
    inputs = inputs_with(nodes, lengths, dim, state, seed, wide)
    draw = torch.Generator().manual_seed(seed)
    repeats = torch.randint(1, 12, (1, sum(lengths)), generator=draw) if repeated else None

    def run(backend: str, cuts: torch.Tensor):
        return lambda **leaves: block_scan(
            **leaves,
            cu_blocks=cuts,
            cu_seqlens=bounds(lengths),
            nodes=torch.tensor(nodes).reshape(-1, 3).int(),
            delta_softplus=True,
            repeats=repeats,
            return_last_state=True,
            backend=backend,
        )

    got = outputs_and_gradients(run("cpu", bounds(lengths)), inputs, torch.float32)
    wanted = outputs_and_gradients(run("reference", random_cuts(lengths, seed)), inputs, F64)
    assert_close(got, wanted, 5e-5)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(0, 2**20))
def test_without_gates_the_cuts_change_nothing(lengths, seed):
    inputs = scan_inputs(1, sum(lengths), 3, 4, seed, len(lengths))
    packed = {"cu_seqlens": bounds(lengths), "delta_softplus": True, "return_last_state": True}
    wanted = selective_scan(**inputs, **packed, backend="reference")
    blocks = block_scan(**inputs, **packed, cu_blocks=random_cuts(lengths, seed))
    assert_close(list(blocks), list(wanted), 1e-10)
    nodes = random_nodes(lengths, seed)
    gates = torch.tensor([(s, s, e) for s, _, e in nodes]).reshape(-1, 3).int()
    ones = torch.ones(len(gates), 1, dtype=F64)
    open_gates = {"cu_blocks": bounds(lengths), "nodes": gates, "alpha": ones}
    assert_close(list(block_scan(**inputs, **packed, **open_gates)), list(wanted), 1e-10)


def test_closed_gates_leave_the_state_at_the_initial_one():
    inputs = scan_inputs(1, 12, 3, 2, sequences=1)
    nodes = torch.tensor([[0, 0, 4], [4, 4, 8], [8, 8, 12]]).int()
    cuts = bounds([4, 4, 4])
    y, last = block_scan(
        **inputs, cu_blocks=cuts, nodes=nodes, alpha=torch.zeros(3, 1), return_last_state=True
    )
    assert torch.equal(last, inputs["initial_state"])
    rows = {k: v[:, 8:] if v.dim() == 3 and k != "initial_state" else v for k, v in inputs.items()}
    assert_close([y[:, 8:]], [selective_scan(**rows)], 1e-12)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("repeated", [False, True])
def test_gradcheck(wide, repeated):
    nodes = [(0, 0, 7), (0, 0, 4), (1, 2, 4), (4, 4, 7), (7, 9, 10)]
    inputs = inputs_with(nodes, [7, 4], 2, 2, 0, wide)
    repeats = torch.randint(1, 4, (1, 11)) if repeated else None
    names = list(inputs)

    def run(*tensors):
        return block_scan(
            **dict(zip(names, tensors, strict=True)),
            cu_blocks=bounds([4, 3, 4]),
            cu_seqlens=bounds([7, 4]),
            nodes=torch.tensor(nodes).int(),
            delta_softplus=True,
            repeats=repeats,
            return_last_state=True,
        )

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in inputs.values()])


@compiled
def test_bits_do_not_depend_on_threads():
    nodes = random_nodes([700, 301], 1)
    inputs = inputs_with(nodes, [700, 301], 100, 16, 0, True)
    run = lambda **x: block_scan(  # noqa: E731
        **x, cu_blocks=bounds([700, 301]), cu_seqlens=bounds([700, 301]),
        nodes=torch.tensor(nodes).int(), delta_softplus=True,
    )  # fmt: skip
    found = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        found.append(outputs_and_gradients(run, inputs, torch.float32))
    torch.set_num_threads(1)
    for one, two in itertools.combinations(found, 2):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"nodes": [[0, 0, 5], [3, 3, 7]]}, "nest"),
        ({"nodes": [[0, 0, 9]]}, "nest"),
        ({"nodes": [[3, 2, 4]]}, "nest"),
        ({"nodes": [[2, 4, 4]]}, "nest"),
        ({"nodes": [[0, 2, 5], [1, 1, 3]]}, "nest"),
        ({"nodes": [[0, 0, 5]], "alpha": torch.ones(2, 1)}, "alpha"),
        ({"cu_blocks": bounds([4, 4])}, "rise"),
        ({"backend": "cuda"}, "no backend"),
    ],
)
def test_what_cannot_be_is_refused(change, problem):
    inputs = scan_inputs(1, 11, 3, 2, sequences=2)
    call = {"cu_blocks": bounds([4, 3, 4]), "cu_seqlens": bounds([7, 4]), **change}
    if "nodes" in call:
        call["nodes"] = torch.tensor(call["nodes"]).int()
        call.setdefault("alpha", torch.ones(len(call["nodes"]), 1))
    with pytest.raises(ValueError, match=problem):
        block_scan(**inputs, **call)
