"""How tensors reach the C++ kernels: packed rows of float32 with a contiguous last axis."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def f32(tensor: Tensor | None) -> Tensor | None:
    """Contiguous float32, without a copy where it is already."""
    return None if tensor is None else tensor.to(torch.float32).contiguous()


def packed(tensor: Tensor | None) -> Tensor | None:
    """(batch, length, dim) as float32 (batch * length, dim): a strided view where there is one."""
    if tensor is None:
        return None
    rows = tensor.to(torch.float32)
    if rows.stride(-1) != 1 and rows.shape[-1] > 1:
        rows = rows.contiguous()
    rows = rows.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


@functools.lru_cache(maxsize=64)
def bounds(batch: int, length: int) -> Tensor:
    """`cu_seqlens` of a batch of sequences of one length."""
    return torch.arange(batch + 1, dtype=torch.int32) * length


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
