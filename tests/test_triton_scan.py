"""The Triton scan against the float64 reference: on a GPU, or interpreted on the CPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_block_scan import inputs_with, random_cuts, random_nodes
from test_kernels import (
    F64,
    assert_close,
    bounds,
    compiled,
    outputs_and_gradients,
    poison,  # noqa: F401  (what a kernel forgets to write shows as NaN)
    scan_inputs,
)
from torch import Tensor

from flexbench.kernels import block_scan, selective_scan
from flexbench.kernels.block import schedule
from flexbench.kernels.gpu import INTERPRETED

pytest.importorskip("triton")

compiled_only = pytest.mark.skipif(not INTERPRETED, reason="the kernels are compiled, for the GPU")
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
on_each_device = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=compiled_only),
        pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu]),
    ],
)
kernels = importlib.import_module("flexbench.kernels.scan.triton")


@pytest.fixture(autouse=True)
def quick_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter patches triton.language again at every call of a device function, which
    takes most of its time; a kernel's launch has done so already."""
    if not INTERPRETED:
        return
    function = importlib.import_module("triton.runtime.interpreter").InterpretedFunction
    patching, patched = function.__call__, {kernels.__name__}

    def call(self, *args: Any, **options: Any) -> Any:
        if self.fn.__module__ in patched:
            return self.rewrite()(*args, **options)
        patched.add(self.fn.__module__)
        return patching(self, *args, **options)

    monkeypatch.setattr(function, "__call__", call)


@pytest.fixture(params=[None, 16], ids=["one pass", "three passes"])
def segment(request, monkeypatch: pytest.MonkeyPatch) -> int | None:
    monkeypatch.setattr(kernels, "segment_length", lambda *_: request.param)
    return request.param


def values_and_gradients(
    op: Callable[..., Any], inputs: dict[str, Tensor], device: str, **options: Any
) -> list[Tensor]:
    moved = {name: tensor.to(device) for name, tensor in inputs.items()}
    placed = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    run = lambda **x: op(**x, **placed, return_last_state=True, backend="triton")  # noqa: E731
    return [tensor.cpu() for tensor in outputs_and_gradients(run, moved, torch.float32)]


def checked(
    op: Callable[..., Any], inputs: dict[str, Tensor], device: str, tolerance: float, **options: Any
) -> None:
    """Values and gradients are the reference's."""
    run = lambda **x: op(**x, **options, return_last_state=True, backend="reference")  # noqa: E731
    wanted = outputs_and_gradients(run, inputs, F64)
    assert_close(values_and_gradients(op, inputs, device, **options), wanted, tolerance)


@on_each_device
@pytest.mark.parametrize("repeated", [False, True])
def test_packed(segment, device, repeated):
    lengths = [0, 19, 1, 0, 10, 0]
    total = sum(lengths)
    repeats = torch.randint(1, 12, (1, total), generator=torch.Generator().manual_seed(0))
    checked(
        selective_scan,
        scan_inputs(1, total, 3, 5, sequences=len(lengths)),
        device,
        2e-5,
        delta_softplus=True,
        cu_seqlens=bounds(lengths),
        repeats=repeats if repeated else None,
        reverse=repeated == (segment is None),
    )


@on_each_device
@pytest.mark.parametrize("absent", [(), ("D", "z", "delta_bias", "initial_state")])
def test_batched_with_inputs_left_out(segment, device, absent):
    inputs = scan_inputs(2, 18, 33, 3) if absent else scan_inputs(2, 18, 3, 16)
    inputs = {name: tensor for name, tensor in inputs.items() if name not in absent}
    if absent:
        inputs["delta"] = inputs["delta"].abs()
    checked(selective_scan, inputs, device, 2e-5, delta_softplus=not absent)


@on_each_device
def test_the_same_bits_twice(segment, device):
    inputs = scan_inputs(1, 17, 3, 2)
    first, second = (
        values_and_gradients(selective_scan, inputs, device, delta_softplus=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@on_each_device
def test_what_is_stored_is_known_from_the_shapes(segment, device):
    """So that `torch.compile` can trace a call."""
    inputs = {k: v.float().to(device) for k, v in scan_inputs(1, 35, 3, 2, 0, 2).items()}
    plan = schedule(torch.tensor([[0, 0, 7]]).int(), bounds([12, 23]))
    alpha = torch.rand(1, 3, device=device)
    nodes = (plan.events.to(device), plan.bounds.to(device), alpha)
    for given, count in (((None, None, None), 0), (nodes, len(plan.events))):
        packed = bounds([12, 23]).to(device)
        outputs = kernels.scan_forward(
            *(inputs[k] for k in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")),
            *(True, inputs["initial_state"], packed, None, False, *given, True),
        )
        stored = kernels.checkpoint_rows(35, 2, 3, count, inputs["u"].device)
        assert outputs[2].shape == (stored, 3, 2)
        assert outputs[3].shape == ((1, 3, 2) if count else (0,))


@on_each_device
def test_nothing_to_do(device):
    for batch, length in ((2, 0), (0, 5)):
        checked(selective_scan, scan_inputs(batch, length, 3, 2), device, 1e-6)


@on_each_device
def test_any_dtypes_side_by_side(device):
    """As under autocast: what the projections made is narrow, the parameters are not."""
    inputs = {name: t.float().to(device) for name, t in scan_inputs(1, 11, 5, 4).items()}
    narrow = {"u": torch.bfloat16, "delta": torch.bfloat16, "z": torch.float16}
    narrow |= {"B": torch.float16, "C": torch.bfloat16}
    mixed = {name: t.to(narrow.get(name, torch.float32)) for name, t in inputs.items()}

    def run(backend: str, inputs: dict[str, Tensor]) -> list[Tensor]:
        leaves = {name: t.requires_grad_() for name, t in inputs.items()}
        y, last = selective_scan(
            **leaves, delta_softplus=True, return_last_state=True, backend=backend
        )
        assert (y.dtype, last.dtype) == (inputs["u"].dtype, torch.float32)
        gradients = torch.autograd.grad(y.float().sum() + last.sum(), list(leaves.values()))
        assert all(g.dtype == t.dtype for g, t in zip(gradients, leaves.values(), strict=True))
        return [y, last, *gradients]

    exact = run("reference", {name: t.detach().float() for name, t in mixed.items()})
    found = run("triton", mixed)
    assert_close(found[1:2], exact[1:2], 2e-6)
    assert_close(found, exact, 2**-7)  # of bfloat16, which the interpreter cuts off


@on_each_device
def test_small_steps_keep_their_digits(device):
    inputs = {name: t.float().to(device) for name, t in scan_inputs(1, 3, 2, 2).items()}
    inputs["delta_bias"] -= 14
    options = {"delta_softplus": True, "return_last_state": True}
    del inputs["initial_state"]
    _, last = selective_scan(**inputs, **options, backend="triton")
    wide = {name: t.double() for name, t in inputs.items()}
    _, wanted = selective_scan(**wide, **options, backend="reference")
    assert ((last - wanted).abs() / wanted.abs()).max() < 1e-5


@on_each_device
def test_strided_views_are_read_in_place(device):
    inputs = {name: t.float().to(device) for name, t in scan_inputs(2, 9, 6, 4).items()}
    wide = torch.cat([inputs["u"], inputs["z"], inputs["delta"]], -1)
    views = dict(zip(("u", "z", "delta"), wide.split(6, -1), strict=True))
    run = lambda x: selective_scan(**x, delta_softplus=True, backend="triton")  # noqa: E731
    assert torch.equal(run(inputs), run(inputs | views))
    turned = inputs | {"u": inputs["u"].mT.contiguous().mT}
    assert torch.equal(run(inputs), run(turned))


@on_each_device
@pytest.mark.parametrize(
    ("seed", "wide", "repeated", "segment"),
    [(1, True, False, None), (2, False, True, 16)],
    indirect=["segment"],
)
def test_block_scan(segment, device, seed, wide, repeated):
    lengths = [0, 14, 9]
    total = sum(lengths)
    nodes = random_nodes(lengths, seed)
    draw = torch.Generator().manual_seed(seed)
    repeats = torch.randint(1, 12, (1, total), generator=draw) if repeated else None
    checked(
        block_scan,
        inputs_with(nodes, lengths, 3, 5, seed, wide),
        device,
        5e-5,
        cu_blocks=random_cuts(lengths, seed),
        cu_seqlens=bounds(lengths),
        nodes=torch.tensor(nodes).reshape(-1, 3).int(),
        delta_softplus=True,
        repeats=repeats,
    )


def test_what_it_cannot_serve_is_refused():
    inputs = scan_inputs(1, 4, 2, 2)
    with pytest.raises(ValueError, match=r"backend 'triton' cannot serve this call: .*float64"):
        selective_scan(**inputs, backend="triton")


@pytest.mark.parametrize("tokens", [0, 1, 100, 1000, 16384, 10**6])
@pytest.mark.parametrize("sequences", [1, 8])
@pytest.mark.parametrize("blocks", [1, 64])
def test_segments_fill_the_machine_or_there_is_one(tokens, sequences, blocks):
    machine = 528
    length = kernels.segment_length(tokens, sequences, blocks, machine)
    if length is None:
        assert 2 * sequences * blocks > machine or tokens < 2 * kernels.SHORTEST
    else:
        assert length >= kernels.SHORTEST
        assert length == kernels.SHORTEST or tokens // length * blocks >= machine // 2


def test_everything_listed_for_compilation_is_complete():
    listed = list(kernels.compilations())
    assert len({name for name, *_ in listed}) == len(listed)
    for _, kernel, signature, constexprs, _ in listed:
        assert {*signature, *constexprs} == set(kernel.arg_names)
        assert not signature.keys() & constexprs.keys()


@compiled
@on_each_device
def test_compiles_without_graph_breaks(monkeypatch, device):
    """Traced on the CPU, the operator is the CPU's."""
    monkeypatch.undo()
    inputs = {k: v.float().to(device) for k, v in scan_inputs(2, 20, 8, 4).items()}

    def step(**x: Tensor) -> Tensor:
        x["u"] = selective_scan(**x, delta_softplus=True, backend="triton")
        x = {k: v[:1] if v.dim() == 3 else v for k, v in x.items()}
        cuts = torch.tensor([0, 7, 20], dtype=torch.int32, device=device)
        return block_scan(**x, cu_blocks=cuts, delta_softplus=True, backend="triton")

    torch._dynamo.reset()
    fast = torch.compile(step, fullgraph=True, backend="aot_eager")
    wanted = outputs_and_gradients(step, inputs, torch.float32)
    assert_close(outputs_and_gradients(fast, inputs, torch.float32), wanted)
