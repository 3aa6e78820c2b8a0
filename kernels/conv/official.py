"""The CUDA kernel of causal-conv1d (https://github.com/Dao-AILab/causal-conv1d), if installed."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from torch import Tensor

from flexbench.kernels.gpu import FLOATS, on_gpu

INSTALLED = find_spec("causal_conv1d_cuda") is not None
ALIGNED = 8
"""Channels, and the distances between rows, that its channels-last kernel wants a multiple of."""


def refusal(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, reverse: bool
) -> str | None:
    """Why causal-conv1d cannot serve a call; None where it can."""
    if not INSTALLED:
        return "the CUDA extension of causal-conv1d is not installed"
    given = [t for t in (x, weight, bias) if t is not None]
    distances = (x.shape[2], x.stride(0), x.stride(1))
    reasons = {
        "it is not asked to pack sequences": cu_seqlens is not None,
        "it reads from left to right alone": reverse,
        "it knows no other types than those of 32 and 16 bits": any(
            t.dtype not in FLOATS for t in given
        ),
        "weight and bias must share a type": bias is not None and bias.dtype != weight.dtype,
        "it needs a step and a channel at least": not x.numel(),
        "the channels of x must lie side by side": x.stride(2) != 1,
        f"channels and strides must be multiples of {ALIGNED}": any(d % ALIGNED for d in distances),
        "the tensors are not all on a GPU": not on_gpu(given),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> Tensor:
    """`causal_conv1d` for a call that is not refused: its steps come last, as a view."""
    package = import_module("causal_conv1d")
    activation = "silu" if silu else None
    y: Tensor = package.causal_conv1d_fn(
        x.transpose(1, 2), weight.contiguous(), bias, activation=activation
    )
    return y.transpose(1, 2)
