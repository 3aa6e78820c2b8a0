"""What the Triton backends share: when they can serve a call, and how they read their tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.util import find_spec

import torch
from torch import Tensor

INSTALLED = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton kernels run in NumPy on the CPU: slow, for tests. Set before the first import."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""What GPU kernels read and write."""


def triton_refusal(tensors: Iterable[Tensor | None]) -> str | None:
    """Why the Triton kernels cannot serve these inputs; None where they can."""
    given = [t for t in tensors if t is not None]
    devices = {t.device for t in given}
    kinds = {device.type for device in devices}
    if len(devices) > 1 or not (kinds == {"cuda"} or (INTERPRETED and kinds == {"cpu"})):
        return "the tensors are not all on one GPU"
    if any(t.dtype == torch.float64 for t in given):
        return "it computes in float32 and an input is float64"
    return None if INSTALLED else "triton is not installed"


def on_gpu(tensors: Iterable[Tensor]) -> bool:
    return all(t.device.type == "cuda" for t in tensors)


def last_contiguous(x: Tensor) -> Tensor:
    """x, copied where its last axis is strided."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def wants_gradient(tensors: Iterable[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
