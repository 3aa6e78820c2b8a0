"""Causal depthwise convolution by its definition, in plain PyTorch."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> Tensor:
    """`causal_conv1d` in plain PyTorch: float64 where any input is, else float32; x's dtype out."""
    double = x.dtype == torch.float64 or weight.dtype == torch.float64
    dtype = torch.float64 if double else torch.float32
    values, taps = x.to(dtype), weight.to(dtype)
    width = taps.shape[1]

    def one(part: Tensor) -> Tensor:
        length = part.shape[1]
        padding = (0, 0, 0, width - 1) if reverse else (0, 0, width - 1, 0)
        padded = F.pad(part, padding)
        order = reversed(range(width)) if reverse else range(width)
        shifted = [padded[:, k : k + length] * taps[:, w] for k, w in enumerate(order)]
        return torch.stack(shifted).sum(0)

    if cu_seqlens is None:
        y = one(values)
    else:
        bounds = cu_seqlens.tolist()
        pieces = [one(values[:, s:e]) for s, e in itertools.pairwise(bounds)]
        y = torch.cat(pieces, 1) if pieces else values
    if bias is not None:
        y = y + bias.to(dtype)
    if silu:
        y = F.silu(y)
    return y.to(x.dtype)
