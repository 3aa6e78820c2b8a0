"""The compiled fusion of HZip-Mamba on the CPU, registered with torch.library."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flexbench.kernels.build import library
from flexbench.kernels.ffi import bounds, f32, packed, pointer

ROWS = ("y_f", "y_b", "z", "hidden")
INPUTS = (
    *("y_f", "y_b", "z", "taps", "taps_bias", "down"),
    *("hidden", "hidden_bias", "up", "diagonal", "bias"),
)


class _Args(ctypes.Structure):
    """Mirrors FuseArgs of fuse.cpp."""

    _fields_ = (
        [(n, ctypes.c_int64) for n in ("sequences", "dim", "width", "hidden_width", "features")]
        + [("window", ctypes.c_int64)]
        + [(f"{name}_stride", ctypes.c_int64) for name in (*ROWS, "dout")]
        + [(name, ctypes.c_void_p) for name in ("cu_seqlens", *INPUTS, "out", "dout")]
        + [(f"d{name}", ctypes.c_void_p) for name in INPUTS]
        + [(name, ctypes.c_int32) for name in ("centred", "normalise", "softmax", "threads")]
    )


def _run(
    function: str,
    inputs: dict[str, Tensor | None],
    cu_seqlens: Tensor | None,
    window: int,
    centred: bool,
    normalise: bool,
    softmax: bool,
    made: dict[str, Tensor | None],
    dout: Tensor | None = None,
) -> None:
    compiled = library()
    if compiled is None:
        raise RuntimeError("the CPU kernels are not compiled; use backend='reference'")
    y_f, taps, up = inputs["y_f"], inputs["taps"], inputs["up"]
    assert y_f is not None
    batch, length, dim = y_f.shape
    starts = bounds(batch, length) if cu_seqlens is None else cu_seqlens.int().contiguous()
    kept = {name: packed(t) if name in ROWS else f32(t) for name, t in inputs.items()}
    kept["dout"] = packed(dout)
    strides = {name: kept[name] for name in (*ROWS, "dout")}
    args = _Args(
        sequences=starts.numel() - 1,
        dim=dim,
        width=0 if taps is None else taps.shape[2],
        hidden_width=0 if up is None else 2 * up.shape[2],
        features=(taps is not None) + 2 * (window > 0),
        window=window,
        cu_seqlens=pointer(starts),
        centred=centred,
        normalise=normalise,
        softmax=softmax,
        threads=torch.get_num_threads(),
        **{f"{name}_stride": 0 if t is None else t.stride(0) for name, t in strides.items()},
        **{name: pointer(tensor) for name, tensor in (kept | made).items()},
    )
    getattr(compiled, function)(ctypes.byref(args))


def fuse_forward(
    y_f: Tensor,
    y_b: Tensor,
    z: Tensor | None,
    taps: Tensor | None,
    taps_bias: Tensor | None,
    down: Tensor | None,
    hidden: Tensor | None,
    hidden_bias: Tensor | None,
    up: Tensor | None,
    diagonal: Tensor | None,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int,
    centred: bool,
    normalise: bool,
    softmax: bool,
) -> Tensor:
    given = (y_f, y_b, z, taps, taps_bias, down, hidden, hidden_bias, up, diagonal, bias)
    inputs = dict(zip(INPUTS, given, strict=True))
    out = torch.empty(y_f.shape, dtype=torch.float32)
    options = (cu_seqlens, window, centred, normalise, softmax)
    _run("flexbench_fuse_forward", inputs, *options, {"out": out})
    return out.to(y_f.dtype)


hzip_fuse_op = torch.library.custom_op(
    "flexbench::hzip_fuse", fuse_forward, mutates_args=(), device_types="cpu"
)


@hzip_fuse_op.register_fake
def _(
    y_f: Tensor,
    y_b: Tensor,
    z: Tensor | None,
    taps: Tensor | None,
    taps_bias: Tensor | None,
    down: Tensor | None,
    hidden: Tensor | None,
    hidden_bias: Tensor | None,
    up: Tensor | None,
    diagonal: Tensor | None,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int,
    centred: bool,
    normalise: bool,
    softmax: bool,
) -> Tensor:
    return torch.empty_like(y_f, memory_format=torch.contiguous_format)


def fuse_backward(
    dout: Tensor,
    y_f: Tensor,
    y_b: Tensor,
    z: Tensor | None,
    taps: Tensor | None,
    taps_bias: Tensor | None,
    down: Tensor | None,
    hidden: Tensor | None,
    hidden_bias: Tensor | None,
    up: Tensor | None,
    diagonal: Tensor | None,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int,
    centred: bool,
    normalise: bool,
    softmax: bool,
) -> list[Tensor]:
    """Gradients of the eleven tensors in their order; empty where not given."""
    given = (y_f, y_b, z, taps, taps_bias, down, hidden, hidden_bias, up, diagonal, bias)
    inputs = dict(zip(INPUTS, given, strict=True))
    grads = {
        f"d{name}": None if tensor is None else torch.empty(tensor.shape, dtype=torch.float32)
        for name, tensor in inputs.items()
    }
    options = (cu_seqlens, window, centred, normalise, softmax)
    _run("flexbench_fuse_backward", inputs, *options, grads, dout)
    return [
        torch.empty(0) if grad is None or tensor is None else grad.to(tensor.dtype)
        for grad, tensor in zip(grads.values(), given, strict=True)
    ]


hzip_fuse_backward_op = torch.library.custom_op(
    "flexbench::hzip_fuse_backward", fuse_backward, mutates_args=(), device_types="cpu"
)


@hzip_fuse_backward_op.register_fake
def _(
    dout: Tensor,
    y_f: Tensor,
    y_b: Tensor,
    z: Tensor | None,
    taps: Tensor | None,
    taps_bias: Tensor | None,
    down: Tensor | None,
    hidden: Tensor | None,
    hidden_bias: Tensor | None,
    up: Tensor | None,
    diagonal: Tensor | None,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int,
    centred: bool,
    normalise: bool,
    softmax: bool,
) -> list[Tensor]:
    given = (y_f, y_b, z, taps, taps_bias, down, hidden, hidden_bias, up, diagonal, bias)
    return [
        y_f.new_empty(0, dtype=torch.float32)
        if t is None
        else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in given
    ]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, window, centred, normalise, softmax = inputs
    ctx.options = (window, centred, normalise, softmax)
    ctx.save_for_backward(*tensors)


def _gradients(ctx, backward, dout):  # type: ignore[no-untyped-def]
    *tensors, cu_seqlens = ctx.saved_tensors
    grads = backward(dout, *tensors, cu_seqlens, *ctx.options)
    present = (
        None if tensor is None else grad for tensor, grad in zip(tensors, grads, strict=True)
    )
    return (*present, None, None, None, None, None)


hzip_fuse_op.register_autograd(
    lambda ctx, dout: _gradients(ctx, hzip_fuse_backward_op, dout), setup_context=_setup_context
)


def eager(forward_kernel: Callable[..., Any], backward_kernel: Callable[..., Any]) -> Any:
    """The op without torch.library's dispatch, as for the convolution."""

    class Eager(torch.autograd.Function):
        setup_context = staticmethod(_setup_context)

        @staticmethod
        def forward(*inputs):  # type: ignore[no-untyped-def]
            return forward_kernel(*inputs)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, dout):  # type: ignore[no-untyped-def]
            return _gradients(ctx, backward_kernel, dout)

    return Eager


EagerFuse = eager(fuse_forward, fuse_backward)
