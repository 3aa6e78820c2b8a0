"""Selective scan by its definition: one plain loop over time. Slow, any dtype, the oracle."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def repeat_gain(x: Tensor, m: Tensor) -> Tensor:
    """expm1(m x) / expm1(x): what m equal inputs add up to under decay exp(x); m at 0."""
    small = x.abs() < 1e-6
    safe = torch.where(small, torch.ones_like(x), x)
    ratio = torch.expm1(m * safe) / torch.expm1(safe)
    first = m * (m - 1) / 2
    second = first * (2 * m - 1) / 3
    return torch.where(small, m + first * x + second * x * x / 2, ratio)


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    repeats: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """`selective_scan` in plain PyTorch: float64 where any input is, else float32.

    Returns y in u's dtype, and the last state (sequences, dim, state) in the dtype computed in.
    """
    given = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    double = any(t is not None and t.dtype == torch.float64 for t in given)
    dtype = torch.float64 if double else torch.float32
    out_dtype = u.dtype
    u, delta, A, B, C = (t.to(dtype) for t in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)
    if delta_softplus:
        delta = F.softplus(delta)

    def scan(rows: slice, start: int, end: int, state: Tensor) -> tuple[Tensor, Tensor]:
        outputs: list[Tensor] = []
        for t in reversed(range(start, end)) if reverse else range(start, end):
            step = delta[rows, t, :, None]
            x = step * A
            add = step * B[rows, t, None, :] * u[rows, t, :, None]
            if repeats is not None:
                m = repeats[rows, t, None, None].to(dtype)
                add = add * repeat_gain(x, m)
                x = m * x
            state = torch.exp(x) * state + add
            outputs.append((state * C[rows, t, None, :]).sum(-1))
        if reverse:
            outputs.reverse()
        if not outputs:
            return u[rows, start:end], state
        return torch.stack(outputs, 1), state

    batch, length, dim = u.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    if initial_state is None:
        initial = u.new_zeros(sequences, dim, A.shape[1])
    else:
        initial = initial_state.to(dtype)
    if cu_seqlens is None:
        y, last = scan(slice(None), 0, length, initial)
    else:
        bounds = cu_seqlens.tolist()
        parts = [
            scan(slice(None), start, end, initial[i : i + 1])
            for i, (start, end) in enumerate(itertools.pairwise(bounds))
        ]
        y = torch.cat([part[0] for part in parts], 1) if parts else u
        last = torch.cat([part[1] for part in parts]) if parts else initial
    if D is not None:
        y = y + D.to(dtype) * u
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(out_dtype), last
