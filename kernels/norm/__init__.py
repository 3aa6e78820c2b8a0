"""RMS normalisation (Zhang and Sennrich, arXiv 1910.07467), with a compiled CPU kernel."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from flexbench.kernels.backends import cpu_refusal, is_eager
from flexbench.kernels.build import library
from flexbench.kernels.ffi import pointer


def rms_norm(x: Tensor, weight: Tensor, epsilon: float = 1e-5) -> Tensor:
    """x / sqrt(mean of x² over the last axis + epsilon) * weight.

    On the CPU in float32 one pass forward and one backward, the same bits on any number of threads;
    everywhere else, and under torch.compile, `torch.nn.functional.rms_norm`, the reference. On a
    GPU that is one kernel of torch's own each way too (`aten::_fused_rms_norm`, torch 2.9 and
    newer), in float32 also under autocast.

    Args:
        x: (..., dim).
        weight: (dim,).

    Returns:
        x's shape and dtype.
    """
    tensors = (x, weight)
    single = all(t.dtype == torch.float32 for t in tensors)
    if single and is_eager(tensors) and cpu_refusal(tensors) is None:
        return EagerNorm.apply(x, weight, epsilon)
    return F.rms_norm(x, weight.shape, weight, epsilon)


class _Args(ctypes.Structure):
    """Mirrors NormArgs of norm.cpp."""

    _fields_ = (
        [(n, ctypes.c_int64) for n in ("rows", "dim")]
        + [(n, ctypes.c_void_p) for n in ("x", "weight", "y", "dy", "dx", "dweight")]
        + [(n, ctypes.c_float) for n in ("epsilon",)]
        + [(n, ctypes.c_int32) for n in ("threads",)]
    )


def _run(function: str, epsilon: float, **tensors: Tensor) -> None:
    x = tensors["x"]
    args = _Args(
        rows=x.numel() // x.shape[-1],
        dim=x.shape[-1],
        epsilon=epsilon,
        threads=torch.get_num_threads(),
        **{name: pointer(tensor) for name, tensor in tensors.items()},
    )
    getattr(library(), function)(ctypes.byref(args))


class EagerNorm(torch.autograd.Function):
    """The compiled kernel."""

    @staticmethod
    def forward(ctx, x, weight, epsilon):  # type: ignore[no-untyped-def]
        x, weight = x.contiguous(), weight.contiguous()
        ctx.epsilon = epsilon
        ctx.save_for_backward(x, weight)
        y = torch.empty(x.shape)
        _run("flexbench_norm_forward", epsilon, x=x, weight=weight, y=y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        dx, dweight = torch.empty(x.shape), torch.empty(weight.shape)
        gradients = {"dy": dy.contiguous(), "dx": dx, "dweight": dweight}
        _run("flexbench_norm_backward", ctx.epsilon, x=x, weight=weight, **gradients)
        return dx, dweight, None
