"""What Triton kernels share on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sequence_of(step, cu_seqlens, sequences, length):
    """First step, and the one after the last, of the sequence that each step is in.

    By bisection in the bounds of packed sequences; without bounds 0 and length.
    """
    first = tl.zeros_like(step)
    last = first + length
    if cu_seqlens is not None:
        low = first
        high = first + sequences
        span = sequences
        while span > 1:
            middle = (low + high) // 2
            after = tl.load(cu_seqlens + middle) <= step
            low = tl.where(after, middle, low)
            high = tl.where(after, high, middle)
            span = (span + 1) // 2
        first = tl.load(cu_seqlens + low)
        last = tl.load(cu_seqlens + low + 1)
    return first, last


@triton.jit
def load_rows(pointer, row, stride, column, there):
    """Rows of a (rows, columns) tile as float32, zero where they are not there."""
    at = pointer + row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def sigmoid(x):
    """By the GPU's own exponential, in three instructions."""
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def _exponentials(out, ROUNDS: tl.constexpr, SIZE: tl.constexpr):
    x = tl.arange(0, SIZE) * (1.0 / SIZE)
    for _ in range(ROUNDS):
        x = -tl.exp2(x)
    tl.store(out + tl.program_id(0), tl.sum(x, 0))


def only_exponentials(device: str) -> tuple[Callable[[], object], int]:
    """A kernel that makes exponentials and nothing else, and how many it makes in one call."""
    programs, rounds, size = 4096, 256, 4096
    out = torch.empty(programs, device=device)
    return lambda: _exponentials[(programs,)](out, rounds, size), programs * rounds * size
