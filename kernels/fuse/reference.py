"""HZip-Mamba's gates and fusion by their formulas, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-5


class Neighbours:
    """The steps around each step of a batch, none of them in another sequence.

    Args:
        x: (batch, length, ...), whose shape and device count.
        cu_seqlens: bounds of packed sequences, as for every kernel.
    """

    def __init__(self, x: Tensor, cu_seqlens: Tensor | None = None) -> None:
        length = x.shape[1]
        place = torch.arange(length, device=x.device)
        self.before: Tensor = place
        self.after: Tensor = length - 1 - place
        if cu_seqlens is not None:
            sizes = cu_seqlens.diff().long()
            first = cu_seqlens[:-1].long().repeat_interleave(sizes, output_size=length)
            self.before = place - first
            self.after = sizes.repeat_interleave(sizes, output_size=length) - 1 - self.before

    def exist(self, offset: int) -> Tensor:
        """(length, 1) bool: whether step t + offset is in the sequence of step t."""
        there = self.before >= -offset if offset < 0 else self.after >= offset
        return there.unsqueeze(-1)

    def at(self, x: Tensor, offset: int) -> Tensor:
        """x[t + offset] at each step t, zero where there is none."""
        if offset == 0:
            return x
        return x.roll(-offset, 1).masked_fill(~self.exist(offset), 0.0)


def rate_of_change(
    y: Tensor, side: int, window: int, smoothing: int, centred: bool, near: Neighbours
) -> Tensor:
    """The mean of |y[t] - y[t + side j]| over j = 1 .. window, existing terms only; y's shape.

    Args:
        side: -1 looks back, 1 ahead; `centred` looks both ways.
        smoothing: width of a centred moving average over the result, existing steps only.
    """
    offsets = [side * j for j in range(1, window + 1)]
    if centred:
        offsets += [-offset for offset in offsets]

    def mean(x: Tensor, offsets: list[int], change: bool) -> Tensor:
        total, count = torch.zeros_like(x), x.new_zeros(x.shape[1], 1)
        for offset in offsets:
            there = near.exist(offset)
            other = near.at(x, offset)
            total = total + ((x - other).abs() * there if change else other)
            count = count + there
        return total / count.clamp_min(1)

    rate = mean(y, offsets, change=True)
    if smoothing > 1:
        rate = mean(rate, list(range(-(smoothing // 2), smoothing // 2 + 1)), change=False)
    return rate


def rms_normalise(x: Tensor) -> Tensor:
    """x / sqrt(mean of x² over the last axis + epsilon), without a weight."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON)


def hzip_gates_reference(
    y_f: Tensor,
    y_b: Tensor,
    taps: Tensor | None,
    taps_bias: Tensor | None,
    down: Tensor | None,
    hidden: Tensor | None,
    hidden_bias: Tensor | None,
    up: Tensor | None,
    diagonal: Tensor | None,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int,
    smoothing: int,
    centred: bool,
    normalise: bool,
    softmax: bool,
) -> tuple[Tensor, Tensor]:
    """The two gates of `hzip_fuse`, each (batch, length, dim)."""
    near = Neighbours(y_f, cu_seqlens)
    features = []
    if taps is not None:
        half = taps.shape[2] // 2
        context = torch.zeros_like(y_f) if taps_bias is None else taps_bias.expand_as(y_f)
        for k in range(taps.shape[2]):
            seen = y_f * taps[:, 0, k] + y_b * taps[:, 1, k]
            context = context + near.at(seen, k - half)
        features.append(F.silu(context))
    if window:
        features.append(rate_of_change(y_f, -1, window, smoothing, centred, near))
        features.append(rate_of_change(y_b, 1, window, smoothing, centred, near))
    if normalise:
        features = [rms_normalise(feature) for feature in features]
    logits = [torch.zeros_like(y_f), torch.zeros_like(y_f)]
    if bias is not None:
        logits = [logit + each for logit, each in zip(logits, bias, strict=True)]
    if diagonal is not None:
        for f, feature in enumerate(features):
            logits = [logits[g] + diagonal[g, f] * feature for g in range(2)]
    if up is not None:
        inner = up.new_zeros(2 * up.shape[2]) if hidden_bias is None else hidden_bias
        if hidden is not None:
            inner = inner + hidden
        if down is not None:
            for f, feature in enumerate(features):
                inner = inner + F.linear(feature, down[:, f])
        halves = F.silu(inner).chunk(2, dim=-1)
        logits = [logits[g] + F.linear(halves[g], up[g]) for g in range(2)]
    if softmax:
        g_f = torch.sigmoid(logits[0] - logits[1])
        return g_f, 1 - g_f
    return torch.sigmoid(logits[0]), torch.sigmoid(logits[1])


def hzip_fuse_reference(y_f: Tensor, y_b: Tensor, z: Tensor | None, *rest) -> Tensor:  # type: ignore[no-untyped-def]
    """`hzip_fuse` in plain PyTorch: float64 where any input is, else float32; y_f's dtype out."""
    given = [t for t in (y_f, y_b, z, *rest) if isinstance(t, Tensor)]
    double = any(t.dtype == torch.float64 for t in given)
    dtype = torch.float64 if double else torch.float32

    def wide(x):  # type: ignore[no-untyped-def]
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    g_f, g_b = hzip_gates_reference(*map(wide, (y_f, y_b, *rest)))
    y = g_f * wide(y_f) + g_b * wide(y_b)
    if z is not None:
        y = y * F.silu(wide(z))
    return y.to(y_f.dtype)
