"""Packing: runs of neighbouring rows gathered as their means, and put back on every row."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from flexbench.kernels.backends import cpu_refusal, is_eager
from flexbench.kernels.build import library
from flexbench.kernels.ffi import f32, pointer


def gather_runs(x: Tensor, start: Tensor, count: Tensor) -> Tensor:
    """The mean of rows start[i] .. start[i] + count[i] - 1, for every run i.

    On the CPU in float32 a compiled kernel, the same bits on any number of threads; else plain
    PyTorch, the reference.

    Args:
        x: (rows, dim).
        start, count: (runs,) int64, count at least 1; no two runs share a row.

    Returns:
        (runs, dim).
    """
    if _compiled(x):
        return EagerRuns.apply(x, start, count, len(x), True, True)
    summed = x.new_zeros(len(start), x.shape[1]).index_add(
        0, _run_of(count), x[_rows(start, count)]
    )
    return summed / count[:, None]


def scatter_runs(y: Tensor, start: Tensor, count: Tensor, rows: int) -> Tensor:
    """Row i on rows start[i] .. start[i] + count[i] - 1 of a tensor that is zero elsewhere.

    Args:
        y: (runs, dim).
        start, count: as in `gather_runs`.
        rows: rows of the result.

    Returns:
        (rows, dim).
    """
    if _compiled(y):
        return EagerRuns.apply(y, start, count, rows, False, False)
    spread = y[_run_of(count)]
    return y.new_zeros(rows, y.shape[1]).index_copy(0, _rows(start, count), spread)


def _compiled(x: Tensor) -> bool:
    return x.dtype == torch.float32 and is_eager((x,)) and cpu_refusal((x,)) is None


def _run_of(count: Tensor) -> Tensor:
    return torch.arange(len(count), device=count.device).repeat_interleave(count)


def _rows(start: Tensor, count: Tensor) -> Tensor:
    """All rows of all runs, in order."""
    run = _run_of(count)
    place = torch.arange(len(run), device=run.device) - (count.cumsum(0) - count)[run]
    return start[run] + place


class _Args(ctypes.Structure):
    """Mirrors RowsArgs of rows.cpp."""

    _fields_ = (
        [(n, ctypes.c_int64) for n in ("runs", "dim")]
        + [(n, ctypes.c_void_p) for n in ("start", "count", "packed", "rows")]
        + [(n, ctypes.c_int32) for n in ("mean", "threads")]
    )


def _run(x: Tensor, start: Tensor, count: Tensor, rows: int, gather: bool, mean: bool) -> Tensor:
    source = f32(x)
    assert source is not None
    dim = x.shape[1]
    made = torch.empty(len(start), dim) if gather else torch.zeros(rows, dim)
    packed, long = (made, source) if gather else (source, made)
    args = _Args(
        runs=len(start),
        dim=dim,
        start=pointer(start),
        count=pointer(count),
        packed=pointer(packed),
        rows=pointer(long),
        mean=mean,
        threads=torch.get_num_threads(),
    )
    name = "flexbench_rows_gather" if gather else "flexbench_rows_scatter"
    getattr(library(), name)(ctypes.byref(args))
    return made


class EagerRuns(torch.autograd.Function):
    """The compiled kernel; gathering and scattering are each other's gradient."""

    @staticmethod
    def forward(ctx, x, start, count, rows, gather, mean):  # type: ignore[no-untyped-def]
        start, count = start.contiguous(), count.contiguous()
        ctx.save_for_backward(start, count)
        ctx.call = (rows, not gather, mean)
        return _run(x, start, count, rows, gather, mean)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        return _run(dy, *ctx.saved_tensors, *ctx.call), None, None, None, None, None
