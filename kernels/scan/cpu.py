"""The compiled selective scan on the CPU; the operator of torch.library for it and for Triton."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flexbench.kernels.backends import is_eager
from flexbench.kernels.build import library
from flexbench.kernels.ffi import bounds, f32, packed, pointer

TILE = 16


class _Args(ctypes.Structure):
    """Mirrors ScanArgs of scan.cpp."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("sequences", "dim", "state", "slots")]
        + [(f"{name}_stride", ctypes.c_int64) for name in ("u", "delta", "B", "C", "z", "dout")]
        + [
            (name, ctypes.c_void_p)
            for name in (
                *("cu_seqlens", "u", "delta", "A", "B", "C", "D", "z", "delta_bias"),
                *("initial_state", "repeats", "out", "last_state"),
                *("events", "event_bounds", "alpha", "gap", "dalpha", "checkpoints"),
                *("dout", "dlast"),
                *("du", "ddelta", "dA", "dB", "dC", "dD", "dz", "ddelta_bias", "dinitial"),
            )
        ]
        + [(name, ctypes.c_int32) for name in ("delta_softplus", "reverse", "threads")]
    )


class _Call:
    """The C side's view of a call's inputs; keeps alive what the pointers point to."""

    def __init__(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        repeats: Tensor | None,
        reverse: bool,
        events: Tensor | None,
        event_bounds: Tensor | None,
        alpha: Tensor | None,
    ) -> None:
        batch, length, self.dim = u.shape
        self.state = A.shape[1]
        self.tokens = batch * length
        if cu_seqlens is None:
            cu_seqlens = bounds(batch, length)
        self.sequences = cu_seqlens.numel() - 1
        rows = {"u": u, "delta": delta, "B": B, "C": C, "z": z}
        whole = {"A": A, "D": D, "delta_bias": delta_bias, "initial_state": initial_state}
        self.kept: dict[str, Tensor | None] = {name: packed(t) for name, t in rows.items()}
        self.kept |= {name: f32(t) for name, t in whole.items()}
        self.kept["cu_seqlens"] = cu_seqlens.to(torch.int32).contiguous()
        if repeats is not None:
            self.kept["repeats"] = repeats.to(torch.int32).reshape(-1).contiguous()
        self.events = 0 if events is None else len(events)
        if events is not None and self.events:
            self.kept |= {"events": events, "event_bounds": event_bounds, "alpha": f32(alpha)}
        self.args = _Args(
            sequences=self.sequences,
            dim=self.dim,
            state=self.state,
            slots=int(events[:, 3].max()) + 1 if events is not None and self.events else 0,
            delta_softplus=delta_softplus,
            reverse=reverse,
            threads=torch.get_num_threads(),
        )
        self.attach(self.kept)

    def attach(self, tensors: Mapping[str, Tensor | None]) -> None:
        for name, tensor in tensors.items():
            setattr(self.args, name, pointer(tensor))
            if tensor is not None and hasattr(_Args, f"{name}_stride"):
                setattr(self.args, f"{name}_stride", tensor.stride(0))

    def checkpoint_shape(self) -> tuple[int, int, int]:
        return (self.tokens // TILE + self.sequences + self.events, self.state, self.dim)

    def run(self, function: str) -> None:
        compiled = library()
        if compiled is None:
            raise RuntimeError("the CPU kernels are not compiled; use backend='reference'")
        getattr(compiled, function)(ctypes.byref(self.args))


def scan_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    repeats: Tensor | None,
    reverse: bool,
    events: Tensor | None,
    event_bounds: Tensor | None,
    alpha: Tensor | None,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the last state, the states at the tiles' starts and what the nodes mix (both empty unless
    `training`).

    The last three inputs are a block scan's nodes (see `flexbench.kernels.block`): events
    (events, 4) int32, their bounds (sequences + 1,) int32 and weights (nodes, dim).
    """
    call = _Call(
        *(u, delta, A, B, C, D, z, delta_bias, delta_softplus),
        *(initial_state, cu_seqlens, repeats, reverse, events, event_bounds, alpha),
    )
    out = torch.empty(u.shape, dtype=torch.float32)
    last_state = torch.empty(call.sequences, call.dim, call.state)
    nodes = 0 if alpha is None else len(alpha)
    checkpoints = torch.empty(call.checkpoint_shape() if training else 0)
    gap = torch.empty((nodes, call.state, call.dim) if training and nodes else 0)
    call.attach({"out": out, "last_state": last_state})
    if training:
        call.attach({"checkpoints": checkpoints, "gap": gap})
    call.run("flexbench_scan_forward")
    return out.to(u.dtype), last_state, checkpoints, gap


selective_scan_op = torch.library.custom_op(
    "flexbench::selective_scan", scan_forward, mutates_args=(), device_types="cpu"
)


def triton_kernels() -> ModuleType:
    """Imported at the first use: Triton is not a requirement."""
    return import_module("flexbench.kernels.scan.triton")


@selective_scan_op.register_kernel("cuda")
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return triton_kernels().scan_forward(*inputs)


@selective_scan_op.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    repeats: Tensor | None,
    reverse: bool,
    events: Tensor | None,
    event_bounds: Tensor | None,
    alpha: Tensor | None,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length, dim = u.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    state = A.shape[1]
    steps = 0 if events is None else len(events)
    nodes = 0 if alpha is None else len(alpha)
    tiles, gap = (batch * length // TILE + sequences + steps, state, dim), (nodes, state, dim)
    if u.device.type == "cuda":
        rows = triton_kernels().checkpoint_rows(batch * length, sequences, dim, steps, u.device)
        tiles, gap = (rows, dim, state), (nodes, dim, state)
    return (
        torch.empty_like(u, memory_format=torch.contiguous_format),
        u.new_empty(sequences, dim, state, dtype=torch.float32),
        u.new_empty(tiles if training else (0,), dtype=torch.float32),
        u.new_empty(gap if training and nodes else (0,), dtype=torch.float32),
    )


def scan_backward(
    dout: Tensor,
    dlast: Tensor | None,
    checkpoints: Tensor,
    gap: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    repeats: Tensor | None,
    reverse: bool,
    events: Tensor | None,
    event_bounds: Tensor | None,
    alpha: Tensor | None,
) -> list[Tensor]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias, initial_state, alpha; empty where not
    given.
    """
    call = _Call(
        *(u, delta, A, B, C, D, z, delta_bias, delta_softplus),
        *(initial_state, cu_seqlens, repeats, reverse, events, event_bounds, alpha),
    )
    inputs: dict[str, Tensor | None] = {"du": u, "ddelta": delta, "dA": A, "dB": B, "dC": C}
    inputs |= {"dD": D, "dz": z, "ddelta_bias": delta_bias, "dinitial": initial_state}
    inputs["dalpha"] = alpha
    grads = {
        name: None if tensor is None else torch.empty(tensor.shape, dtype=torch.float32)
        for name, tensor in inputs.items()
    }
    if alpha is not None:  # an empty node has no event that would write its gradient
        grads["dalpha"] = torch.zeros(alpha.shape)
    kept = {"dout": packed(dout), "dlast": f32(dlast), "checkpoints": checkpoints, "gap": gap}
    call.attach(kept)
    call.attach(grads)
    call.run("flexbench_scan_backward")
    return [
        torch.empty(0) if grad is None or tensor is None else grad.to(tensor.dtype)
        for grad, tensor in zip(grads.values(), inputs.values(), strict=True)
    ]


selective_scan_backward_op = torch.library.custom_op(
    "flexbench::selective_scan_backward", scan_backward, mutates_args=(), device_types="cpu"
)


@selective_scan_backward_op.register_kernel("cuda")
def _(*inputs: Any) -> list[Tensor]:
    return triton_kernels().scan_backward(*inputs)


@selective_scan_backward_op.register_fake
def _(
    dout: Tensor,
    dlast: Tensor | None,
    checkpoints: Tensor,
    gap: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    repeats: Tensor | None,
    reverse: bool,
    events: Tensor | None,
    event_bounds: Tensor | None,
    alpha: Tensor | None,
) -> list[Tensor]:
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state, alpha)
    return [
        u.new_empty(0, dtype=torch.float32)
        if t is None
        else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in inputs
    ]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, softplus, initial, cu_seqlens, repeats, reverse, events, bounds, alpha, _ = inputs
    ctx.set_materialize_grads(False)  # no zeros for outputs that nobody used
    ctx.delta_softplus, ctx.reverse = softplus, reverse
    ctx.save_for_backward(
        *(output[2], output[3], *tensors, initial, cu_seqlens, repeats, events, bounds, alpha)
    )


def _gradients(ctx, backward, dout, dlast):  # type: ignore[no-untyped-def]
    if dout is None and dlast is None:
        return (None,) * 17
    checkpoints, gap, *inputs, initial, cu_seqlens, repeats, events, bounds, alpha = (
        ctx.saved_tensors
    )
    u, D, z, delta_bias = inputs[0], inputs[5], inputs[6], inputs[7]
    dout = torch.zeros_like(u) if dout is None else dout
    grads = backward(
        *(dout, dlast, checkpoints, gap, *inputs, ctx.delta_softplus),
        *(initial, cu_seqlens, repeats, ctx.reverse, events, bounds, alpha),
    )
    optional = {5: D, 6: z, 7: delta_bias, 8: initial, 9: alpha}
    *grads, dinitial, dalpha = (
        None if i in optional and optional[i] is None else grad for i, grad in enumerate(grads)
    )
    return *grads, None, dinitial, None, None, None, None, None, dalpha, None


selective_scan_op.register_autograd(
    lambda ctx, dout, dlast, *_: _gradients(ctx, selective_scan_backward_op, dout, dlast),
    setup_context=_setup_context,
)


def runner(
    forward_kernel: Callable[..., tuple[Tensor, ...]], backward_kernel: Callable[..., list[Tensor]]
) -> Callable[..., tuple[Tensor, Tensor]]:
    """A function of the inputs of `scan_forward` up to `alpha`, by the quickest way there: y and
    the last state. Only what asks for gradients keeps what a backward pass needs."""

    class Eager(torch.autograd.Function):
        """The op without torch.library's dispatch, which costs half a millisecond a call.

        `setup_context` would cost ten microseconds more: torch inspects the signature each time.
        """

        @staticmethod
        def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
            outputs = forward_kernel(*inputs)
            _setup_context(ctx, inputs, outputs)
            return outputs

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, dout, dlast, *_):  # type: ignore[no-untyped-def]
            return _gradients(ctx, backward_kernel, dout, dlast)

    def run(*inputs: Any) -> tuple[Tensor, Tensor]:
        tensors = [t for t in inputs if isinstance(t, Tensor)]
        training = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        function: Callable[..., tuple[Tensor, ...]] = selective_scan_op
        if is_eager(tensors):
            function = Eager.apply if training else forward_kernel
        y, last_state, *_ = function(*inputs, training)
        return y, last_state

    return run


run_scan = runner(scan_forward, scan_backward)
