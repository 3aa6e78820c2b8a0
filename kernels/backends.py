"""Choosing a backend, and checks that every kernel shares."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from flexbench.kernels.build import compiled

log = logging.getLogger(__name__)


def choose(op: str, asked: str, backends: tuple[str, ...], refusal: dict[str, str | None]) -> str:
    """The backend to use: the one asked for, or for "auto" the first that does not refuse.

    Args:
        backends: fastest first.
        refusal: for each backend why it cannot serve the call, None where it can.

    Raises:
        ValueError: an unknown backend, or one that cannot serve the call.
    """
    if asked == "auto":
        chosen = next(name for name in backends if refusal[name] is None)
        if not torch.compiler.is_compiling() and log.isEnabledFor(logging.DEBUG):
            log.debug("%s: backend %s", op, chosen)
        return chosen
    if asked not in backends:
        raise ValueError(f"{op} has no backend '{asked}'; known: auto, {', '.join(backends)}")
    if refusal[asked] is not None:
        raise ValueError(f"{op}: backend '{asked}' cannot serve this call: {refusal[asked]}")
    return asked


def check_cu_seqlens(cu_seqlens: Tensor, packed: Tensor) -> int:
    """The number of sequences packed in (1, length, ...).

    Raises:
        ValueError: batch is not 1, the bounds are elsewhere than on the input's GPU, or (checked on
            the CPU, where it costs nothing) they do not rise from 0 to length. On a GPU bounds that
            do not are the caller's fault: looking would make the host wait.
    """
    batch, length = packed.shape[:2]
    if batch != 1:
        raise ValueError(f"with cu_seqlens the batch must be 1, not {batch}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError("cu_seqlens must be a vector of int32 bounds, 0 first")
    if packed.is_cuda and cu_seqlens.device != packed.device:
        raise ValueError(f"cu_seqlens must be on {packed.device}, where the input is")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        rising = bool((cu_seqlens[1:] >= cu_seqlens[:-1]).all())
        if not rising or int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != length:
            raise ValueError(f"cu_seqlens must rise from 0 to the length {length}")
    return cu_seqlens.numel() - 1


def cpu_refusal(tensors: Iterable[Tensor | None]) -> str | None:
    """Why the compiled CPU kernels cannot serve these inputs; None where they can.

    Meta tensors, whose shapes alone count, are always served.
    """
    given = [t for t in tensors if t is not None]
    if all(t.device.type == "meta" for t in given):
        return None
    if any(t.device.type not in ("cpu", "meta") for t in given):
        return "the tensors are not on the CPU"
    if any(t.dtype == torch.float64 for t in given):
        return "it computes in float32 and an input is float64"
    return None if compiled() else "its kernels could not be compiled"


def is_eager(tensors: Iterable[Tensor | None]) -> bool:
    """Whether these are plain tensors of an ordinary call: not traced, watched or without data."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return False
    plain = (Tensor, torch.nn.Parameter)
    return all(t is None or (type(t) in plain and t.device.type != "meta") for t in tensors)
