"""Packing: runs of neighbouring rows gathered as their means, and put back on every row."""

from __future__ import annotations

import ctypes
from importlib import import_module

import torch
from torch import Tensor

from flexbench.kernels.backends import cpu_refusal, is_eager
from flexbench.kernels.build import library
from flexbench.kernels.ffi import f32, pointer
from flexbench.kernels.gpu import triton_refusal


def gather_runs(x: Tensor, start: Tensor, count: Tensor) -> Tensor:
    """The mean of rows start[i] .. start[i] + count[i] - 1, for every run i.

    A compiled kernel on the CPU in float32, and Triton on a GPU, the same bits every time; else
    plain PyTorch, the reference.

    Args:
        x: (rows, dim).
        start, count: (runs,) int64, count at least 1; no two runs share a row.

    Returns:
        (runs, dim).
    """
    return _apply(x, start, count, len(x), True, True)


def scatter_runs(y: Tensor, start: Tensor, count: Tensor, rows: int) -> Tensor:
    """Row i on rows start[i] .. start[i] + count[i] - 1 of a tensor that is zero elsewhere.

    Args:
        y: (runs, dim).
        start, count: as in `gather_runs`.
        rows: rows of the result.

    Returns:
        (rows, dim).
    """
    return _apply(y, start, count, rows, False, False)


def _apply(x: Tensor, start: Tensor, count: Tensor, rows: int, gather: bool, mean: bool) -> Tensor:
    """Packed from long where `gather`, long from packed where not; divided by `count` if `mean`."""
    single = x.dtype == torch.float32 and cpu_refusal((x,)) is None
    if single or (x.device.type == "cuda" and triton_refusal((x, start, count)) is None):
        run = EagerRuns.apply if is_eager((x,)) else runs_op
    else:
        run = runs_reference
    return run(x, start, count, rows, gather, mean)


def runs_reference(
    x: Tensor, start: Tensor, count: Tensor, rows: int, gather: bool, mean: bool
) -> Tensor:
    """Plain PyTorch, any dtype."""
    if gather:
        empty = x.new_zeros(len(start), x.shape[1])
        summed = empty.index_add(0, _run_of(count), x[_rows(start, count)])
        return summed / count[:, None] if mean else summed
    spread = (x / count[:, None] if mean else x)[_run_of(count)]
    return x.new_zeros(rows, x.shape[1]).index_copy(0, _rows(start, count), spread)


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
    start, count = start.contiguous(), count.contiguous()
    if x.device.type == "cuda":  # imported at the first use: Triton is not a requirement
        made: Tensor = import_module("flexbench.kernels.rows.triton").run(
            x, start, count, rows, gather, mean
        )
        return made
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


runs_op = torch.library.custom_op("flexbench::runs", _run, mutates_args=())


@runs_op.register_fake
def _(x: Tensor, start: Tensor, count: Tensor, rows: int, gather: bool, mean: bool) -> Tensor:
    return x.new_empty(len(start) if gather else rows, x.shape[1])


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, start, count, rows, gather, mean = inputs
    ctx.save_for_backward(start, count)
    ctx.call = (rows, not gather, mean)


def _gradients(ctx, run, dy):  # type: ignore[no-untyped-def]
    """Gathering and scattering are each other's gradient."""
    return run(dy, *ctx.saved_tensors, *ctx.call), None, None, None, None, None


runs_op.register_autograd(
    lambda ctx, dy: _gradients(ctx, runs_op, dy), setup_context=_setup_context
)


class EagerRuns(torch.autograd.Function):
    """The op without torch.library's dispatch, as for the convolution."""

    setup_context = staticmethod(_setup_context)

    @staticmethod
    def forward(*inputs):  # type: ignore[no-untyped-def]
        return _run(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        return _gradients(ctx, _run, dy)
