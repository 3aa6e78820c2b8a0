"""The compiled causal convolution on the CPU, registered with torch.library."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flexbench.kernels.build import library
from flexbench.kernels.ffi import bounds, f32, packed, pointer


class _Args(ctypes.Structure):
    """Mirrors ConvArgs of conv.cpp."""

    _fields_ = (
        [(n, ctypes.c_int64) for n in ("sequences", "dim", "width", "x_stride", "dy_stride")]
        + [(n, ctypes.c_void_p) for n in ("cu_seqlens", "x", "weight", "bias", "y")]
        + [(n, ctypes.c_void_p) for n in ("dy", "dx", "dweight", "dbias")]
        + [(n, ctypes.c_int32) for n in ("silu", "reverse", "threads")]
    )


def _run(
    function: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    cu_seqlens: Tensor | None,
    reverse: bool,
    **tensors: Tensor | None,
) -> None:
    compiled = library()
    if compiled is None:
        raise RuntimeError("the CPU kernels are not compiled; use backend='reference'")
    batch, length, dim = x.shape
    if cu_seqlens is None:
        cu_seqlens = bounds(batch, length)
    rows, taps, offset = packed(x), f32(weight), f32(bias)
    cu_seqlens, dy = cu_seqlens.contiguous(), packed(tensors.pop("dy", None))
    assert rows is not None
    args = _Args(
        sequences=cu_seqlens.numel() - 1,
        dim=dim,
        width=weight.shape[1],
        x_stride=rows.stride(0),
        dy_stride=0 if dy is None else dy.stride(0),
        cu_seqlens=pointer(cu_seqlens),
        x=pointer(rows),
        weight=pointer(taps),
        bias=pointer(offset),
        dy=pointer(dy),
        silu=silu,
        reverse=reverse,
        threads=torch.get_num_threads(),
        **{name: pointer(tensor) for name, tensor in tensors.items()},
    )
    getattr(compiled, function)(ctypes.byref(args))


def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> Tensor:
    y = torch.empty(x.shape, dtype=torch.float32)
    _run("flexbench_conv_forward", x, weight, bias, silu, cu_seqlens, reverse, y=y)
    return y.to(x.dtype)


causal_conv1d_op = torch.library.custom_op(
    "flexbench::causal_conv1d", conv_forward, mutates_args=(), device_types="cpu"
)


@causal_conv1d_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias (empty where there is no bias)."""
    dx = torch.empty(x.shape, dtype=torch.float32)
    dweight = torch.empty(weight.shape, dtype=torch.float32)
    dbias = None if bias is None else torch.empty(bias.shape, dtype=torch.float32)
    _run(
        *("flexbench_conv_backward", x, weight, bias, silu, cu_seqlens, reverse),
        dy=dy,
        dx=dx,
        dweight=dweight,
        dbias=dbias,
    )
    last = torch.empty(0) if dbias is None or bias is None else dbias.to(bias.dtype)
    return dx.to(x.dtype), dweight.to(weight.dtype), last


causal_conv1d_backward_op = torch.library.custom_op(
    "flexbench::causal_conv1d_backward", conv_backward, mutates_args=(), device_types="cpu"
)


@causal_conv1d_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    last = x.new_empty(0, dtype=torch.float32) if bias is None else torch.empty_like(bias)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(weight, memory_format=torch.contiguous_format), last


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, ctx.silu, cu_seqlens, ctx.reverse = inputs
    ctx.save_for_backward(x, weight, bias, cu_seqlens)


def _gradients(ctx, backward, dy):  # type: ignore[no-untyped-def]
    x, weight, bias, cu_seqlens = ctx.saved_tensors
    dx, dweight, dbias = backward(dy, x, weight, bias, ctx.silu, cu_seqlens, ctx.reverse)
    return dx, dweight, None if bias is None else dbias, None, None, None


causal_conv1d_op.register_autograd(
    lambda ctx, dy: _gradients(ctx, causal_conv1d_backward_op, dy), setup_context=_setup_context
)


def eager(forward_kernel: Callable[..., Any], backward_kernel: Callable[..., Any]) -> Any:
    """The op without torch.library's dispatch, and without what `setup_context` costs a call."""

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
            y = forward_kernel(*inputs)
            _setup_context(ctx, inputs, y)
            return y

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, dy):  # type: ignore[no-untyped-def]
            return _gradients(ctx, backward_kernel, dy)

    return Eager


EagerConv = eager(conv_forward, conv_backward)
