"""Floating-point operations of a forward pass, those of flexbench's kernels included."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from flexbench import kernels  # noqa: F401  (defines the operators counted here)
from flexbench.interface import Batch

Shape = Sequence[int]


@register_flop_formula(torch.ops.flexbench.causal_conv1d)
def causal_conv1d_flops(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """A multiplication and an addition for each tap."""
    return 2 * math.prod(x) * weight[1]


@register_flop_formula(torch.ops.flexbench.selective_scan)
def selective_scan_flops(u: Shape, delta: Shape, a: Shape, *_: Any, **__: Any) -> int:
    """Seven for each state update: ΔA, its exp, times h, times B, plus, and C · h's two."""
    return 7 * math.prod(u) * a[1]


@register_flop_formula(torch.ops.flexbench.hzip_fuse)
def hzip_fuse_flops(
    y: Shape,
    y_b: Shape,
    z: Shape | None,
    taps: Shape | None,
    taps_bias: Shape | None,
    down: Shape | None,
    hidden: Shape | None,
    hidden_bias: Shape | None,
    up: Shape | None,
    diagonal: Shape | None,
    *_: Any,
    **__: Any,
) -> int:
    """A multiplication and an addition for every weight of context and gates at every step."""
    weights = sum(math.prod(w) for w in (taps, down, up, diagonal) if w is not None)
    return 2 * math.prod(y[:2]) * weights


def count_flops(model: nn.Module, batch: Batch) -> int:
    """Operations of one forward pass; a multiplication and an addition are two."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(batch)
    return counter.get_total_flops()
