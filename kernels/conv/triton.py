"""The causal convolution on a GPU, in Triton.

A program computes a tile of steps times channels of one row of the batch, each tap a shifted load
that the first-level cache serves. The backward pass recomputes the pre-activation rather than
store it. Gradients of weight and bias are summed over a chunk of steps in registers, in order, and
over chunks by torch: the same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexbench.kernels.conv.cpu import eager
from flexbench.kernels.device import load_rows, sequence_of, sigmoid
from flexbench.kernels.gpu import last_contiguous

STEPS, CHANNELS, CHUNK = 8, 64, 256
"""Steps and channels of a tile, and the steps whose weight gradients one program sums."""
OPTIONS = {"num_warps": 4, "num_stages": 2}

LOOSE = ("sequences", "length")
"""Numbers that change from call to call, and for which no kernel is compiled anew."""


@triton.jit
def _pre_activation(
    x, weight, bias, step, first, last, seen, channel, x_step, dim,
    WIDTH: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """bias + sum over taps, at each step of sequences first .. last - 1."""
    value = tl.zeros([step.shape[0], channel.shape[0]], tl.float32)
    if bias is not None:
        value += tl.load(bias + channel, mask=channel < dim, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(WIDTH):
        at = step + (WIDTH - 1 - k if REVERSE else k - (WIDTH - 1))
        there = (seen & (at >= first) & (at < last))[:, None] & (channel < dim)[None, :]
        tap = tl.load(weight + channel * WIDTH + k, mask=channel < dim, other=0.0).to(tl.float32)
        value += tap[None, :] * load_rows(x, at, x_step, channel, there)
    return value


@triton.jit(do_not_specialize=LOOSE)
def _forward(
    x, weight, bias, y, cu_seqlens, sequences, length, dim, x_batch, x_step,
    WIDTH: tl.constexpr, SILU: tl.constexpr, REVERSE: tl.constexpr,
    STEPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(length, STEPS)
    batch = tl.program_id(0) // tiles
    step = tl.program_id(0) % tiles * STEPS + tl.arange(0, STEPS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    first, last = sequence_of(step, cu_seqlens, sequences, length)
    value = _pre_activation(
        x + batch.to(tl.int64) * x_batch, weight, bias, step, first, last, step < length,
        channel, x_step, dim, WIDTH, REVERSE,
    )  # fmt: skip
    if SILU:
        value *= sigmoid(value)
    at = (batch.to(tl.int64) * length + step)[:, None] * dim + channel[None, :]
    there = (step < length)[:, None] & (channel < dim)[None, :]
    tl.store(y + at, value.to(y.dtype.element_ty), mask=there)


@triton.jit
def _gradient(
    dy, x, weight, bias, step, first, last, seen, channel, dy_step, x_step, dim,
    WIDTH: tl.constexpr, SILU: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Of the pre-activation at each step, zero outside the sequence."""
    there = (seen & (step >= first) & (step < last))[:, None] & (channel < dim)[None, :]
    g = load_rows(dy, step, dy_step, channel, there)
    if SILU:
        value = _pre_activation(
            x, weight, bias, step, first, last, seen, channel, x_step, dim, WIDTH, REVERSE
        )
        s = sigmoid(value)
        g *= s * (1.0 + value * (1.0 - s))
    return g


@triton.jit(do_not_specialize=LOOSE)
def _backward(
    dy, x, weight, bias, dx, partial, cu_seqlens, sequences, length, dim,
    dy_batch, dy_step, x_batch, x_step,
    WIDTH: tl.constexpr, SILU: tl.constexpr, REVERSE: tl.constexpr,
    CHUNK: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx, and in `partial` (chunks, width + 1, dim) a chunk's gradients of weight and bias."""
    chunks = tl.cdiv(length, CHUNK)
    batch = tl.program_id(0) // chunks
    start = tl.program_id(0) % chunks * CHUNK
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    x += batch.to(tl.int64) * x_batch
    dy += batch.to(tl.int64) * dy_batch
    dx += batch.to(tl.int64) * length * dim
    # Sums for each tap and the bias, added over steps only at the end.
    sum0 = tl.zeros([STEPS, CHANNELS], tl.float32)
    sum1, sum2, sum3, sum_bias = sum0, sum0, sum0, sum0
    for tile in range(start, tl.minimum(start + CHUNK, length), STEPS):
        step = tile + tl.arange(0, STEPS)
        first, last = sequence_of(step, cu_seqlens, sequences, length)
        seen = step < length
        here = seen[:, None] & (channel < dim)[None, :]
        value = load_rows(x, step, x_step, channel, here)
        total = tl.zeros([STEPS, CHANNELS], tl.float32)
        # The output `shift` steps on reads this step by tap WIDTH - 1 - shift.
        for shift in tl.static_range(WIDTH):
            at = step - shift if REVERSE else step + shift
            g = _gradient(
                dy, x, weight, bias, at, first, last, seen, channel, dy_step, x_step, dim,
                WIDTH, SILU, REVERSE,
            )  # fmt: skip
            tap = tl.load(
                weight + channel * WIDTH + WIDTH - 1 - shift, mask=channel < dim, other=0.0
            )
            total += g * tap.to(tl.float32)[None, :]
            if shift == 0:
                sum0 += g * value
                sum_bias += g
            elif shift == 1:
                sum1 += g * value
            elif shift == 2:
                sum2 += g * value
            else:
                sum3 += g * value
        at = step.to(tl.int64)[:, None] * dim + channel[None, :]
        tl.store(dx + at, total.to(dx.dtype.element_ty), mask=here)
    at = partial + tl.program_id(0).to(tl.int64) * (WIDTH + 1) * dim + channel
    tl.store(at + (WIDTH - 1) * dim, tl.sum(sum0, 0), mask=channel < dim)
    tl.store(at + (WIDTH - 2) * dim, tl.sum(sum1, 0), mask=channel < dim)
    if WIDTH > 2:
        tl.store(at + (WIDTH - 3) * dim, tl.sum(sum2, 0), mask=channel < dim)
    if WIDTH > 3:
        tl.store(at, tl.sum(sum3, 0), mask=channel < dim)
    tl.store(at + WIDTH * dim, tl.sum(sum_bias, 0), mask=channel < dim)


def _readable(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """What the kernels read, as they read it."""
    bias, cu_seqlens = (None if t is None else t.contiguous() for t in (bias, cu_seqlens))
    return last_contiguous(x), weight.contiguous(), bias, cu_seqlens


def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> Tensor:
    x, weight, bias, cu_seqlens = _readable(x, weight, bias, cu_seqlens)
    batch, length, dim = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        grid = (batch * triton.cdiv(length, STEPS), triton.cdiv(dim, CHANNELS))
        with torch.cuda.device_of(x):
            _forward[grid](
                *(x, weight, bias, y, cu_seqlens, 0 if cu_seqlens is None else len(cu_seqlens) - 1),
                *(length, dim, x.stride(0), x.stride(1), weight.shape[1], silu, reverse),
                *(STEPS, CHANNELS),
                **OPTIONS,
            )
    return y


def conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias (empty where there is no bias)."""
    x, weight, bias, cu_seqlens = _readable(x, weight, bias, cu_seqlens)
    dy = last_contiguous(dy)
    batch, length, dim = x.shape
    width = weight.shape[1]
    chunks = batch * triton.cdiv(length, CHUNK)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = torch.empty(chunks, width + 1, dim, dtype=torch.float32, device=x.device)
    if dx.numel():
        with torch.cuda.device_of(x):
            _backward[(chunks, triton.cdiv(dim, CHANNELS))](
                *(dy, x, weight, bias, dx, partial, cu_seqlens),
                *(0 if cu_seqlens is None else len(cu_seqlens) - 1, length, dim),
                *(dy.stride(0), dy.stride(1), x.stride(0), x.stride(1)),
                *(width, silu, reverse, CHUNK, STEPS, CHANNELS),
                **OPTIONS,
            )
    sums = partial.sum(0)
    dbias = x.new_empty(0, dtype=torch.float32) if bias is None else sums[width].to(bias.dtype)
    # A copy whatever the shape: what an operator returns may not share memory.
    dweight = sums[:width].T.to(weight.dtype).clone(memory_format=torch.contiguous_format)
    return dx, dweight, dbias


TritonConv = eager(conv_forward, conv_backward)


def compilations() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """What `scripts/compile-kernels` compiles: of width 4, with bias and SiLU."""
    constexprs = {"WIDTH": 4, "SILU": True, "STEPS": STEPS, "CHANNELS": CHANNELS}
    for kind in ("fp32", "bf16"):
        for packed in (False, True):
            bounds = {"cu_seqlens": "*i32"} if packed else {}
            fixed = {**constexprs, "REVERSE": packed} | ({} if packed else {"cu_seqlens": None})
            sizes = dict.fromkeys(("sequences", "length", "dim", "x_batch", "x_step"), "i32")
            data = {"x": f"*{kind}", "weight": "*fp32", "bias": "*fp32", **bounds, **sizes}
            name = f"causal_conv1d {{}}, {kind}{', packed, reverse' if packed else ''}"
            yield name.format("forward"), _forward, {**data, "y": f"*{kind}"}, fixed, OPTIONS
            data |= {"dy": f"*{kind}", "dx": f"*{kind}", "partial": "*fp32"}
            data |= {"dy_batch": "i32", "dy_step": "i32"}
            yield name.format("backward"), _backward, data, {**fixed, "CHUNK": CHUNK}, OPTIONS
