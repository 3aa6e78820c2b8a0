"""Every backend against the float64 reference, and the reference against the definition."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexbench.kernels import (
    causal_conv1d,
    gather_runs,
    rms_norm,
    scatter_runs,
    selective_scan,
)
from flexbench.kernels.block import schedule
from flexbench.kernels.build import library
from flexbench.kernels.conv.cpu import causal_conv1d_op
from flexbench.kernels.scan.cpu import TILE, selective_scan_op

compiled = pytest.mark.skipif(library() is None, reason="no C++ compiler")
F64 = torch.float64


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def scan_inputs(
    batch: int, length: int, dim: int, state: int, seed: int = 0, sequences: int | None = None
) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, dtype=F64, generator=draw)  # noqa: E731
    return {
        "u": normal(batch, length, dim),
        "delta": normal(batch, length, dim),
        "A": -torch.rand(dim, state, dtype=F64, generator=draw) * 4 - 0.01,
        "B": normal(batch, length, state),
        "C": normal(batch, length, state),
        "D": normal(dim),
        "z": normal(batch, length, dim),
        "delta_bias": normal(dim),
        "initial_state": normal(sequences or batch, dim, state),
    }


def outputs_and_gradients(function, inputs: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    leaves = {k: v.to(dtype).requires_grad_() for k, v in inputs.items()}
    result = function(**leaves)
    outputs = result if isinstance(result, tuple) else (result,)
    draw = torch.Generator().manual_seed(7)
    weights = [torch.randn(o.shape, dtype=F64, generator=draw).to(o) for o in outputs]
    total = sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))
    gradients = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return [*outputs, *gradients]


def assert_close(got: list[Tensor], wanted: list[Tensor], tolerance: float = 5e-6) -> None:
    for i, (g, w) in enumerate(zip(got, wanted, strict=True)):
        assert g.shape == w.shape
        scale = w.abs().max().clamp_min(1.0) if w.numel() else 1.0
        error = ((g.double() - w.double()).abs() / scale).max() if w.numel() else torch.zeros(())
        assert error < tolerance, f"tensor {i}: relative error {error:.2e}"


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel forgets to write shows as NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs) -> Tensor:
        made = empty(*args, **kwargs)
        return (
            made.fill_(float("nan"))
            if made.is_floating_point() and made.device.type != "meta"
            else made
        )

    monkeypatch.setattr(torch, "empty", poisoned)


@compiled
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=4),
    st.integers(1, 40),
    st.sampled_from([1, 2, 3, 4, 5, 8, 13, 16, 17, 24, 33]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**20),
)
def test_scan_packed(lengths, dim, state, reverse, softplus, repeated, seed):
    total = sum(lengths)
    inputs = scan_inputs(1, total, dim, state, seed, len(lengths))
    if not softplus:
        inputs["delta"] = inputs["delta"].abs()
        inputs["delta_bias"] = inputs["delta_bias"].abs()
    draw = torch.Generator().manual_seed(seed)
    repeats = torch.randint(1, 12, (1, total), generator=draw) if repeated else None

    def run(backend: str):
        return lambda **leaves: selective_scan(
            **leaves,
            delta_softplus=softplus,
            cu_seqlens=bounds(lengths),
            repeats=repeats,
            reverse=reverse,
            return_last_state=True,
            backend=backend,
        )

    got = outputs_and_gradients(run("cpu"), inputs, torch.float32)
    wanted = outputs_and_gradients(run("reference"), inputs, F64)
    assert_close(got, wanted, 2e-5)


@compiled
@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 4),
    st.integers(1, 70),
    st.integers(1, 300),
    st.integers(1, 20),
    st.sets(st.sampled_from(["D", "z", "delta_bias", "initial_state"])),
)
def test_scan_batched_with_any_inputs_left_out(batch, length, dim, state, absent):
    inputs = {k: v for k, v in scan_inputs(batch, length, dim, state).items() if k not in absent}
    run = lambda b: lambda **x: selective_scan(**x, delta_softplus=True, backend=b)  # noqa: E731
    got = outputs_and_gradients(run("cpu"), inputs, torch.float32)
    assert_close(got, outputs_and_gradients(run("reference"), inputs, F64), 2e-5)


@compiled
def test_both_sides_agree_on_the_tile():
    compiled_kernels = library()
    assert compiled_kernels is not None
    assert compiled_kernels.flexbench_scan_tile() == TILE


@compiled
def test_scan_reads_strided_views():
    inputs = scan_inputs(2, 21, 24, 8)
    wide = torch.randn(2, 21, 60)
    cuts = {"u": (0, 24), "z": (24, 48), "B": (44, 52), "C": (52, 60)}
    views = {name: wide[..., start:end] for name, (start, end) in cuts.items()}
    run = lambda **x: selective_scan(**x, delta_softplus=True, backend="cpu")  # noqa: E731
    plain = {k: v.float() for k, v in inputs.items()}
    got = run(**{**plain, **views})
    wanted = run(**{**plain, **{k: v.contiguous() for k, v in views.items()}})
    assert torch.equal(got, wanted)


@compiled
@pytest.mark.parametrize("reverse", [False, True])
def test_bits_do_not_depend_on_threads(reverse):
    inputs = scan_inputs(3, 150, 200, 16)
    conv = {"x": inputs["u"], "weight": torch.randn(200, 4, dtype=F64), "bias": inputs["D"]}
    before = torch.get_num_threads()
    seen = []
    try:
        for threads in (1, 2, 5, 1):
            torch.set_num_threads(threads)
            scanned = outputs_and_gradients(
                lambda **x: selective_scan(
                    **x, delta_softplus=True, reverse=reverse, backend="cpu"
                ),
                inputs,
                torch.float32,
            )
            convolved = outputs_and_gradients(
                lambda **x: causal_conv1d(**x, reverse=reverse, backend="cpu"), conv, torch.float32
            )
            normed = outputs_and_gradients(
                rms_norm, {"x": inputs["u"], "weight": inputs["D"]}, torch.float32
            )
            seen.append(scanned + convolved + normed)
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@compiled
def test_half_precision_in_and_out(dtype):
    inputs = {k: v.to(dtype) for k, v in scan_inputs(2, 33, 20, 16).items()}
    options = {"delta_softplus": True, "return_last_state": True, "backend": "cpu"}
    y, last = selective_scan(**inputs, **options)
    wide = {k: v.float() for k, v in inputs.items()}
    exact, exact_last = selective_scan(**wide, **options)
    assert y.dtype == dtype
    assert last.dtype == torch.float32
    assert torch.equal(y, exact.to(dtype))
    assert torch.equal(last, exact_last)


def explicit_scan(u, delta, A, B, C):
    """The recurrence written out, one number at a time."""
    batch, length, dim = u.shape
    y = torch.zeros_like(u)
    for b in range(batch):
        for d in range(dim):
            h = [0.0] * A.shape[1]
            for t in range(length):
                for n in range(A.shape[1]):
                    decay = torch.exp(delta[b, t, d] * A[d, n])
                    h[n] = decay * h[n] + delta[b, t, d] * B[b, t, n] * u[b, t, d]
                    y[b, t, d] += C[b, t, n] * h[n]
    return y


def test_reference_is_the_recurrence():
    names = ("u", "delta", "A", "B", "C")
    inputs = {k: v for k, v in scan_inputs(2, 7, 3, 2).items() if k in names}
    inputs["delta"] = inputs["delta"].abs()
    y = selective_scan(**inputs, backend="reference")
    torch.testing.assert_close(y, explicit_scan(**inputs))


@pytest.mark.parametrize("reverse", [False, True])
def test_reference_gradcheck(reverse):
    inputs = scan_inputs(1, 6, 2, 3, sequences=2)
    repeats = torch.tensor([[1, 3, 2, 1, 7, 1]])
    leaves = [v.requires_grad_() for v in inputs.values()]

    def run(*values):
        return selective_scan(
            **dict(zip(inputs, values, strict=True)),
            delta_softplus=True,
            cu_seqlens=bounds([4, 2]),
            repeats=repeats,
            reverse=reverse,
            return_last_state=True,
        )

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_repeated_token_equals_its_copies(reverse):
    inputs = scan_inputs(2, 9, 5, 4)
    repeats = torch.tensor([[1, 2, 5, 1, 1, 31, 4, 1, 2], [3, 1, 1, 1, 8, 2, 1, 1, 64]])
    for row in range(2):
        one = {k: v[row : row + 1] if v.dim() == 3 else v for k, v in inputs.items()}
        times = repeats[row]
        copies = {
            k: v.repeat_interleave(times, 1) if k in ("u", "delta", "B", "C", "z") else v
            for k, v in one.items()
        }
        options = {"delta_softplus": True, "reverse": reverse, "return_last_state": True}
        got, last = selective_scan(**one, repeats=times[None], **options)
        wanted, wanted_last = selective_scan(**copies, **options)
        ends = times.cumsum(0)
        read = ends - times if reverse else ends - 1
        torch.testing.assert_close(got, wanted[:, read])
        torch.testing.assert_close(last, wanted_last)


@compiled
@pytest.mark.parametrize("scale", [0.0, 1e-8, 1e-4, 1e-2, 1.0, 50.0])
def test_repeats_at_every_scale_of_decay(scale):
    inputs = {k: v for k, v in scan_inputs(2, 20, 9, 4).items() if k not in ("delta_bias",)}
    inputs["delta"] = inputs["delta"].abs() * scale
    repeats = torch.randint(1, 200, (2, 20), generator=torch.Generator().manual_seed(1))
    run = lambda b: lambda **x: selective_scan(**x, repeats=repeats, backend=b)  # noqa: E731
    got = outputs_and_gradients(run("cpu"), inputs, torch.float32)
    assert_close(got, outputs_and_gradients(run("reference"), inputs, F64), 5e-5)


@compiled
def test_zero_step_is_the_identity():
    inputs = {k: v.float() for k, v in scan_inputs(1, 40, 8, 16).items() if k != "delta_bias"}
    inputs["delta"] = torch.zeros_like(inputs["delta"])
    _, last = selective_scan(**inputs, return_last_state=True, backend="cpu")
    assert torch.equal(last, inputs["initial_state"])


@compiled
def test_states_chain():
    inputs = {k: v.float() for k, v in scan_inputs(2, 64, 20, 8).items()}
    timed = ("u", "delta", "B", "C", "z")
    options = {"delta_softplus": True, "return_last_state": True, "backend": "cpu"}
    whole, last = selective_scan(**inputs, **options)
    first = {k: v[:, :48] if k in timed else v for k, v in inputs.items()}
    second = {k: v[:, 48:] if k in timed else v for k, v in inputs.items()}
    y1, carried = selective_scan(**first, **options)
    second["initial_state"] = carried
    y2, end = selective_scan(**second, **options)
    torch.testing.assert_close(torch.cat([y1, y2], 1), whole)
    torch.testing.assert_close(end, last)


@compiled
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 600), min_size=1, max_size=4),
    st.integers(1, 40),
    st.integers(2, 4),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_conv(lengths, dim, width, bias, silu, reverse):
    total = sum(lengths)
    draw = torch.Generator().manual_seed(total + dim)
    inputs = {
        "x": torch.randn(1, total, dim, dtype=F64, generator=draw),
        "weight": torch.randn(dim, width, dtype=F64, generator=draw),
    }
    if bias:
        inputs["bias"] = torch.randn(dim, dtype=F64, generator=draw)

    def run(backend: str):
        return lambda **leaves: causal_conv1d(
            **leaves,
            activation="silu" if silu else None,
            cu_seqlens=bounds(lengths),
            reverse=reverse,
            backend=backend,
        )

    got = outputs_and_gradients(run("cpu"), inputs, torch.float32)
    wanted = outputs_and_gradients(run("reference"), inputs, F64)
    assert_close(got[:2], wanted[:2])
    # Sums over the tokens, which may cancel down to less than what rounding adds up to.
    assert_close(got[2:], wanted[2:], 5e-6 * max(1, total) ** 0.5)


@pytest.mark.parametrize("reverse", [False, True])
def test_conv_reference_is_torch_conv1d(reverse):
    x, weight, bias = torch.randn(2, 9, 5), torch.randn(5, 4), torch.randn(5)
    y = causal_conv1d(x, weight, bias, reverse=reverse, backend="reference")
    read = x.flip(1) if reverse else x
    wanted = torch.nn.functional.conv1d(
        read.transpose(1, 2), weight[:, None], bias, padding=3, groups=5
    )[..., :9].transpose(1, 2)
    torch.testing.assert_close(y, wanted.flip(1) if reverse else wanted)


@pytest.mark.parametrize("reverse", [False, True])
def test_conv_reference_gradcheck(reverse):
    inputs = [
        torch.randn(1, 7, 2, dtype=F64),
        torch.randn(2, 3, dtype=F64),
        torch.randn(2, dtype=F64),
    ]
    run = lambda x, w, b: causal_conv1d(  # noqa: E731
        x, w, b, activation="silu", cu_seqlens=bounds([3, 4]), reverse=reverse
    )
    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in inputs])


@compiled
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 600), st.integers(1, 70))
def test_rms_norm(rows, dim):
    draw = torch.Generator().manual_seed(rows + dim)
    inputs = {
        "x": torch.randn(rows, dim, dtype=F64, generator=draw),
        "weight": torch.randn(dim, dtype=F64, generator=draw),
    }
    # Away from zero, where the gradient is a difference of large numbers.
    inputs["x"] += inputs["x"].sign()

    def by_definition(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    got = outputs_and_gradients(rms_norm, inputs, torch.float32)
    wanted = outputs_and_gradients(by_definition, inputs, F64)
    assert_close(got, wanted)
    reference = outputs_and_gradients(rms_norm, inputs, F64)
    assert_close(reference, wanted, 1e-12)


@compiled
def test_opcheck(monkeypatch):
    monkeypatch.undo()
    inputs = {
        k: v.float().requires_grad_() for k, v in scan_inputs(1, 37, 20, 5, sequences=2).items()
    }
    order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    first = [inputs[k] for k in order]
    cu_seqlens, repeats = bounds([20, 17]), torch.randint(1, 4, (1, 37))
    torch.library.opcheck(
        selective_scan_op,
        (*first, True, inputs["initial_state"], cu_seqlens, repeats, True, None, None, None, True),
    )
    torch.library.opcheck(
        selective_scan_op,
        (*first[:5], None, None, None, False, None, None, None, False, None, None, None, True),
    )
    plan = schedule(torch.tensor([[3, 3, 9], [20, 25, 37]]).int(), cu_seqlens)
    alpha = torch.rand(2, 20, requires_grad=True)
    torch.library.opcheck(
        selective_scan_op,
        (*first, True, None, cu_seqlens, None, False, plan.events, plan.bounds, alpha, True),
    )
    x, weight = torch.randn(2, 9, 5, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    for bias in (None, torch.randn(5, requires_grad=True)):
        torch.library.opcheck(causal_conv1d_op, (x, weight, bias, True, None, True))


@compiled
def test_compiles_without_graph_breaks(monkeypatch):
    monkeypatch.undo()
    inputs = {k: v.float() for k, v in scan_inputs(2, 20, 8, 4).items()}
    weight = torch.randn(8, 4)

    def step(weight, **x):
        x["u"] = causal_conv1d(x["u"], weight, activation="silu")
        return selective_scan(**x, delta_softplus=True)

    wanted = outputs_and_gradients(step, {**inputs, "weight": weight}, torch.float32)
    fast = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_close(outputs_and_gradients(fast, {**inputs, "weight": weight}, torch.float32), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "no backend 'cuda'"),
        ({"delta": torch.zeros(2, 5, 3)}, "delta must be"),
        ({"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)}, "batch must be 1"),
        ({"initial_state": torch.zeros(1, 4, 2)}, "initial_state must be"),
        ({"repeats": torch.ones(2, 5)}, "integers"),
    ],
)
def test_scan_refuses(change, message):
    inputs = {k: v.float() for k, v in scan_inputs(2, 5, 4, 2).items()}
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**inputs, **change})


@pytest.mark.parametrize("values", [[0, 3], [1, 5], [0, 4, 3, 5], [0, 5, 5, 6]])
def test_bad_bounds_are_refused(values):
    x = torch.randn(1, 5, 4)
    with pytest.raises(ValueError, match="cu_seqlens must rise"):
        causal_conv1d(x, torch.randn(4, 3), cu_seqlens=torch.tensor(values, dtype=torch.int32))


def test_cpu_backend_refuses_float64():
    inputs = scan_inputs(1, 3, 2, 2)
    with pytest.raises(ValueError, match="cannot serve this call"):
        selective_scan(**inputs, backend="cpu")


SCRIPT = (
    "import torch; from flexbench.kernels import causal_conv1d; "
    "print(causal_conv1d(torch.ones(1, 3, 2), torch.ones(2, 2)).sum().item())"
)


def run_script(tmp_path: Path, **environment: str) -> subprocess.Popen[str]:
    env = {**os.environ, "FLEXBENCH_CACHE": str(tmp_path), **environment}
    env.pop("FLEXBENCH_NO_COMPILE", None)
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT], env=env, stdout=-1, stderr=-1, text=True
    )


@compiled
def test_several_processes_may_compile_at_once(tmp_path):
    started = [run_script(tmp_path) for _ in range(3)]
    for process in started:
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert float(out) == 10.0
    kept = list((tmp_path / "kernels").glob("*/*"))
    assert [path.name for path in kept] == ["flexbench_kernels.so"]


def test_without_a_compiler_it_warns_once_and_goes_on(tmp_path):
    process = run_script(tmp_path, CXX="no-such-compiler")
    out, err = process.communicate()
    assert process.returncode == 0
    assert float(out) == 10.0
    assert err.count("RuntimeWarning") == 1
    assert "install a C++ compiler" in err


def test_a_sweep_says_once_that_there_is_no_compiler(tmp_path):
    script = (
        "import os; from flexbench.kernels import build; said = []; build.prepare(said.append); "
        "build.prepare(said.append); print(len(said), os.environ['FLEXBENCH_NO_COMPILE'])"
    )
    env = {**os.environ, "FLEXBENCH_CACHE": str(tmp_path), "CXX": "no-such-compiler"}
    env.pop("FLEXBENCH_NO_COMPILE", None)
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1", "1"]
    assert done.stderr == ""


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=60),
    st.integers(1, 40),
    st.integers(0, 2**20),
)
def test_runs_are_gathered_and_scattered(runs, dim, seed):
    start, count, rows = [], [], 0
    for gap, size in runs:
        start.append(rows + gap)
        count.append(size)
        rows += gap + size
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(runs), generator=draw)
    where = [torch.tensor(t, dtype=torch.int64)[order] for t in (start, count)]
    x = torch.randn(rows, dim, dtype=F64, generator=draw)
    y = torch.randn(len(runs), dim, dtype=F64, generator=draw)
    means = [x[s : s + c].mean(0) for s, c in zip(*(t.tolist() for t in where), strict=True)]
    spread = torch.zeros_like(x)
    for row, s, c in zip(y, *(t.tolist() for t in where), strict=True):
        spread[s : s + c] = row
    for function, given_, wanted in (
        (lambda x: gather_runs(x, *where), {"x": x}, torch.stack(means) if means else y),
        (lambda y: scatter_runs(y, *where, rows), {"y": y}, spread),
    ):
        assert_close([function(*given_.values())], [wanted], 1e-12)
        fast = outputs_and_gradients(function, given_, torch.float32)
        assert_close(fast, outputs_and_gradients(function, given_, F64))
