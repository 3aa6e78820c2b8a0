"""The Triton kernels against the float64 reference: on a GPU, or interpreted on the CPU."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from test_fuse import fuse_inputs
from test_kernels import F64, assert_close, bounds, outputs_and_gradients, poison  # noqa: F401
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flexbench.config import StackConfig
from flexbench.kernels import causal_conv1d, hzip_fuse
from flexbench.kernels.backends import check_cu_seqlens
from flexbench.kernels.gpu import INTERPRETED, triton_refusal
from flexbench.kernels.rows import runs_reference
from flexbench.models import resolve
from flexbench.models.stack import Backbone

pytest.importorskip("triton")

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
compiled_only = pytest.mark.skipif(not INTERPRETED, reason="the kernels are compiled, for the GPU")
DEVICES = [
    pytest.param("cpu", marks=compiled_only),
    pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu]),
]
on_each_device = pytest.mark.parametrize("device", DEVICES)
HALVES = (torch.float16, torch.bfloat16)


def conv_inputs(batch: int, length: int, dim: int, width: int, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"x": (batch, length, dim), "weight": (dim, width), "bias": (dim,)}
    return {k: torch.randn(shape, dtype=F64, generator=draw) for k, shape in shapes.items()}


def checked(op, inputs: dict[str, Tensor], device: str, tolerance: float = 2e-5, **options) -> None:
    """Values and gradients are the reference's, and the same bits when computed again."""

    def run(backend: str):
        return lambda **x: op(**x, **options, backend=backend)

    wanted = outputs_and_gradients(run("reference"), inputs, F64)
    moved = {name: tensor.to(device) for name, tensor in inputs.items()}
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    got = outputs_and_gradients(run("triton"), moved, torch.float32)
    again = outputs_and_gradients(run("triton"), moved, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    assert_close([tensor.cpu() for tensor in got], wanted, tolerance)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles and chunks of what the interpreter can do in a second."""
    if INTERPRETED:
        conv = importlib.import_module("flexbench.kernels.conv.triton")
        monkeypatch.setattr(conv, "CHUNK", 16)
        monkeypatch.setattr(conv, "CHANNELS", 16)
        fuse = importlib.import_module("flexbench.kernels.fuse.triton")
        monkeypatch.setattr(fuse, "CHUNK", 16)
        monkeypatch.setitem(fuse.TILE, "CHANNELS", 16)
        monkeypatch.setitem(fuse.SUMMING, "STEPS", 16)


@on_each_device
@pytest.mark.parametrize(
    ("batch", "length", "dim", "width"),
    [(2, 37, 19, 4), (1, 1, 1, 2), (1, 9, 40, 3), (0, 4, 5, 4), (2, 0, 3, 4)],
)
def test_conv_batched(device, batch, length, dim, width):
    inputs = conv_inputs(batch, length, dim, width)
    checked(causal_conv1d, inputs, device, activation="silu")


@on_each_device
@pytest.mark.parametrize("lengths", [[5, 0, 1, 20, 2], [33], [1, 1, 1, 1], []])
def test_conv_packed_and_in_reverse(device, lengths):
    inputs = conv_inputs(1, sum(lengths), 5, 4)
    del inputs["bias"]
    checked(causal_conv1d, inputs, device, cu_seqlens=bounds(lengths), reverse=True)


@on_each_device
@pytest.mark.parametrize("dtype", HALVES)
def test_conv_of_half_precision_with_float32_weights(device, dtype):
    """As under autocast; x is one of two halves of a product, a strided view."""
    inputs = conv_inputs(2, 21, 12, 4)
    inputs["x"] = inputs["x"].to(dtype).double()
    wanted = causal_conv1d(**inputs, activation="silu")
    both = torch.cat([inputs["x"], inputs["x"]], -1).to(device, dtype)
    given = {k: v.to(device).float() for k, v in inputs.items()} | {"x": both[..., 12:]}
    y = causal_conv1d(**given, activation="silu", backend="triton")
    assert y.dtype == dtype
    torch.testing.assert_close(y.cpu(), wanted.to(dtype), rtol=1e-2, atol=1e-3)


@on_each_device
def test_strided_parameters_and_bounds(device):
    inputs = conv_inputs(1, 9, 5, 2)
    lengths = bounds([4, 5])
    wanted = causal_conv1d(**inputs, cu_seqlens=lengths)
    given = {k: v.to(device).float() for k, v in inputs.items()}
    for name in ("weight", "bias"):
        given[name] = given[name].repeat_interleave(2, 0)[::2]
    strided = lengths.to(device).repeat_interleave(2)[::2]
    y = causal_conv1d(**given, cu_seqlens=strided, backend="triton")
    torch.testing.assert_close(y.cpu(), wanted.float())


def test_refused_away_from_a_gpu():
    inputs = conv_inputs(1, 4, 3, 4)
    with pytest.raises(ValueError, match="'triton' cannot serve this call: it computes in float32"):
        causal_conv1d(**inputs, backend="triton")


SMALL = {"rank": 3, "width": 3, "window": 1}


@on_each_device
@pytest.mark.parametrize(
    ("lengths", "dim", "sizes", "options"),
    [
        ([20, 0, 1, 2], 19, {}, {}),  # hzip-lean
        ([7, 1, 30], 5, {"rank": 8, "width": 5, "window": 2}, {"centred": True, "softmax": True}),
        ([18], 19, {}, {"normalise": True, "centred": True}),
    ],
)
def test_fuse_packed(device, lengths, dim, sizes, options):
    absent = set() if options else {"diagonal", "hidden"}
    sizes = SMALL | sizes
    inputs = fuse_inputs(1, sum(lengths), dim, **sizes, absent=absent)
    options |= {"window": sizes["window"], "cu_seqlens": bounds(lengths)}
    checked(hzip_fuse, inputs, device, **options)


@on_each_device
@pytest.mark.parametrize(
    ("batch", "length", "dim", "window", "absent"),
    [
        (2, 19, 3, 0, {"z", "down", "diagonal"}),
        (1, 5, 7, 1, {"up", "taps", "z", "bias"}),
        (2, 3, 4, 0, {"up", "taps", "diagonal", "bias"}),
        (0, 5, 4, 1, set()),
    ],
)
def test_fuse_batched_with_inputs_left_out(device, batch, length, dim, window, absent):
    inputs = fuse_inputs(batch, length, dim, window=window, absent=absent)
    checked(hzip_fuse, inputs, device, window=window, normalise="up" in absent)


@on_each_device
@pytest.mark.parametrize("dtype", HALVES)
def test_fuse_of_half_precision_with_float32_weights(device, dtype):
    timed = ("y_f", "y_b", "z", "hidden")
    inputs = {
        k: v.to(dtype).double() if k in timed else v for k, v in fuse_inputs(1, 17, 20).items()
    }
    wanted = hzip_fuse(**inputs, window=1)
    given = {k: v.to(device, dtype if k in timed else torch.float32) for k, v in inputs.items()}
    y = hzip_fuse(**given, window=1, backend="triton")
    assert y.dtype == dtype
    torch.testing.assert_close(y.cpu(), wanted.to(dtype), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"rank": 9}, "at most 16 hidden units"), ({"window": 9}, "at most 8 steps")],
)
def test_fuse_refuses(change, message):
    inputs = {k: v.float() for k, v in fuse_inputs(1, 4, 3, **change).items()}
    with pytest.raises(ValueError, match=message if INTERPRETED else "not all on a GPU"):
        hzip_fuse(**inputs, window=change.get("window", 1), backend="triton")


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs(device, dtype):
    kernel = importlib.import_module("flexbench.kernels.rows.triton").run
    start, count = (
        torch.tensor([7, 0, 30, 2, 4, 5, 11, 12, 14]),
        torch.tensor([4, 1, 3, 2] + [1] * 5),
    )
    long, packed = torch.randn(33, 9).to(dtype), torch.randn(9, 9).to(dtype)
    for gather, x in ((True, long), (False, packed)):
        for mean in (True, False):
            call = (33, gather, mean)
            wanted = runs_reference(x.double(), start, count, *call)
            got = kernel(x.to(device), start.to(device), count.to(device), *call)
            assert got.dtype == dtype
            torch.testing.assert_close(got.cpu(), wanted.to(dtype))


EVERYTHING = {
    **{"l0": 4, "router_gradient": "fixed", "target_ratio": 0.5, "reduced_share": 0.5},
    **{"rev_gate": "soft", "gate_form": "tree-channel"},
}
"""Blocks of all types, read both ways, between gates; nothing at random once the hold is over."""


def backbone(name, options, d_model, n_layers):
    torch.manual_seed(0)
    made = Backbone(StackConfig(d_model=d_model, n_layers=n_layers), resolve(name).parse(options))
    if made.router is not None:
        made.router.after_step(1.0, 0.0)
    return made.train()


@compiled_only
@pytest.mark.parametrize(
    ("name", "options"),
    [("hzip-lean", {"d_conv": 3, "d_state": 4}), ("flexblock", EVERYTHING | {"d_state": 4})],
)
def test_a_whole_model_in_float32_and_under_autocast(name, options, monkeypatch):
    """As the harness trains on a GPU: products in bfloat16, parameters and A in float32."""
    model = backbone(name, options, 8, 1)
    x = torch.randn(1, 11, 8)
    leaves = list(model.parameters())

    state = deepcopy(model.state_dict())

    def run():
        model.load_state_dict(state)  # running statistics move with every batch
        y = model(x)
        loss = (y - 1).square().sum()
        return y, *torch.autograd.grad(loss, leaves, materialize_grads=True)

    exact = run()
    for op in ("conv", "fuse", "scan", "block"):
        chosen = importlib.import_module(f"flexbench.kernels.{op}")
        monkeypatch.setattr(chosen, "cpu_refusal", lambda tensors: "Triton is to serve")
    for narrow, tolerance in ((False, 1e-4), (True, 0.2)):
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            got = run()
        for g, w in zip(got, exact, strict=True):
            scale = w.abs().max().clamp_min(1e-3)
            assert ((g.float() - w).abs().max() / scale) < tolerance


def test_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
from flexbench.kernels import causal_conv1d, hzip_fuse
x = torch.zeros(1, 4, 3)
causal_conv1d(x, torch.zeros(3, 4))
hzip_fuse(x, x)
try:
    causal_conv1d(x, torch.zeros(3, 4), backend="triton")
except ValueError as error:
    print(error)
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "triton is not installed" in done.stdout


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("lengths", [[700, 0, 1, 299], [1000]])
def test_several_chunks_of_the_size_they_have(lengths):
    total = sum(lengths)
    options = {"cu_seqlens": bounds(lengths)}
    checked(causal_conv1d, conv_inputs(1, total, 150, 4), "cuda", activation="silu", **options)
    checked(hzip_fuse, fuse_inputs(1, total, 150, rank=8), "cuda", window=1, **options)


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize(
    ("name", "options"),
    [("mamba", {}), ("bimamba", {}), ("hzip-lean", {}), ("flexblock", EVERYTHING)],
)
def test_training_on_the_gpu_is_training_on_the_cpu(name, options):
    losses = {}
    for device in ("cpu", "cuda"):
        model = backbone(name, options, 32, 2).to(device)
        x = torch.randn(1, 200, 32).to(device)  # of one row: equal scores may tie either way
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses[device] = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = (model(x) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses[device].append(loss.item())
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)


def test_tensors_on_several_gpus_are_refused():
    with FakeTensorMode():
        first, second = (torch.empty(1, 4, 3, device=f"cuda:{n}") for n in range(2))
        bounds_on_cpu = torch.empty(2, dtype=torch.int32)
        assert triton_refusal([first, None]) is None
        assert "one GPU" in str(triton_refusal([first, second]))
        with pytest.raises(ValueError, match="must be on cuda:0"):
            check_cu_seqlens(bounds_on_cpu, first)
