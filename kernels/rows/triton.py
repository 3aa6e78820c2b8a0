"""Runs of rows on a GPU, in Triton: a program has a few runs and a tile of channels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexbench.kernels.device import load_rows
from flexbench.kernels.gpu import last_contiguous

TILE = {"RUNS": 8, "CHANNELS": 128}
OPTIONS = {"num_warps": 4, "num_stages": 2}


@triton.jit(do_not_specialize=("runs",))
def _gather(
    rows, packed, start, count, runs, dim, stride,
    MEAN: tl.constexpr, RUNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0) * RUNS + tl.arange(0, RUNS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    first = tl.load(start + run, mask=run < runs, other=0)
    many = tl.load(count + run, mask=run < runs, other=0).to(tl.int32)
    total = tl.zeros([RUNS, CHANNELS], tl.float32)
    for j in range(tl.max(many, 0)):
        there = (j < many)[:, None] & (channel < dim)[None, :]
        total += load_rows(rows, first + j, stride, channel, there)
    if MEAN:
        total /= tl.maximum(many, 1).to(tl.float32)[:, None]
    at = packed + run.to(tl.int64)[:, None] * dim + channel[None, :]
    inside = (run < runs)[:, None] & (channel < dim)[None, :]
    tl.store(at, total.to(packed.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("runs",))
def _scatter(
    packed, rows, start, count, runs, dim, stride,
    MEAN: tl.constexpr, RUNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0) * RUNS + tl.arange(0, RUNS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    first = tl.load(start + run, mask=run < runs, other=0)
    many = tl.load(count + run, mask=run < runs, other=0).to(tl.int32)
    inside = (run < runs)[:, None] & (channel < dim)[None, :]
    value = load_rows(packed, run, stride, channel, inside)
    if MEAN:
        value /= tl.maximum(many, 1).to(tl.float32)[:, None]
    for j in range(tl.max(many, 0)):
        at = rows + (first + j)[:, None] * dim + channel[None, :]
        there = (j < many)[:, None] & (channel < dim)[None, :]
        tl.store(at, value.to(rows.dtype.element_ty), mask=there)


def run(x: Tensor, start: Tensor, count: Tensor, rows: int, gather: bool, mean: bool) -> Tensor:
    x, dim, runs = last_contiguous(x), x.shape[1], len(start)
    if gather:
        made = torch.empty(runs, dim, dtype=x.dtype, device=x.device)
    else:
        made = torch.zeros(rows, dim, dtype=x.dtype, device=x.device)
    if runs and dim:
        grid = (triton.cdiv(runs, TILE["RUNS"]), triton.cdiv(dim, TILE["CHANNELS"]))
        with torch.cuda.device_of(x):
            (_gather if gather else _scatter)[grid](
                x, made, start, count, runs, dim, x.stride(0), mean, **TILE, **OPTIONS
            )
    return made


def compilations() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """What `scripts/compile-kernels` compiles."""
    for name, kernel in (("gather_runs", _gather), ("scatter_runs", _scatter)):
        signature = {"rows": "*bf16", "packed": "*bf16", "start": "*i64", "count": "*i64"}
        signature |= dict.fromkeys(("runs", "dim", "stride"), "i32")
        yield f"{name}, bfloat16", kernel, signature, {"MEAN": True, **TILE}, OPTIONS
