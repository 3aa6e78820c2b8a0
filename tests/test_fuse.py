"""hzip_fuse: the compiled kernel against the reference, the reference against the formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import (  # noqa: F401  (poison is an autouse fixture)
    F64,
    assert_close,
    bounds,
    compiled,
    outputs_and_gradients,
    poison,
)
from torch import Tensor

from flexbench.kernels import hzip_fuse, hzip_gates
from flexbench.kernels.fuse.cpu import hzip_fuse_op

OPTIONAL = ("z", "taps", "taps_bias", "down", "hidden", "hidden_bias", "up", "diagonal", "bias")


def fuse_inputs(
    batch: int,
    length: int,
    dim: int,
    *,
    rank: int = 3,
    width: int = 3,
    window: int = 1,
    absent: set[str] | frozenset[str] = frozenset(),
    seed: int = 0,
) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, dtype=F64, generator=draw)  # noqa: E731
    absent = set(absent)
    absent |= {"taps_bias"} if "taps" in absent else set()
    absent |= {"down", "hidden", "hidden_bias"} if "up" in absent else set()
    features = ("taps" not in absent) + 2 * (window > 0)
    inputs = {
        "y_f": normal(batch, length, dim),
        "y_b": normal(batch, length, dim),
        "z": normal(batch, length, dim),
        "taps": normal(dim, 2, width),
        "taps_bias": normal(dim),
        "down": normal(2 * rank, features, dim) / math.sqrt(dim),
        "hidden": normal(batch, length, 2 * rank),
        "hidden_bias": normal(2 * rank),
        "up": normal(2, dim, rank),
        "diagonal": normal(2, features, dim),
        "bias": normal(2, dim),
    }
    return {name: tensor for name, tensor in inputs.items() if name not in absent}


@compiled
@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=4),
    dim=st.integers(1, 40),
    rank=st.sampled_from([1, 3, 8, 17]),
    width=st.sampled_from([1, 3, 5]),
    window=st.integers(0, 4),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    absent=st.sets(st.sampled_from(OPTIONAL)),
    seed=st.integers(0, 2**20),
)
def test_packed(lengths, dim, rank, width, window, flags, absent, seed):
    sizes = {"rank": rank, "width": width, "window": window, "absent": absent, "seed": seed}
    inputs = fuse_inputs(1, sum(lengths), dim, **sizes)
    options: dict[str, Any] = dict(zip(("centred", "normalise", "softmax"), flags, strict=True))
    options |= {"window": window, "cu_seqlens": bounds(lengths)}
    run = lambda backend: lambda **x: hzip_fuse(**x, **options, backend=backend)  # noqa: E731
    got = outputs_and_gradients(run("cpu"), inputs, torch.float32)
    assert_close(got, outputs_and_gradients(run("reference"), inputs, F64), 2e-5)


@compiled
@pytest.mark.parametrize(("batch", "length", "dim"), [(0, 5, 3), (3, 1, 16), (2, 1100, 33)])
def test_batched(batch, length, dim):
    inputs = fuse_inputs(batch, length, dim)
    run = lambda backend: lambda **x: hzip_fuse(**x, window=1, backend=backend)  # noqa: E731
    got = outputs_and_gradients(run("cpu"), inputs, torch.float32)
    assert_close(got, outputs_and_gradients(run("reference"), inputs, F64), 2e-5)


def by_the_formulas(inputs: dict[str, Tensor], window: int, smoothing: int, centred: bool):
    """One sequence, one number at a time."""
    y_f, y_b = inputs["y_f"][0], inputs["y_b"][0]
    length, dim = y_f.shape
    half = inputs["taps"].shape[2] // 2
    silu = lambda v: v / (1 + math.exp(-v))  # noqa: E731

    def rate(y: Tensor, t: int, d: int, side: int) -> float:
        steps = [side * j for j in range(1, window + 1)]
        steps += [-step for step in steps] if centred else []
        there = [t + step for step in steps if 0 <= t + step < length]
        return sum(abs(y[t, d] - y[o, d]).item() for o in there) / max(len(there), 1)

    def smooth(y: Tensor, t: int, d: int, side: int) -> float:
        near = [t + o for o in range(-(smoothing // 2), smoothing // 2 + 1) if 0 <= t + o < length]
        return sum(rate(y, o, d, side) for o in near) / len(near)

    out = torch.zeros(length, dim, dtype=F64)
    rank = inputs["up"].shape[2]
    for t in range(length):
        features = []
        for d in range(dim):
            context = inputs["taps_bias"][d].item()
            for k in range(2 * half + 1):
                if 0 <= t + k - half < length:
                    context += (inputs["taps"][d, 0, k] * y_f[t + k - half, d]).item()
                    context += (inputs["taps"][d, 1, k] * y_b[t + k - half, d]).item()
            features.append((silu(context), smooth(y_f, t, d, -1), smooth(y_b, t, d, 1)))
        hidden = []
        for r in range(2 * rank):
            value = (inputs["hidden"][0, t, r] + inputs["hidden_bias"][r]).item()
            for d in range(dim):
                value += sum(inputs["down"][r, f, d].item() * features[d][f] for f in range(3))
            hidden.append(silu(value))
        for d in range(dim):
            for g, y in enumerate((y_f, y_b)):
                logit = inputs["bias"][g, d].item()
                logit += sum(inputs["diagonal"][g, f, d].item() * features[d][f] for f in range(3))
                logit += sum(
                    inputs["up"][g, d, r].item() * hidden[g * rank + r] for r in range(rank)
                )
                out[t, d] += y[t, d] / (1 + math.exp(-logit))
            out[t, d] *= silu(inputs["z"][0, t, d].item())
    return out[None]


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize(
    ("window", "smoothing", "centred"), [(1, 1, False), (3, 1, False), (2, 3, True)]
)
def test_reference_is_the_formulas(length, window, smoothing, centred):
    inputs = fuse_inputs(1, length, 3, rank=2, window=window)
    options = {"window": window, "smoothing": smoothing, "centred": centred}
    y = hzip_fuse(**inputs, **options)
    torch.testing.assert_close(y, by_the_formulas(inputs, **options))


def test_normalised_features_and_gates_that_sum_to_one():
    inputs = fuse_inputs(1, 6, 4, absent={"hidden", "hidden_bias", "down", "up", "bias", "taps"})
    g_f, g_b = hzip_gates(
        **{k: v for k, v in inputs.items() if k != "z"}, window=1, normalise=True, softmax=True
    )
    y_f, y_b = inputs["y_f"], inputs["y_b"]
    zero = torch.zeros(1, 1, 4, dtype=F64)
    rates = [
        torch.cat([zero, y_f.diff(dim=1).abs()], 1),
        torch.cat([y_b.diff(dim=1).abs(), zero], 1),
    ]
    rates = [rate / (rate.square().mean(-1, keepdim=True) + 1e-5).sqrt() for rate in rates]
    logits = [sum(d * r for d, r in zip(row, rates, strict=True)) for row in inputs["diagonal"]]
    wanted = torch.stack(logits).softmax(0)
    torch.testing.assert_close(torch.stack([g_f, g_b]), wanted)


@pytest.mark.parametrize("flags", [(False, False), (True, True)])
def test_reference_gradcheck(flags):
    inputs = fuse_inputs(1, 5, 2, rank=2, window=2)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]

    def run(*values):
        named = dict(zip(inputs, values, strict=True))
        options = {"normalise": flags[0], "softmax": flags[1], "cu_seqlens": bounds([3, 2])}
        return hzip_fuse(**named, **options, window=2, smoothing=3)

    assert torch.autograd.gradcheck(run, leaves)


@compiled
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_packed_sequences_are_what_they_are_alone_to_the_bit(backend):
    lengths = [1, 70, 2, 33, 0, 5]
    inputs = {k: v.float() for k, v in fuse_inputs(1, sum(lengths), 20, width=5, window=3).items()}
    together = hzip_fuse(**inputs, window=3, cu_seqlens=bounds(lengths), backend=backend)
    timed = ("y_f", "y_b", "z", "hidden")
    start = 0
    for length in lengths:
        alone = {k: v[:, start : start + length] if k in timed else v for k, v in inputs.items()}
        got = together[:, start : start + length]
        wanted = hzip_fuse(**alone, window=3, backend=backend)
        if backend == "cpu":
            assert torch.equal(got, wanted)
        else:
            torch.testing.assert_close(got, wanted)
        start += length


@compiled
def test_gates_are_a_half_where_nothing_is_given_or_all_is_zero():
    inputs = {k: v.float() for k, v in fuse_inputs(2, 40, 24).items()}
    y_f, y_b = inputs["y_f"], inputs["y_b"]
    for backend in ("cpu", "reference"):
        torch.testing.assert_close(hzip_fuse(y_f, y_b, backend=backend), 0.5 * (y_f + y_b))
        closed = {**inputs, "z": None} | {
            name: torch.zeros_like(inputs[name]) for name in ("up", "diagonal", "bias")
        }
        fused = hzip_fuse(**closed, window=1, backend=backend)
        torch.testing.assert_close(fused, 0.5 * (y_f + y_b))


@compiled
def test_bits_do_not_depend_on_threads():
    inputs = fuse_inputs(3, 1030, 100)
    before = torch.get_num_threads()
    seen = []
    try:
        for threads in (1, 2, 5, 1):
            torch.set_num_threads(threads)
            run = lambda **x: hzip_fuse(**x, window=1, normalise=True, backend="cpu")  # noqa: E731
            seen.append(outputs_and_gradients(run, inputs, torch.float32))
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@compiled
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_and_out(dtype):
    inputs = {k: v.to(dtype) for k, v in fuse_inputs(2, 33, 20).items()}
    exact = hzip_fuse(**{k: v.float() for k, v in inputs.items()}, window=1, backend="cpu")
    y = hzip_fuse(**inputs, window=1, backend="cpu")
    assert y.dtype == dtype
    assert torch.equal(y, exact.to(dtype))


@compiled
def test_opcheck(monkeypatch):
    monkeypatch.undo()
    for absent in (set(), {"z", "up", "bias"}):
        inputs = fuse_inputs(1, 21, 5, absent=absent)
        given = {k: v.float().requires_grad_() for k, v in inputs.items()}
        tensors = [given.get(name) for name in ("y_f", "y_b", *OPTIONAL)]
        torch.library.opcheck(hzip_fuse_op, (*tensors, bounds([13, 8]), 1, False, True, not absent))


@compiled
def test_compiles_without_graph_breaks(monkeypatch):
    monkeypatch.undo()
    inputs = fuse_inputs(2, 20, 8)
    step = lambda **x: hzip_fuse(**x, window=1)  # noqa: E731
    wanted = outputs_and_gradients(step, inputs, torch.float32)
    fast = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_close(outputs_and_gradients(fast, inputs, torch.float32), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "no backend 'cuda'"),
        ({"backend": "cpu", "smoothing": 3}, "does not smooth"),
        ({"smoothing": 2}, "smoothing odd"),
        ({"taps": torch.zeros(4, 2, 2)}, "an odd width"),
        ({"up": torch.zeros(2, 4, 5)}, "down must be"),
        ({"window": 0}, "down must be"),
        ({"bias": torch.zeros(4)}, "bias must be"),
        ({"y_b": torch.zeros(2, 5, 3)}, "y_b must be"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "batch must be 1"),
    ],
)
def test_refusals(change, message):
    inputs: dict[str, Any] = {k: v.float() for k, v in fuse_inputs(2, 5, 4).items()}
    with pytest.raises(ValueError, match=message):
        hzip_fuse(**({**inputs, "window": 1} | change))
