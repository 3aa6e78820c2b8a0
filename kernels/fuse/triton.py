"""The fusion of HZip-Mamba on a GPU, in Triton.

The hidden layer reads all channels of a step before any gate is known, so there are two passes
forward: `_hidden` sums over channels, and `_fuse` makes each gate from those few sums. Backward,
`_hidden_gradient` sums over channels, `_gradients` has the gradients of the readings and
`_parameter_gradients` the rest; `_hidden` is run again rather than its result stored. Features and
gates of a tile live in registers, and products with the small matrices run on the tensor cores (in
three parts where the readings are float32, which is as exact as float32). Gradients of parameters
are summed over a chunk of steps in order, and over chunks by torch: the same input gives the same
bits.

A row is a step of a row of the batch. Features are numbered as in `hzip_fuse`: the context, if any,
then G_f and G_b. Hidden units are padded to `MOST_UNITS`, the fewest that tensor cores take; the
sums that `_parameter_gradients` would keep of twice as many do not fit into a thread's registers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexbench.kernels.device import load_rows, sequence_of, sigmoid
from flexbench.kernels.fuse import MOST_UNITS
from flexbench.kernels.fuse.cpu import INPUTS, eager
from flexbench.kernels.fuse.reference import EPSILON
from flexbench.kernels.gpu import last_contiguous

TILE = {"STEPS": 16, "CHANNELS": 64}
OPTIONS = {"num_warps": 8, "num_stages": 1}
SUMMING = {"STEPS": 64, "CHANNELS": 16}
"""Of the passes that sum over channels: with few columns in a product, rows must fill the warps."""
SUMMING_OPTIONS = {"num_warps": 4, "num_stages": 1}
CHUNK = 256
"""Steps whose parameter gradients one program sums."""
PRECISION = {torch.float32: "tf32x3", torch.bfloat16: "tf32", torch.float16: "tf32"}
"""Of products, by the type of the readings: none has fewer bits than these."""
LETTERS = {"y_f": "f", "y_b": "b", "z": "z", "hidden": "h"}
"""Strides go by these letters: f_batch, f_step; o for the output's gradient."""
SIZES = ("sequences", "length", "dim", "units")

LOOSE = ("sequences", "length")
"""Numbers that change from call to call, and for which no kernel is compiled anew."""


@triton.jit
def _slope(x):
    """The derivative of silu."""
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def _vector(pointer, channel, dim):
    return tl.load(pointer + channel, mask=channel < dim, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _units(pointer, step, there, units, UNITS: tl.constexpr):
    """(steps, UNITS) of a (rows, units) matrix, zero in the padding."""
    unit = tl.arange(0, UNITS)
    at = pointer + step.to(tl.int64)[:, None] * units + unit[None, :]
    return tl.load(at, mask=there[:, None] & (unit < units)[None, :], other=0.0)


@triton.jit
def _down(
    down, feature: tl.constexpr, channel, dim, units, FEATURES: tl.constexpr, UNITS: tl.constexpr
):
    """(UNITS, channels): what the hidden units make of a feature."""
    unit = tl.arange(0, UNITS)
    at = down + (unit[:, None] * FEATURES + feature) * dim + channel[None, :]
    return tl.load(at, mask=(unit < units)[:, None] & (channel < dim)[None, :], other=0.0).to(
        tl.float32
    )


@triton.jit
def _up(up, gate: tl.constexpr, channel, dim, units, UNITS: tl.constexpr):
    """(UNITS, channels): what a gate makes of the hidden units, zero for the other gate's half."""
    rank = units // 2
    unit = tl.arange(0, UNITS) - gate * rank
    at = up + (gate * dim + channel[None, :]) * rank + unit[:, None]
    there = ((unit >= 0) & (unit < rank))[:, None] & (channel < dim)[None, :]
    return tl.load(at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _near(y, step, first, last, there, channel, stride, dim):
    """y at steps of the sequence first .. last - 1, and where there is such a step."""
    found = (there & (step >= first) & (step < last))[:, None] & (channel < dim)[None, :]
    return load_rows(y, step, stride, channel, found), found


@triton.jit
def _context(
    y_f, y_b, taps, taps_bias, step, first, last, there, channel, f_step, b_step, dim,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """The context before its silu."""
    value = tl.zeros([step.shape[0], channel.shape[0]], tl.float32)
    if taps_bias is not None:
        value += _vector(taps_bias, channel, dim)
    for k in tl.static_range(WIDTH):
        at = step + k - WIDTH // 2
        seen_f, _ = _near(y_f, at, first, last, there, channel, f_step, dim)
        seen_b, _ = _near(y_b, at, first, last, there, channel, b_step, dim)
        value += seen_f * _vector(taps + k, channel * 2 * WIDTH, dim * 2 * WIDTH)
        value += seen_b * _vector(taps + WIDTH + k, channel * 2 * WIDTH, dim * 2 * WIDTH)
    return value


@triton.jit
def _count(step, first, last, SIDE: tl.constexpr, WINDOW: tl.constexpr, CENTRED: tl.constexpr):
    """How many steps G looks at, at least 1."""
    before = tl.minimum(step - first, WINDOW)
    after = tl.minimum(last - 1 - step, WINDOW)
    count = before + after if CENTRED else (before if SIDE < 0 else after)
    return tl.maximum(count, 1).to(tl.float32)[:, None]


@triton.jit
def _rate(
    y, step, first, last, there, channel, stride, dim,
    SIDE: tl.constexpr, WINDOW: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """G of one reading."""
    value, _ = _near(y, step, first, last, there, channel, stride, dim)
    total = tl.zeros_like(value)
    for j in tl.static_range(1, WINDOW + 1):
        other, found = _near(y, step + SIDE * j, first, last, there, channel, stride, dim)
        total += tl.where(found, tl.abs(value - other), 0.0)
        if CENTRED:
            other, found = _near(y, step - SIDE * j, first, last, there, channel, stride, dim)
            total += tl.where(found, tl.abs(value - other), 0.0)
    return total / _count(step, first, last, SIDE, WINDOW, CENTRED)


@triton.jit
def _scales(scale, step, there, feature: tl.constexpr, FEATURES: tl.constexpr):
    at = scale + step.to(tl.int64) * FEATURES + feature
    return tl.load(at, mask=there, other=0.0)[:, None]


@triton.jit
def _features(
    y_f, y_b, taps, taps_bias, scale, step, first, last, there, channel, f_step, b_step, dim,
    WIDTH: tl.constexpr, WINDOW: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """The context before its silu and the three features, normalised where `scale` is given."""
    FEATURES: tl.constexpr = (WIDTH > 0) + 2 * (WINDOW > 0)
    pre = tl.zeros([step.shape[0], channel.shape[0]], tl.float32)
    context, g_f, g_b = pre, pre, pre
    if WIDTH > 0:
        pre = _context(
            y_f, y_b, taps, taps_bias, step, first, last, there, channel, f_step, b_step, dim, WIDTH
        )
        context = pre * sigmoid(pre)
        if scale is not None:
            context *= _scales(scale, step, there, 0, FEATURES)
    if WINDOW > 0:
        g_f = _rate(y_f, step, first, last, there, channel, f_step, dim, -1, WINDOW, CENTRED)
        g_b = _rate(y_b, step, first, last, there, channel, b_step, dim, 1, WINDOW, CENTRED)
        if scale is not None:
            g_f *= _scales(scale, step, there, FEATURES - 2, FEATURES)
            g_b *= _scales(scale, step, there, FEATURES - 1, FEATURES)
    return pre, context, g_f, g_b


@triton.jit
def _weighted(diagonal, gate: tl.constexpr, context, g_f, g_b, channel, dim,
    WIDTH: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """A gate's sum over its own channel's features."""
    FEATURES: tl.constexpr = (WIDTH > 0) + 2 * (WINDOW > 0)
    diagonal += gate * FEATURES * dim
    total = tl.zeros_like(context)
    if WIDTH > 0:
        total += context * _vector(diagonal, channel, dim)
    if WINDOW > 0:
        total += g_f * _vector(diagonal + (FEATURES - 2) * dim, channel, dim)
        total += g_b * _vector(diagonal + (FEATURES - 1) * dim, channel, dim)
    return total


@triton.jit
def _gates(
    context, g_f, g_b, up, diagonal, bias, inner, step, there, channel, dim, units,
    WIDTH: tl.constexpr, WINDOW: tl.constexpr, SOFTMAX: tl.constexpr,
    UNITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    forward = tl.zeros_like(context)
    backward = tl.zeros_like(context)
    if bias is not None:
        forward += _vector(bias, channel, dim)
        backward += _vector(bias + dim, channel, dim)
    if diagonal is not None:
        forward += _weighted(diagonal, 0, context, g_f, g_b, channel, dim, WIDTH, WINDOW)
        backward += _weighted(diagonal, 1, context, g_f, g_b, channel, dim, WIDTH, WINDOW)
    if up is not None:
        h = _units(inner, step, there, units, UNITS)
        h *= sigmoid(h)
        forward += tl.dot(h, _up(up, 0, channel, dim, units, UNITS), input_precision=PRECISION)
        backward += tl.dot(h, _up(up, 1, channel, dim, units, UNITS), input_precision=PRECISION)
    if SOFTMAX:
        gate = sigmoid(forward - backward)
        return gate, 1.0 - gate
    return sigmoid(forward), sigmoid(backward)


@triton.jit(do_not_specialize=LOOSE)
def _hidden(
    y_f, y_b, taps, taps_bias, down, hidden, hidden_bias, inner, scale, dots,
    cu_seqlens, sequences, length, dim, units, f_batch, f_step, b_batch, b_step, h_batch, h_step,
    WIDTH: tl.constexpr, WINDOW: tl.constexpr, CENTRED: tl.constexpr, EPSILON: tl.constexpr,
    UNITS: tl.constexpr, PRECISION: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """`inner` (rows, units), the hidden units before their silu. To normalise also `scale` (rows,
    features), and `dots` (features, rows, units), each feature's own share of `inner`."""
    FEATURES: tl.constexpr = (WIDTH > 0) + 2 * (WINDOW > 0)
    tiles = tl.cdiv(length, STEPS)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    rows = (tl.num_programs(0) // tiles).to(tl.int64) * length
    step = tl.program_id(0) % tiles * STEPS + tl.arange(0, STEPS)
    there = step < length
    first, last = sequence_of(step, cu_seqlens, sequences, length)
    y_f += batch * f_batch
    y_b += batch * b_batch
    dot_c = tl.zeros([STEPS, UNITS], tl.float32)
    dot_f, dot_b = dot_c, dot_c
    square_c = tl.zeros([STEPS], tl.float32)
    square_f, square_b = square_c, square_c
    if (down is not None) or (scale is not None):
        for start in range(0, dim, CHANNELS):
            channel = start + tl.arange(0, CHANNELS)
            _, context, g_f, g_b = _features(
                y_f, y_b, taps, taps_bias, None, step, first, last, there, channel,
                f_step, b_step, dim, WIDTH, WINDOW, CENTRED,
            )  # fmt: skip
            if scale is not None:
                square_c += tl.sum(context * context, 1)
                square_f += tl.sum(g_f * g_f, 1)
                square_b += tl.sum(g_b * g_b, 1)
            if down is not None:
                if WIDTH > 0:
                    weight = tl.trans(_down(down, 0, channel, dim, units, FEATURES, UNITS))
                    dot_c += tl.dot(context, weight, input_precision=PRECISION)
                if WINDOW > 0:
                    weight = _down(down, FEATURES - 2, channel, dim, units, FEATURES, UNITS)
                    dot_f += tl.dot(g_f, tl.trans(weight), input_precision=PRECISION)
                    weight = _down(down, FEATURES - 1, channel, dim, units, FEATURES, UNITS)
                    dot_b += tl.dot(g_b, tl.trans(weight), input_precision=PRECISION)
    unit = tl.arange(0, UNITS)
    row = batch * length + step
    at = row[:, None] * units + unit[None, :]
    stored = there[:, None] & (unit < units)[None, :]
    if scale is not None:
        square_c = tl.rsqrt(square_c / dim + EPSILON)
        square_f = tl.rsqrt(square_f / dim + EPSILON)
        square_b = tl.rsqrt(square_b / dim + EPSILON)
        dot_c *= square_c[:, None]
        dot_f *= square_f[:, None]
        dot_b *= square_b[:, None]
        if WIDTH > 0:
            tl.store(scale + row * FEATURES, square_c, mask=there)
            tl.store(dots + at, dot_c, mask=stored)
        if WINDOW > 0:
            tl.store(scale + row * FEATURES + FEATURES - 2, square_f, mask=there)
            tl.store(scale + row * FEATURES + FEATURES - 1, square_b, mask=there)
            tl.store(dots + (FEATURES - 2) * rows * units + at, dot_f, mask=stored)
            tl.store(dots + (FEATURES - 1) * rows * units + at, dot_b, mask=stored)
    total = dot_c + dot_f + dot_b
    if hidden is not None:
        total += load_rows(hidden + batch * h_batch, step, h_step, unit, stored)
    if hidden_bias is not None:
        total += _vector(hidden_bias, unit, units)
    tl.store(inner + at, total, mask=stored)


@triton.jit(do_not_specialize=LOOSE)
def _fuse(
    y_f, y_b, z, taps, taps_bias, up, diagonal, bias, inner, scale, out,
    cu_seqlens, sequences, length, dim, units, f_batch, f_step, b_batch, b_step, z_batch, z_step,
    WIDTH: tl.constexpr, WINDOW: tl.constexpr, CENTRED: tl.constexpr, SOFTMAX: tl.constexpr,
    UNITS: tl.constexpr, PRECISION: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    FEATURES: tl.constexpr = (WIDTH > 0) + 2 * (WINDOW > 0)
    tiles = tl.cdiv(length, STEPS)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    step = tl.program_id(0) % tiles * STEPS + tl.arange(0, STEPS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    there = step < length
    here = there[:, None] & (channel < dim)[None, :]
    first, last = sequence_of(step, cu_seqlens, sequences, length)
    y_f += batch * f_batch
    y_b += batch * b_batch
    if scale is not None:
        scale += batch * length * FEATURES
    value_f = load_rows(y_f, step, f_step, channel, here)
    value_b = load_rows(y_b, step, b_step, channel, here)
    context = tl.zeros_like(value_f)
    g_f, g_b = context, context
    if diagonal is not None:
        _, context, g_f, g_b = _features(
            y_f, y_b, taps, taps_bias, scale, step, first, last, there, channel,
            f_step, b_step, dim, WIDTH, WINDOW, CENTRED,
        )  # fmt: skip
    forward, backward = _gates(
        context, g_f, g_b, up, diagonal, bias, inner + batch * length * units, step, there,
        channel, dim, units, WIDTH, WINDOW, SOFTMAX, UNITS, PRECISION,
    )  # fmt: skip
    value = forward * value_f + backward * value_b
    if z is not None:
        gate = load_rows(z + batch * z_batch, step, z_step, channel, here)
        value *= gate * sigmoid(gate)
    at = (batch * length + step)[:, None] * dim + channel[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=here)


@triton.jit
def _logit_gradients(
    y_f, y_b, z, dout, taps, taps_bias, up, diagonal, bias, inner, scale,
    step, first, last, there, channel, f_step, b_step, z_step, o_step, dim, units,
    WIDTH: tl.constexpr, WINDOW: tl.constexpr, CENTRED: tl.constexpr, SOFTMAX: tl.constexpr,
    UNITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both gates and the gradients of their logits, which are zero where there is no step."""
    here = there[:, None] & (channel < dim)[None, :]
    value_f = load_rows(y_f, step, f_step, channel, here)
    value_b = load_rows(y_b, step, b_step, channel, here)
    context = tl.zeros_like(value_f)
    g_f, g_b = context, context
    if diagonal is not None:
        _, context, g_f, g_b = _features(
            y_f, y_b, taps, taps_bias, scale, step, first, last, there, channel,
            f_step, b_step, dim, WIDTH, WINDOW, CENTRED,
        )  # fmt: skip
    forward, backward = _gates(
        context, g_f, g_b, up, diagonal, bias, inner, step, there, channel, dim, units,
        WIDTH, WINDOW, SOFTMAX, UNITS, PRECISION,
    )  # fmt: skip
    dy = load_rows(dout, step, o_step, channel, here)
    if z is not None:
        gate = load_rows(z, step, z_step, channel, here)
        dy *= gate * sigmoid(gate)
    if SOFTMAX:
        d_forward = dy * (value_f - value_b) * forward * backward
        d_backward = -d_forward
    else:
        d_forward = dy * value_f * forward * (1.0 - forward)
        d_backward = dy * value_b * backward * (1.0 - backward)
    return forward, backward, d_forward, d_backward


@triton.jit(do_not_specialize=LOOSE)
def _hidden_gradient(
    y_f, y_b, z, dout, taps, taps_bias, up, diagonal, bias, inner, scale, dots, d_inner, mean,
    cu_seqlens, sequences, length, dim, units,
    f_batch, f_step, b_batch, b_step, z_batch, z_step, o_batch, o_step,
    WIDTH: tl.constexpr, WINDOW: tl.constexpr, CENTRED: tl.constexpr, SOFTMAX: tl.constexpr,
    UNITS: tl.constexpr, PRECISION: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """`d_inner` (rows, units), and to normalise `mean` (rows, features): over channels, of a
    normalised feature times its gradient."""
    FEATURES: tl.constexpr = (WIDTH > 0) + 2 * (WINDOW > 0)
    tiles = tl.cdiv(length, STEPS)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    rows = (tl.num_programs(0) // tiles).to(tl.int64) * length
    step = tl.program_id(0) % tiles * STEPS + tl.arange(0, STEPS)
    there = step < length
    first, last = sequence_of(step, cu_seqlens, sequences, length)
    y_f += batch * f_batch
    y_b += batch * b_batch
    dout += batch * o_batch
    inner += batch * length * units
    if z is not None:
        z += batch * z_batch
    if scale is not None:
        scale += batch * length * FEATURES
    total = tl.zeros([STEPS, UNITS], tl.float32)
    mean_c = tl.zeros([STEPS], tl.float32)
    mean_f, mean_b = mean_c, mean_c
    for start in range(0, dim, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        _, _, d_forward, d_backward = _logit_gradients(
            y_f, y_b, z, dout, taps, taps_bias, up, diagonal, bias, inner, scale,
            step, first, last, there, channel, f_step, b_step, z_step, o_step, dim, units,
            WIDTH, WINDOW, CENTRED, SOFTMAX, UNITS, PRECISION,
        )  # fmt: skip
        if up is not None:
            weight = tl.trans(_up(up, 0, channel, dim, units, UNITS))
            total += tl.dot(d_forward, weight, input_precision=PRECISION)
            weight = tl.trans(_up(up, 1, channel, dim, units, UNITS))
            total += tl.dot(d_backward, weight, input_precision=PRECISION)
        if (scale is not None) and (diagonal is not None):
            _, context, g_f, g_b = _features(
                y_f, y_b, taps, taps_bias, scale, step, first, last, there, channel,
                f_step, b_step, dim, WIDTH, WINDOW, CENTRED,
            )  # fmt: skip
            other = diagonal + FEATURES * dim
            if WIDTH > 0:
                d = _vector(diagonal, channel, dim) * d_forward
                d += _vector(other, channel, dim) * d_backward
                mean_c += tl.sum(d * context, 1)
            if WINDOW > 0:
                d = _vector(diagonal + (FEATURES - 2) * dim, channel, dim) * d_forward
                d += _vector(other + (FEATURES - 2) * dim, channel, dim) * d_backward
                mean_f += tl.sum(d * g_f, 1)
                d = _vector(diagonal + (FEATURES - 1) * dim, channel, dim) * d_forward
                d += _vector(other + (FEATURES - 1) * dim, channel, dim) * d_backward
                mean_b += tl.sum(d * g_b, 1)
    unit = tl.arange(0, UNITS)
    row = batch * length + step
    at = row[:, None] * units + unit[None, :]
    stored = there[:, None] & (unit < units)[None, :]
    total *= _slope(_units(inner, step, there, units, UNITS))
    tl.store(d_inner + at, total, mask=stored)
    if scale is not None:
        if WIDTH > 0:
            mean_c += tl.sum(total * tl.load(dots + at, mask=stored, other=0.0), 1)
            tl.store(mean + row * FEATURES, mean_c / dim, mask=there)
        if WINDOW > 0:
            dots += (FEATURES - 2) * rows * units
            mean_f += tl.sum(total * tl.load(dots + at, mask=stored, other=0.0), 1)
            tl.store(mean + row * FEATURES + FEATURES - 2, mean_f / dim, mask=there)
            dots += rows * units
            mean_b += tl.sum(total * tl.load(dots + at, mask=stored, other=0.0), 1)
            tl.store(mean + row * FEATURES + FEATURES - 1, mean_b / dim, mask=there)


@triton.jit
def _feature_gradient(
    feature: tl.constexpr, x, d_forward, d_backward, d_inner, down, diagonal, scale, mean,
    step, there, channel, dim, units,
    FEATURES: tl.constexpr, UNITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a feature before it is normalised; x: the normalised one."""
    d = tl.zeros_like(x)
    if diagonal is not None:
        d += _vector(diagonal + feature * dim, channel, dim) * d_forward
        d += _vector(diagonal + (FEATURES + feature) * dim, channel, dim) * d_backward
    if down is not None:
        weight = _down(down, feature, channel, dim, units, FEATURES, UNITS)
        d += tl.dot(d_inner, weight, input_precision=PRECISION)
    if scale is not None:
        d -= x * _scales(mean, step, there, feature, FEATURES)
        d *= _scales(scale, step, there, feature, FEATURES)
    return d


@triton.jit
def _through_rate(
    y, value, d, step, first, last, there, channel, stride, dim,
    OFFSET: tl.constexpr, SIDE: tl.constexpr, WINDOW: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """What the gradient d of G, OFFSET steps away, is to the reading `value` at each step."""
    slope = tl.zeros_like(value)
    if OFFSET == 0:
        for j in tl.static_range(1, WINDOW + 1):
            other, found = _near(y, step + SIDE * j, first, last, there, channel, stride, dim)
            slope += tl.where(found, _sign(value - other), 0.0)
            if CENTRED:
                other, found = _near(y, step - SIDE * j, first, last, there, channel, stride, dim)
                slope += tl.where(found, _sign(value - other), 0.0)
    else:
        other, found = _near(y, step + OFFSET, first, last, there, channel, stride, dim)
        slope += tl.where(found, _sign(value - other), 0.0)
    return slope * d / _count(step + OFFSET, first, last, SIDE, WINDOW, CENTRED)


@triton.jit(do_not_specialize=LOOSE)
def _gradients(
    y_f, y_b, z, dout, taps, taps_bias, down, up, diagonal, bias, inner, d_inner, scale, mean,
    dy_f, dy_b, dz, cu_seqlens, sequences, length, dim, units,
    f_batch, f_step, b_batch, b_step, z_batch, z_step, o_batch, o_step,
    WIDTH: tl.constexpr, WINDOW: tl.constexpr, CENTRED: tl.constexpr, SOFTMAX: tl.constexpr,
    UNITS: tl.constexpr, PRECISION: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradients of the readings and of z."""
    FEATURES: tl.constexpr = (WIDTH > 0) + 2 * (WINDOW > 0)
    HALF: tl.constexpr = WIDTH // 2
    REACH: tl.constexpr = HALF if HALF > WINDOW else WINDOW
    tiles = tl.cdiv(length, STEPS)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    step = tl.program_id(0) % tiles * STEPS + tl.arange(0, STEPS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    seen = step < length
    here = seen[:, None] & (channel < dim)[None, :]
    first, last = sequence_of(step, cu_seqlens, sequences, length)
    y_f += batch * f_batch
    y_b += batch * b_batch
    dout += batch * o_batch
    inner += batch * length * units
    d_inner += batch * length * units
    at = (batch * length + step)[:, None] * dim + channel[None, :]
    if z is not None:
        z += batch * z_batch
    if scale is not None:
        scale += batch * length * FEATURES
        mean += batch * length * FEATURES
    forward, backward, d_forward, d_backward = _logit_gradients(
        y_f, y_b, z, dout, taps, taps_bias, up, diagonal, bias, inner, scale,
        step, first, last, seen, channel, f_step, b_step, z_step, o_step, dim, units,
        WIDTH, WINDOW, CENTRED, SOFTMAX, UNITS, PRECISION,
    )  # fmt: skip
    value_f = load_rows(y_f, step, f_step, channel, here)
    value_b = load_rows(y_b, step, b_step, channel, here)
    dy = load_rows(dout, step, o_step, channel, here)
    if z is not None:
        gate = load_rows(z, step, z_step, channel, here)
        d = dy * (forward * value_f + backward * value_b) * _slope(gate)
        tl.store(dz + at, d.to(dz.dtype.element_ty), mask=here)
        dy *= gate * sigmoid(gate)
    total_f = dy * forward
    total_b = dy * backward
    # A feature up to REACH steps away reads this step.
    for i in tl.static_range(2 * REACH + 1):
        offset = i - REACH
        near = offset >= -WINDOW and offset <= WINDOW and WINDOW > 0
        there = seen & (step + offset >= first) & (step + offset < last)
        near_forward, near_backward = d_forward, d_backward
        if (offset != 0) and (diagonal is not None):
            _, _, near_forward, near_backward = _logit_gradients(
                y_f, y_b, z, dout, taps, taps_bias, up, diagonal, bias, inner, scale,
                step + offset, first, last, there, channel, f_step, b_step, z_step, o_step,
                dim, units, WIDTH, WINDOW, CENTRED, SOFTMAX, UNITS, PRECISION,
            )  # fmt: skip
        pre, context, g_f, g_b = _features(
            y_f, y_b, taps, taps_bias, scale, step + offset, first, last, there, channel,
            f_step, b_step, dim, WIDTH, WINDOW, CENTRED,
        )  # fmt: skip
        d_units = _units(d_inner, step + offset, there, units, UNITS)
        if offset >= -HALF and offset <= HALF and WIDTH > 0:
            d = _slope(pre) * _feature_gradient(
                0, context, near_forward, near_backward, d_units, down, diagonal, scale, mean,
                step + offset, there, channel, dim, units, FEATURES, UNITS, PRECISION,
            )  # fmt: skip
            tap = taps + HALF - offset
            total_f += d * _vector(tap, channel * 2 * WIDTH, dim * 2 * WIDTH)
            total_b += d * _vector(tap + WIDTH, channel * 2 * WIDTH, dim * 2 * WIDTH)
        if near and (offset >= 0 or CENTRED):
            d = _feature_gradient(
                FEATURES - 2, g_f, near_forward, near_backward, d_units, down, diagonal, scale,
                mean, step + offset, there, channel, dim, units, FEATURES, UNITS, PRECISION,
            )  # fmt: skip
            total_f += _through_rate(
                y_f, value_f, d, step, first, last, seen, channel, f_step, dim,
                offset, -1, WINDOW, CENTRED,
            )  # fmt: skip
        if near and (offset <= 0 or CENTRED):
            d = _feature_gradient(
                FEATURES - 1, g_b, near_forward, near_backward, d_units, down, diagonal, scale,
                mean, step + offset, there, channel, dim, units, FEATURES, UNITS, PRECISION,
            )  # fmt: skip
            total_b += _through_rate(
                y_b, value_b, d, step, first, last, seen, channel, b_step, dim,
                offset, 1, WINDOW, CENTRED,
            )  # fmt: skip
    tl.store(dy_f + at, total_f.to(dy_f.dtype.element_ty), mask=here)
    tl.store(dy_b + at, total_b.to(dy_b.dtype.element_ty), mask=here)


@triton.jit
def _add(sums, index: tl.constexpr, tile):
    """`sums` (SUMS, channels) with the sum of a tile's steps added to one row."""
    row = tl.arange(0, sums.shape[0])
    return sums + tl.where((row == index)[:, None], tl.sum(tile, 0)[None, :], 0.0)


@triton.jit(do_not_specialize=LOOSE)
def _parameter_gradients(
    y_f, y_b, z, dout, taps, taps_bias, down, up, diagonal, bias, inner, d_inner, scale, mean,
    partial, cu_seqlens, sequences, length, dim, units,
    f_batch, f_step, b_batch, b_step, z_batch, z_step, o_batch, o_step,
    WIDTH: tl.constexpr, WINDOW: tl.constexpr, CENTRED: tl.constexpr, SOFTMAX: tl.constexpr,
    UNITS: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """`partial` (chunks, SUMS + (FEATURES + 1) * UNITS, dim): gradients over a chunk of steps.

    Its rows: 2 WIDTH taps, the taps' bias, 2 biases and 2 FEATURES of the diagonal; down of every
    feature; up.
    """
    FEATURES: tl.constexpr = (WIDTH > 0) + 2 * (WINDOW > 0)
    chunks = tl.cdiv(length, CHUNK)
    batch = (tl.program_id(0) // chunks).to(tl.int64)
    begin = tl.program_id(0) % chunks * CHUNK
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    y_f += batch * f_batch
    y_b += batch * b_batch
    dout += batch * o_batch
    inner += batch * length * units
    d_inner += batch * length * units
    if z is not None:
        z += batch * z_batch
    if scale is not None:
        scale += batch * length * FEATURES
        mean += batch * length * FEATURES
    sums = tl.zeros([SUMS, CHANNELS], tl.float32)
    down_c = tl.zeros([UNITS, CHANNELS], tl.float32)
    down_f, down_b, d_up = down_c, down_c, down_c
    for tile in range(begin, tl.minimum(begin + CHUNK, length), STEPS):
        step = tile + tl.arange(0, STEPS)
        first, last = sequence_of(step, cu_seqlens, sequences, length)
        seen = step < length
        _, _, d_forward, d_backward = _logit_gradients(
            y_f, y_b, z, dout, taps, taps_bias, up, diagonal, bias, inner, scale,
            step, first, last, seen, channel, f_step, b_step, z_step, o_step, dim, units,
            WIDTH, WINDOW, CENTRED, SOFTMAX, UNITS, PRECISION,
        )  # fmt: skip
        if bias is not None:
            sums = _add(sums, 2 * WIDTH + 1, d_forward)
            sums = _add(sums, 2 * WIDTH + 2, d_backward)
        if up is not None:
            h = _units(inner, step, seen, units, UNITS)
            h *= sigmoid(h)
            own = (tl.arange(0, UNITS) < units // 2)[None, :]
            part = tl.trans(tl.where(own, h, 0.0))
            d_up += tl.dot(part, d_forward, input_precision=PRECISION)
            part = tl.trans(tl.where(own, 0.0, h))
            d_up += tl.dot(part, d_backward, input_precision=PRECISION)
        if (down is not None) or (diagonal is not None):
            pre, context, g_f, g_b = _features(
                y_f, y_b, taps, taps_bias, scale, step, first, last, seen, channel,
                f_step, b_step, dim, WIDTH, WINDOW, CENTRED,
            )  # fmt: skip
            d_units = _units(d_inner, step, seen, units, UNITS)
            if WIDTH > 0:
                d = _slope(pre) * _feature_gradient(
                    0, context, d_forward, d_backward, d_units, down, diagonal, scale, mean,
                    step, seen, channel, dim, units, FEATURES, UNITS, PRECISION,
                )  # fmt: skip
                sums = _add(sums, 2 * WIDTH, d)
                for k in tl.static_range(WIDTH):
                    at = step + k - WIDTH // 2
                    read, _ = _near(y_f, at, first, last, seen, channel, f_step, dim)
                    sums = _add(sums, k, d * read)
                    read, _ = _near(y_b, at, first, last, seen, channel, b_step, dim)
                    sums = _add(sums, WIDTH + k, d * read)
            if down is not None:
                part = tl.trans(d_units)
                if WIDTH > 0:
                    down_c += tl.dot(part, context, input_precision=PRECISION)
                if WINDOW > 0:
                    down_f += tl.dot(part, g_f, input_precision=PRECISION)
                    down_b += tl.dot(part, g_b, input_precision=PRECISION)
            if diagonal is not None:
                if WIDTH > 0:
                    sums = _add(sums, 2 * WIDTH + 3, d_forward * context)
                    sums = _add(sums, 2 * WIDTH + 3 + FEATURES, d_backward * context)
                if WINDOW > 0:
                    sums = _add(sums, 2 * WIDTH + 1 + FEATURES, d_forward * g_f)
                    sums = _add(sums, 2 * WIDTH + 1 + 2 * FEATURES, d_backward * g_f)
                    sums = _add(sums, 2 * WIDTH + 2 + FEATURES, d_forward * g_b)
                    sums = _add(sums, 2 * WIDTH + 2 + 2 * FEATURES, d_backward * g_b)
    partial += tl.program_id(0).to(tl.int64) * (SUMS + (FEATURES + 1) * UNITS) * dim
    inside = (channel < dim)[None, :]
    at = tl.arange(0, SUMS)[:, None] * dim + channel[None, :]
    tl.store(partial + at, sums, mask=inside)
    at = (SUMS + tl.arange(0, UNITS))[:, None] * dim + channel[None, :]
    if WIDTH > 0:
        tl.store(partial + at, down_c, mask=inside)
    if WINDOW > 0:
        tl.store(partial + at + (FEATURES - 2) * UNITS * dim, down_f, mask=inside)
        tl.store(partial + at + (FEATURES - 1) * UNITS * dim, down_b, mask=inside)
    tl.store(partial + at + FEATURES * UNITS * dim, d_up, mask=inside)


def _plan(y_f: Tensor, taps: Tensor | None, window: int) -> dict[str, Any]:
    """Constexprs that follow from the inputs."""
    return {
        "WIDTH": 0 if taps is None else taps.shape[2],
        "WINDOW": window,
        "UNITS": MOST_UNITS,
        "PRECISION": PRECISION[y_f.dtype],
    }


class _Call:
    """The inputs of one call as the kernels take them, and launches with them."""

    def __init__(self, given: tuple[Tensor | None, ...], cu_seqlens: Tensor | None, window: int):
        self.inputs: dict[str, Any] = {
            name: t if t is None else last_contiguous(t) if name in LETTERS else t.contiguous()
            for name, t in zip(INPUTS, given, strict=True)
        }
        y_f, up = self.inputs["y_f"], self.inputs["up"]
        self.batch, self.length, self.dim = y_f.shape
        self.units = 0 if up is None else 2 * up.shape[2]
        self.plan = _plan(y_f, self.inputs["taps"], window)
        self.features = (self.plan["WIDTH"] > 0) + 2 * (window > 0)
        self.inputs["cu_seqlens"] = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.inputs["sequences"] = 0 if cu_seqlens is None else len(cu_seqlens) - 1
        self.inputs |= {"length": self.length, "dim": self.dim, "units": self.units}
        self.take(**{letter: self.inputs[name] for name, letter in LETTERS.items()})

    def take(self, **tensors: Tensor | None) -> None:
        """The strides of (batch, length, …) tensors, under their letters."""
        for letter, t in tensors.items():
            for axis, name in enumerate(("batch", "step")):
                self.inputs[f"{letter}_{name}"] = 0 if t is None else t.stride(axis)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.inputs["y_f"].device)

    def launch(self, kernel: Any, steps: int | None = None, **options: Any) -> None:
        """A program for each tile; for each `steps` steps, where that is given."""
        known = self.inputs | self.plan | TILE | options
        blocks = triton.cdiv(self.length, steps or known["STEPS"])
        grid = (self.batch * blocks, triton.cdiv(self.dim, known["CHANNELS"]))
        self._run(kernel, grid, known, OPTIONS)

    def sum(self, kernel: Any, **options: Any) -> None:
        """A program for each tile's steps, which walks over all channels."""
        known = self.inputs | self.plan | SUMMING | options
        grid = (self.batch * triton.cdiv(self.length, known["STEPS"]),)
        self._run(kernel, grid, known, SUMMING_OPTIONS)

    def _run(
        self, kernel: Any, grid: tuple[int, ...], known: dict[str, Any], options: dict[str, int]
    ) -> None:
        with torch.cuda.device_of(self.inputs["y_f"]):
            kernel[grid](**{name: known[name] for name in kernel.arg_names}, **options)

    def hidden(self, options: dict[str, Any], normalise: bool) -> None:
        """Runs `_hidden` where there is something to sum over channels."""
        rows = self.batch * self.length
        kept: dict[str, Any] = {"inner": self.empty(rows, self.units), "scale": None, "dots": None}
        if normalise and self.features:
            kept["scale"] = self.empty(rows, self.features)
            kept["dots"] = self.empty(self.features, rows, self.units)
        self.inputs |= kept
        if self.units or kept["scale"] is not None:
            self.sum(_hidden, EPSILON=EPSILON, **options)


def fuse_forward(*inputs: Any) -> Tensor:
    """`fuse_forward` of the compiled kernel, argument for argument."""
    *given, cu_seqlens, window, centred, normalise, softmax = inputs
    call = _Call(tuple(given), cu_seqlens, window)
    out = call.empty(*given[0].shape, dtype=given[0].dtype)
    if out.numel():
        call.hidden({"CENTRED": centred}, normalise)
        call.launch(_fuse, out=out, CENTRED=centred, SOFTMAX=softmax)
    return out


def fuse_backward(dout: Tensor, *inputs: Any) -> list[Tensor]:
    """`fuse_backward` of the compiled kernel, argument for argument."""
    *given, cu_seqlens, window, centred, normalise, softmax = inputs
    call = _Call(tuple(given), cu_seqlens, window)
    batch, length, dim, units = call.batch, call.length, call.dim, call.units
    width, features = call.plan["WIDTH"], call.features
    dout = last_contiguous(dout)
    call.take(o=dout)
    y_f, y_b, z, *_ = given
    grads: dict[str, Any] = {
        f"d{name}": None if t is None else call.empty(batch, length, dim, dtype=t.dtype)
        for name, t in (("y_f", y_f), ("y_b", y_b), ("z", z))
    }
    head = triton.next_power_of_2(2 * width + 3 + 2 * features)
    chunks = batch * triton.cdiv(length, CHUNK)
    partial = call.empty(chunks, head + (features + 1) * MOST_UNITS, dim)
    d_inner = call.empty(batch, length, units)
    if batch * length * dim:
        call.hidden({"CENTRED": centred}, normalise)
        mean = None if call.inputs["scale"] is None else call.empty(batch, length, features)
        call.inputs |= {"dout": dout, "d_inner": d_inner, "mean": mean, "partial": partial}
        options = {"CENTRED": centred, "SOFTMAX": softmax}
        if units or mean is not None:
            call.sum(_hidden_gradient, **options)
        call.launch(_gradients, **grads, **options)
        call.launch(_parameter_gradients, CHUNK, SUMS=head, CHUNK=CHUNK, **options)
    sums = partial.sum(0)
    tapped, diagonal = sums[: 2 * width], sums[2 * width + 3 :][: 2 * features]
    down = sums[head:][: features * MOST_UNITS].view(features, MOST_UNITS, dim)[:, :units]
    up = sums[head + features * MOST_UNITS :][:units]
    parameters = {
        "dtaps": tapped.view(2, width, dim).permute(2, 0, 1),
        "dtaps_bias": sums[2 * width],
        "ddown": down.transpose(0, 1),
        "dhidden": d_inner,
        "dhidden_bias": d_inner.sum((0, 1)),
        "dup": up.view(2, units // 2, dim).transpose(1, 2),
        "ddiagonal": diagonal.view(2, features, dim),
        "dbias": sums[2 * width + 1 :][:2],
    }
    grads |= {
        name: parameters[name].to(t.dtype).clone(memory_format=torch.contiguous_format)
        for name, t in zip((f"d{name}" for name in INPUTS), given, strict=True)
        if name in parameters and t is not None
    }
    none = y_f.new_empty(0, dtype=torch.float32)
    return [none if t is None else grads[f"d{name}"] for name, t in zip(INPUTS, given, strict=True)]


TritonFuse = eager(fuse_forward, fuse_backward)


def compilations() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """What `scripts/compile-kernels` compiles: what hzip-lean asks for, plain and with its options
    for gates, and the diagonal form."""
    parameters = ("taps", "taps_bias", "down", "hidden_bias", "up", "bias", "diagonal")
    floats = ("inner", "scale", "dots", "d_inner", "mean", "partial", *parameters)
    types = dict.fromkeys(floats, "*fp32") | {"cu_seqlens": "*i32"}
    lean = {"hidden", "diagonal"}
    plain = {"cu_seqlens", "scale", "dots", "mean"}
    cases = (
        ("float32, lean", "*fp32", lean | plain, False),
        ("bfloat16, lean", "*bf16", lean | plain, False),
        ("bfloat16, lean, packed, normalised, centred, softmax", "*bf16", lean, True),
        ("bfloat16, diagonal", "*bf16", plain | {"hidden", "hidden_bias", "down", "up"}, False),
    )
    for case, kind, absent, options in cases:
        plan = {
            **{"WIDTH": 3, "WINDOW": 1, "UNITS": MOST_UNITS, "SUMS": 16, "CHUNK": CHUNK},
            **{"CENTRED": options, "SOFTMAX": options, "EPSILON": EPSILON},
            **{"PRECISION": PRECISION[torch.float32 if kind == "*fp32" else torch.bfloat16]},
        }
        for kernel in (_hidden, _fuse, _hidden_gradient, _gradients, _parameter_gradients):
            summing = kernel in (_hidden, _hidden_gradient)
            if summing and "up" in absent:
                continue
            names = kernel.arg_names
            known = plan | (SUMMING if summing else TILE) | dict.fromkeys(absent)
            fixed = {name: known[name] for name in names if name in known}
            sizes = {n for n in names if n in SIZES or n.endswith(("_batch", "_step"))}
            signature = {
                name: "i32" if name in sizes else types.get(name, kind)
                for name in names
                if name not in fixed
            }
            launched = SUMMING_OPTIONS if summing else OPTIONS
            yield f"hzip_fuse{kernel.__name__}, {case}", kernel, signature, fixed, launched
