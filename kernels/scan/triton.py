"""The selective scan on NVIDIA GPUs, in Triton, and the block scan, which is the same passes.

A program is one warp: one stretch of tokens (a segment) times LANES channels, one a thread. A
thread holds all states of its channel in registers, GROUP side by side (one 16-byte load), so that
sums over states cost nothing. A sequence is one segment where there are enough programs to fill the
machine; else it is cut, and there are three passes: the summary of every segment (its ΣΔ and its
last state from zero), a walk over the summaries that hands every segment the state at its start,
and the outputs. The nodes of a block scan are events of that walk. The backward pass is the same
three passes the other way round; states are recomputed a tile of TILE steps at a time from those at
the tiles' starts.

Every sum has a fixed order that depends on shapes and the machine alone: there are no atomics.
"""

# ruff: noqa: RUF005  (Triton has no iterable unpacking)
# mypy: disable-error-code="misc, assignment, var-annotated, attr-defined"
from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexbench.kernels.device import LOG2E, sigmoid
from flexbench.kernels.scan.cpu import runner

LANES = tl.constexpr(32)
"""Channels of a program: one a thread of its only warp."""
GROUP = tl.constexpr(4)
"""States side by side in a thread."""
TILE = tl.constexpr(8)
"""Steps between stored states: what a thread has registers to recompute."""
LN2 = tl.constexpr(0.6931471805599453)
SWAP = tl.constexpr(1)  # between OPEN and MIX of flexbench.kernels.block
LATEST = tl.constexpr(2**31 - 1)

OPTIONS = {"num_warps": 1, "num_stages": 1}

WARPS_PER_SM = 4
"""What fills the machine: with fewer programs than half of this, sequences are cut."""
SHORTEST = 64
"""Tokens of the shortest segment worth a program."""


@triton.jit
def _softplus(x):
    """log(1 + e^x), also relative to itself: log1p(e) = 2 atanh(e / (2 + e))."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    s = e / (e + 2.0)
    r = s * s
    p = ((((r / 13 + 1 / 11) * r + 1 / 9) * r + 1 / 7) * r + 1 / 5) * r + 1 / 3
    return tl.maximum(x, 0.0) + 2.0 * s * (p * r + 1.0)


@triton.jit
def _expm1(x):
    p = x * (1 / 40320) + 1 / 5040
    p = ((((p * x + 1 / 720) * x + 1 / 120) * x + 1 / 24) * x + 1 / 6) * x + 1 / 2
    return tl.where(tl.abs(x) < 0.35, (p * x + 1.0) * x, tl.exp2(x * LOG2E) - 1.0)


@triton.jit
def _gain(x, m):
    """What m equal inputs add up to under decay e^x: the sum of e^(kx) over k < m."""
    k = m - 1
    s1 = k * m / 2
    s2 = s1 * (2 * k + 1) / 3
    series = ((x * (s1 * s1 / 6) + s2 / 2) * x + s1) * x + m
    near = tl.abs(x * m) < 0.05
    return tl.where(near, series, _expm1(x * m) / tl.where(near, 1.0, _expm1(x)))


@triton.jit
def _gain_slope(x, gain, m):
    """The gain's derivative by x."""
    k = m - 1
    s1 = k * m / 2
    s2 = s1 * (2 * k + 1) / 3
    s4 = s2 * (3 * k * k + 3 * k - 1) / 5
    series = ((x * (s4 / 6) + s1 * s1 / 2) * x + s2) * x + s1
    near = tl.abs(x * m) < 0.05
    direct = m * tl.exp2(x * m * LOG2E) - gain * tl.exp2(x * LOG2E)
    return tl.where(near, series, direct / tl.where(near, 1.0, _expm1(x)))


@triton.jit
def _load_group(pointer, row, g, d, dim, STATE: tl.constexpr, SIZE: tl.constexpr = GROUP):
    """(LANES, SIZE) states of a (rows, dim, STATE) tensor, zero past its ends."""
    n = g * SIZE + tl.arange(0, SIZE)[None, :]
    at = pointer + (row.to(tl.int64) * dim + d[:, None]) * STATE + n
    return tl.load(at, mask=(d[:, None] < dim) & (n < STATE), other=0.0)


@triton.jit
def _store_group(pointer, row, g, d, dim, STATE: tl.constexpr, value, SIZE: tl.constexpr = GROUP):
    n = g * SIZE + tl.arange(0, SIZE)[None, :]
    at = pointer + (row.to(tl.int64) * dim + d[:, None]) * STATE + n
    tl.store(at, value, mask=(d[:, None] < dim) & (n < STATE))


@triton.jit
def _load_states(pointer, row, d, dim, STATE: tl.constexpr, given: tl.constexpr):
    """All groups of a row; zeros where there is no such tensor."""
    states = ()
    for g in tl.static_range((STATE + GROUP - 1) // GROUP):
        if given:
            states = states + (_load_group(pointer, row, g, d, dim, STATE),)
        else:
            states = states + (tl.zeros([LANES, GROUP], tl.float32),)
    return states


@triton.jit
def _store_states(pointer, row, d, dim, STATE: tl.constexpr, states):
    for g in tl.static_range((STATE + GROUP - 1) // GROUP):
        _store_group(pointer, row, g, d, dim, STATE, states[g])


@triton.jit
def _load_shared(
    BC, row, room, t, g, WHICH: tl.constexpr, STATE: tl.constexpr, sign: tl.constexpr,
    SIZE: tl.constexpr = GROUP,
):  # fmt: skip
    """A group of B (0) or C (1) of a tile's step t, in every lane: a wide load of one address."""
    width: tl.constexpr = (STATE + GROUP - 1) // GROUP * GROUP
    n = tl.broadcast_to(tl.arange(0, SIZE)[None, :] + (g * SIZE + WHICH * width), [LANES, SIZE])
    return tl.load(BC + row * (2 * width) + n + sign * tl.minimum(t, room) * (2 * width))


@triton.jit
def _load_tile(pointer, row, room, stride, d, dim, sign: tl.constexpr):
    """(LANES,) of each of a tile's steps, in the dtype in which they lie."""
    rows = ()
    for t in tl.static_range(TILE):
        at = pointer + row * stride + d + sign * tl.minimum(t, room) * stride
        rows = rows + (tl.load(at, mask=d < dim, other=0.0),)
    return rows


@triton.jit
def _load_step(pointer, row, room, t: tl.constexpr, stride, d, dim, sign: tl.constexpr):
    """A tile's step once more, from the cache: there are no registers to keep it in."""
    at = pointer + row * stride + d + sign * t * stride
    return tl.load(at, mask=d < tl.where(t <= room, dim, 0), other=0.0).to(tl.float32)


@triton.jit
def _store_step(pointer, row, room, t: tl.constexpr, d, dim, value, sign: tl.constexpr):
    at = pointer + row * dim + d + sign * t * dim
    tl.store(at, value.to(pointer.dtype.element_ty), mask=d < tl.where(t <= room, dim, 0))


@triton.jit
def _count(repeats, row, room, t, sign: tl.constexpr):
    """How many tokens step t stands for."""
    m = 1.0
    if repeats is not None:
        m = tl.load(repeats + row + sign * tl.minimum(t, room)).to(tl.float32)
    return m


@triton.jit
def _step_size(raw, bias, valid, SOFTPLUS: tl.constexpr):
    """Δ of a token; past the segment's end zero, which is the identity."""
    x = raw.to(tl.float32) + bias
    if SOFTPLUS:
        x = _softplus(x)
    return tl.where(valid, x, 0.0)


@triton.jit
def _bias(delta_bias, d, dim):
    bias = tl.zeros([LANES], tl.float32)
    if delta_bias is not None:
        bias = tl.load(delta_bias + d, mask=d < dim, other=0.0)
    return bias


@triton.jit
def _place(cuts, blocks, REVERSE: tl.constexpr):
    """The program's segment and channels: index, first row, length, channels."""
    segment = tl.program_id(0) // blocks
    d = tl.program_id(0) % blocks * LANES + tl.arange(0, LANES)
    begin, end = tl.load(cuts + segment), tl.load(cuts + segment + 1)
    first = begin
    if REVERSE:
        first = end - 1
    # An empty segment may lie past the last row; what is read ahead must be there all the same.
    return segment, tl.where(begin < end, first, 0), end - begin, d


@triton.jit
def _set(values, i: tl.constexpr, value):
    return values[:i] + (value,) + values[i + 1 :]


@triton.jit
def _tile(first, begin, length, sign: tl.constexpr):
    """The row of a segment's step `begin`, and how many steps there are after it.

    Past the segment's end there are none, and the row is its last.
    """
    last = tl.maximum(length, 1) - 1
    start = tl.minimum(begin, last)
    return (first + sign * start).to(tl.int64), last - start


@triton.jit
def _advance(h, step, carried, B, A2, m, REPEATS: tl.constexpr):
    """One step of a group: `step` is Δ, `carried` Δ u, A2 is A log2 e."""
    x2 = step[:, None] * A2
    if REPEATS:
        return tl.exp2(x2 * m) * h + carried[:, None] * B * _gain(x2 * LN2, m)
    return tl.exp2(x2) * h + carried[:, None] * B


@triton.jit
def _load_A2(A, d, dim, STATE: tl.constexpr):
    """A log2 e, by group."""
    A2 = ()
    for g in tl.static_range((STATE + GROUP - 1) // GROUP):
        A2 = A2 + (_load_group(A, tl.program_id(0) * 0, g, d, dim, STATE) * LOG2E,)
    return A2


@triton.jit
def _load_BC(BC, row, room, t, STATE: tl.constexpr, sign: tl.constexpr):
    """B and C of one step: a group of one, then of the other, and so on."""
    shared = ()
    for g in tl.static_range((STATE + GROUP - 1) // GROUP):
        shared = shared + (
            _load_shared(BC, row, room, t, g, 0, STATE, sign),
            _load_shared(BC, row, room, t, g, 1, STATE, sign),
        )
    return shared


@triton.jit(do_not_specialize=["blocks"])
def _outputs(
    u, delta, A, BC, D, z, delta_bias, repeats, cuts, start,
    y, last, checkpoints,
    u_stride, delta_stride, z_stride, dim, blocks,
    STATE: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """A segment's outputs from the state at its start.

    What a tile reads by channel is asked for a tile before, and B and C AHEAD steps before: there
    may be no other warp whose work would hide the wait.
    """
    segment, first, length, d = _place(cuts, blocks, REVERSE)
    groups: tl.constexpr = (STATE + GROUP - 1) // GROUP
    sign: tl.constexpr = -1 if REVERSE else 1
    bias = _bias(delta_bias, d, dim)
    A2 = _load_A2(A, d, dim, STATE)
    h = _load_states(start, segment, d, dim, STATE, start is not None)
    tile = tl.load(cuts + segment) // TILE + segment
    row, room = _tile(first, 0, length, sign)
    next_u = _load_tile(u, row, room, u_stride, d, dim, sign)
    next_delta = _load_tile(delta, row, room, delta_stride, d, dim, sign)
    shared = ()
    for t in tl.static_range(AHEAD):
        shared = shared + _load_BC(BC, row, room, t, STATE, sign)
    for begin in range(0, length, TILE):
        if checkpoints is not None:
            _store_states(checkpoints, tile + begin // TILE, d, dim, STATE, h)
        row, room = _tile(first, begin, length, sign)
        next_row, next_room = _tile(first, begin + TILE, length, sign)
        us, steps, ys = (), (), ()
        for t in tl.static_range(TILE):
            us = us + (next_u[t].to(tl.float32),)
            steps = steps + (_step_size(next_delta[t], bias, t <= room, SOFTPLUS),)
        next_u = _load_tile(u, next_row, next_room, u_stride, d, dim, sign)
        next_delta = _load_tile(delta, next_row, next_room, delta_stride, d, dim, sign)
        if z is not None:
            gates = _load_tile(z, row, room, z_stride, d, dim, sign)
        for t in tl.static_range(TILE):
            shared = shared + _load_BC(BC, row, room, t + AHEAD, STATE, sign)
            m = _count(repeats, row, room, t, sign)
            out = tl.zeros([LANES, GROUP], tl.float32)
            after = ()
            for g in tl.static_range(groups):
                x = _advance(
                    h[g], steps[t], steps[t] * us[t], shared[2 * g], A2[g], m, repeats is not None
                )
                out += x * shared[2 * g + 1]
                after = after + (x,)
            h, shared = after, shared[2 * groups :]
            ys = ys + (tl.sum(out, 1),)
        for t in tl.static_range(TILE):
            out = ys[t]
            if D is not None:
                out += us[t] * tl.load(D + d, mask=d < dim, other=0.0)
            if z is not None:
                gate = gates[t].to(tl.float32)
                out *= gate * sigmoid(gate)
            _store_step(y, row, room, t, d, dim, out, sign)
    if last is not None:
        _store_states(last, segment, d, dim, STATE, h)


@triton.jit(do_not_specialize=["blocks"])
def _summaries(
    u, delta, A, BC, z, delta_bias, repeats, cuts,
    total, summary,
    u_stride, delta_stride, z_stride, dim, blocks,
    STATE: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, ADJOINT: tl.constexpr,
):  # fmt: skip
    """A segment's ΣΔ and its last state from zero.

    Adjoint: u is dy, C stands for B, and the summary is the gradient of the state at the start
    where that at the end has none.
    """
    segment, first, length, d = _place(cuts, blocks, REVERSE != ADJOINT)
    groups: tl.constexpr = (STATE + GROUP - 1) // GROUP
    sign: tl.constexpr = -1 if REVERSE != ADJOINT else 1
    bias = _bias(delta_bias, d, dim)
    A2 = _load_A2(A, d, dim, STATE)
    h = _load_states(summary, segment, d, dim, STATE, False)
    sum_step = tl.zeros([LANES], tl.float32)
    for begin in range(0, length, TILE):
        row, room = _tile(first, begin, length, sign)
        us = _load_tile(u, row, room, u_stride, d, dim, sign)
        deltas = _load_tile(delta, row, room, delta_stride, d, dim, sign)
        if z is not None:
            gates = _load_tile(z, row, room, z_stride, d, dim, sign)
        for t in tl.static_range(TILE):
            m = _count(repeats, row, room, t, sign)
            step = _step_size(deltas[t], bias, t <= room, SOFTPLUS)
            x = us[t].to(tl.float32)
            if not ADJOINT:
                x *= step
            else:
                x = tl.where(t <= room, x, 0.0)
                if z is not None:
                    gate = gates[t].to(tl.float32)
                    x *= gate * sigmoid(gate)
            after = ()
            for g in tl.static_range(groups):
                b = _load_shared(BC, row, room, t, g, 1 if ADJOINT else 0, STATE, sign)
                if ADJOINT:
                    state = (h[g] + x[:, None] * b) * tl.exp2(step[:, None] * A2[g] * m)
                else:
                    state = _advance(h[g], step, x, b, A2[g], m, repeats is not None)
                after = after + (state,)
            h = after
            sum_step += step * m
    _store_states(summary, segment, d, dim, STATE, h)
    tl.store(total + segment.to(tl.int64) * dim + d, sum_step, mask=d < dim)


@triton.jit
def _pass_events(
    h, event, last_event, limit, events, alpha, gap, g, d, dim, STATE: tl.constexpr
):  # fmt: skip
    """Applies the events before token `limit`; what each node holds lies in `gap` as long."""
    while tl.load(events + event * 4, mask=event < last_event, other=LATEST) < limit:
        operation = tl.load(events + event * 4 + 1)
        node = tl.load(events + event * 4 + 2)
        tl.debug_barrier()
        held = _load_group(gap, node, g, d, dim, STATE)
        weight = tl.load(alpha + node.to(tl.int64) * dim + d, mask=d < dim, other=0.0)[:, None]
        mixes = operation > SWAP
        mixed = weight * h + (1.0 - weight) * held
        _store_group(gap, node, g, d, dim, STATE, tl.where(mixes, h - held, h))
        h = tl.where(mixes, mixed, tl.where(operation == SWAP, held, h))
        event += 1
    return h, event


@triton.jit(do_not_specialize=["blocks"])
def _walk(
    A, cuts, bounds, total, summary, initial, events, event_bounds, alpha,
    start, last, gap,
    dim, blocks,
    STATE: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The state at every segment's start; `gap` is what a node mixes, h - held."""
    g = tl.program_id(1)
    sequence = tl.program_id(0) // blocks
    d = tl.program_id(0) % blocks * LANES + tl.arange(0, LANES)
    low, high = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
    A2 = _load_group(A, sequence * 0, g, d, dim, STATE) * LOG2E
    h = tl.zeros([LANES, GROUP], tl.float32)
    if initial is not None:
        h = _load_group(initial, sequence, g, d, dim, STATE)
    event, last_event = 0, 0
    if events is not None:
        event, last_event = tl.load(event_bounds + sequence), tl.load(event_bounds + sequence + 1)
    for i in range(low, high):
        segment = i
        if REVERSE:
            segment = low + high - 1 - i
        if events is not None:
            limit = tl.load(cuts + i) + 1
            h, event = _pass_events(
                h, event, last_event, limit, events, alpha, gap, g, d, dim, STATE
            )
        _store_group(start, segment, g, d, dim, STATE, h)
        x = tl.load(total + segment.to(tl.int64) * dim + d, mask=d < dim, other=0.0)
        h = tl.exp2(x[:, None] * A2) * h + _load_group(summary, segment, g, d, dim, STATE)
    if events is not None:
        h, event = _pass_events(h, event, last_event, LATEST, events, alpha, gap, g, d, dim, STATE)
    _store_group(last, sequence, g, d, dim, STATE, h)


@triton.jit
def _undo_events(
    dh, event, first_event, limit, events, alpha, gap, dheld, dalpha, nodes, g, d, dim,
    STATE: tl.constexpr,
):  # fmt: skip
    """The adjoint of the events from token `limit` on, last first."""
    while tl.load(events + event * 4 - 4, mask=event > first_event, other=-1) >= limit:
        event -= 1
        operation = tl.load(events + event * 4 + 1)
        node = tl.load(events + event * 4 + 2)
        weight = tl.load(alpha + node.to(tl.int64) * dim + d, mask=d < dim, other=0.0)[:, None]
        tl.debug_barrier()
        if operation > SWAP:
            mixed = tl.sum(dh * _load_group(gap, node, g, d, dim, STATE), 1)
            at = dalpha + (g.to(tl.int64) * nodes + node) * dim + d
            tl.store(at, mixed, mask=d < dim)
            _store_group(dheld, node, g, d, dim, STATE, (1.0 - weight) * dh)
            dh = weight * dh
        else:
            held = _load_group(dheld, node, g, d, dim, STATE)
            if operation == SWAP:
                _store_group(dheld, node, g, d, dim, STATE, dh)
                dh = held
            else:
                dh = dh + held
    return dh, event


@triton.jit(do_not_specialize=["nodes", "blocks"])
def _walk_back(
    A, cuts, bounds, total, summary, dlast, events, event_bounds, alpha, gap,
    end, dinitial, dheld, dalpha,
    nodes, dim, blocks,
    STATE: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The gradient of the state at every segment's end, and of the initial one."""
    g = tl.program_id(1)
    sequence = tl.program_id(0) // blocks
    d = tl.program_id(0) % blocks * LANES + tl.arange(0, LANES)
    low, high = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
    A2 = _load_group(A, sequence * 0, g, d, dim, STATE) * LOG2E
    dh = tl.zeros([LANES, GROUP], tl.float32)
    if dlast is not None:
        dh = _load_group(dlast, sequence, g, d, dim, STATE)
    event, first_event = 0, 0
    if events is not None:
        first_event, event = tl.load(event_bounds + sequence), tl.load(event_bounds + sequence + 1)
    for i in range(low, high):
        segment = low + high - 1 - i
        if events is not None:
            limit = tl.load(cuts + segment) + 1
            dh, event = _undo_events(
                dh, event, first_event, limit, events, alpha, gap, dheld, dalpha, nodes, g, d, dim,
                STATE,
            )  # fmt: skip
        if REVERSE:
            segment = i
        _store_group(end, segment, g, d, dim, STATE, dh)
        x = tl.load(total + segment.to(tl.int64) * dim + d, mask=d < dim, other=0.0)
        dh = tl.exp2(x[:, None] * A2) * dh + _load_group(summary, segment, g, d, dim, STATE)
    if events is not None:
        dh, event = _undo_events(
            dh, event, first_event, 0, events, alpha, gap, dheld, dalpha, nodes, g, d, dim, STATE
        )
    _store_group(dinitial, sequence, g, d, dim, STATE, dh)


@triton.jit
def _merge(low, high, bit: tl.constexpr):
    """Half a step of two sums over lanes: lanes with `bit` go on with `high`, others with `low`."""
    lane = tl.broadcast_to(tl.arange(0, LANES)[:, None], low.shape)
    is_low = (lane & bit) == 0
    kept, sent = tl.where(is_low, low, high), tl.where(is_low, high, low)
    return kept + tl.gather(sent, lane ^ bit, 0)


@triton.jit(do_not_specialize=["tokens", "blocks"])
def _gradients(
    dout, u, delta, A, BC, D, z, delta_bias, repeats, cuts, checkpoints, dh,
    du, ddelta, dz, dA, dBC, dD, dbias,
    dout_stride, u_stride, delta_stride, z_stride, tokens, dim, blocks,
    STATE: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """A segment's gradients. dh comes as that of the state at its end, and goes as at its start.

    dA, dD and dbias are the segment's share, dBC (blocks, tokens, 2, width) that of the channels.
    The groups of states are done one after another, since a thread has registers for one: dh and
    the sum dA lie in memory (in the cache) meanwhile.
    """
    segment, first, length, d = _place(cuts, blocks, REVERSE)
    groups: tl.constexpr = (STATE + SIZE - 1) // SIZE
    width: tl.constexpr = (STATE + GROUP - 1) // GROUP * GROUP
    sign: tl.constexpr = -1 if REVERSE else 1
    bias = _bias(delta_bias, d, dim)
    skip = tl.zeros([LANES], tl.float32)
    if D is not None:
        skip = tl.load(D + d, mask=d < dim, other=0.0)
    dD_sum = tl.zeros([LANES], tl.float32)
    dbias_sum = tl.zeros([LANES], tl.float32)
    tile = tl.load(cuts + segment) // TILE + segment
    tiles = (length + TILE - 1) // TILE
    # A lane's share of a tile's dB and dC: see the order of the merges below.
    lane = tl.arange(0, LANES)
    lane_t = (lane // 8 % 2) + (lane // 4 % 2) * 2 + (lane // 2 % 2) * 4
    for i in range(tiles):
        tl.debug_barrier()  # dh and dA may be read by another thread than wrote them
        begin = (tiles - 1 - i) * TILE
        row, room = _tile(first, begin, length, sign)
        us = _load_tile(u, row, room, u_stride, d, dim, sign)
        deltas = _load_tile(delta, row, room, delta_stride, d, dim, sign)
        douts = _load_tile(dout, row, room, dout_stride, d, dim, sign)
        if z is not None:
            gates = _load_tile(z, row, room, z_stride, d, dim, sign)
        steps, inputs, dys, ys, through_decay, through_input = (), (), (), (), (), ()
        nothing = tl.zeros([LANES], tl.float32)
        for t in tl.static_range(TILE):
            step = _step_size(deltas[t], bias, t <= room, SOFTPLUS)
            dy = tl.where(t <= room, douts[t].to(tl.float32), 0.0)
            if z is not None:
                gate = gates[t].to(tl.float32)
                dy *= gate * sigmoid(gate)
            steps = steps + (step,)
            inputs = inputs + (step * us[t].to(tl.float32),)
            dys = dys + (dy,)
            ys, through_decay = ys + (nothing,), through_decay + (nothing,)
            through_input = through_input + (nothing,)
        for g in range(groups):
            A2 = _load_group(A, segment * 0, g, d, dim, STATE, SIZE) * LOG2E
            dstate = _load_group(dh, segment, g, d, dim, STATE, SIZE)
            dA_sum = _load_group(dA, segment, g, d, dim, STATE, SIZE)
            states = (_load_group(checkpoints, tile + begin // TILE, g, d, dim, STATE, SIZE),)
            for t in tl.static_range(TILE):
                m = _count(repeats, row, room, t, sign)
                b = _load_shared(BC, row, room, t, g, 0, STATE, sign, SIZE)
                x = _advance(states[t], steps[t], inputs[t], b, A2, m, repeats is not None)
                states = states + (x,)
            sums = ()
            for t in tl.static_range(TILE - 1, -1, -1):
                b = _load_shared(BC, row, room, t, g, 0, STATE, sign, SIZE)
                c = _load_shared(BC, row, room, t, g, 1, STATE, sign, SIZE)
                if z is not None:
                    ys = _set(ys, t, ys[t] + tl.sum(states[t + 1] * c, 1))
                scale, carried = steps[t][:, None], inputs[t][:, None]
                x2 = scale * A2
                dC = dys[t][:, None] * states[t + 1]
                dstate += dys[t][:, None] * c
                dB = dstate * carried
                dinput = dstate * b
                if repeats is not None:
                    m = _count(repeats, row, room, t, sign)
                    gain = _gain(x2 * LN2, m)
                    slope = _gain_slope(x2 * LN2, gain, m)
                    a = tl.exp2(x2 * m)
                    q = dstate * (states[t] * a * m + carried * b * slope)
                    dB *= gain
                    dinput *= gain
                    dstate *= a
                else:
                    dstate *= tl.exp2(x2)
                    q = dstate * states[t]
                through_input = _set(through_input, t, through_input[t] + tl.sum(dinput, 1))
                through_decay = _set(through_decay, t, through_decay[t] + tl.sum(q * A2, 1))
                dA_sum += q * scale
                x = _merge(dB, dC, 16)
                if t % 2 == 0:
                    x = _merge(x, sums[-1], 8)
                    sums = sums[:-1]
                if t % 4 == 0:
                    x = _merge(x, sums[-1], 4)
                    sums = sums[:-1]
                if t == 0:
                    x = _merge(x, sums[-1], 2)
                    sums = sums[:-1]
                sums = sums + (x,)
            _store_group(dh, segment, g, d, dim, STATE, dstate, SIZE)
            _store_group(dA, segment, g, d, dim, STATE, dA_sum, SIZE)
            at = tl.program_id(0).to(tl.int64) % blocks * tokens + row + sign * lane_t
            n = g * SIZE + tl.arange(0, SIZE)[None, :]
            at = dBC + ((at * 2 + lane // 16) * width)[:, None] + n
            mine = (lane % 2 == 0) & (lane_t <= room)
            tl.store(at, _merge(sums[0], sums[0], 1), mask=mine[:, None] & (n >= 0))
        for t in tl.static_range(TILE):
            x = _load_step(u, row, room, t, u_stride, d, dim, sign)
            slope = 1.0
            if SOFTPLUS:
                slope = sigmoid(deltas[t].to(tl.float32) + bias)
            if z is not None:
                gate = gates[t].to(tl.float32)
                opened = sigmoid(gate)
                out = douts[t].to(tl.float32)
                out *= opened * (1.0 + gate * (1.0 - opened)) * (ys[t] + skip * x)
                _store_step(dz, row, room, t, d, dim, out, sign)
            draw = (through_decay[t] * LN2 + through_input[t] * x) * slope
            _store_step(du, row, room, t, d, dim, through_input[t] * steps[t] + skip * dys[t], sign)
            _store_step(ddelta, row, room, t, d, dim, draw, sign)
            dbias_sum += tl.where(t <= room, draw, 0.0)
            dD_sum += dys[t] * x
    at = segment.to(tl.int64) * dim + d
    tl.store(dD + at, dD_sum, mask=d < dim)
    tl.store(dbias + at, dbias_sum, mask=d < dim)


def _rows(tensor: Tensor | None) -> Tensor | None:
    """(batch, length, width) as (tokens, width), the last axis contiguous: a view if it can be."""
    if tensor is None:
        return None
    rows = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    rows = rows.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _shared(B: Tensor, C: Tensor) -> Tensor:
    """float32 (tokens, 2, state up to whole groups), so that a group is one aligned load."""
    rows = torch.stack([t.reshape(-1, t.shape[-1]).float() for t in (B, C)], 1)
    missing = -rows.shape[2] % GROUP.value
    return torch.nn.functional.pad(rows, (0, missing)) if missing else rows


def _f32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


@functools.lru_cache
def _machine(device: torch.device) -> int:
    """Programs that fill it."""
    if device.type != "cuda":
        return WARPS_PER_SM
    return WARPS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


def segment_length(tokens: int, sequences: int, blocks: int, machine: int) -> int | None:
    """Tokens of a segment; None: a segment a sequence, in one pass.

    Three passes compute every exponential twice, so they must have more than twice the programs.
    """
    if 2 * sequences * blocks > machine or tokens < 2 * SHORTEST:
        return None
    length = max(SHORTEST, tokens * blocks // (2 * machine))
    return 1 << (length - 1).bit_length()


def checkpoint_rows(
    tokens: int, sequences: int, dim: int, events: int, device: torch.device
) -> int:
    """Stored states of a call, from what is known of it while it is traced."""
    blocks = triton.cdiv(dim, LANES.value)
    length = segment_length(tokens, sequences, blocks, _machine(device))
    cuts = 0 if length is None else (tokens - 1) // length
    return tokens // TILE.value + sequences + (events + cuts if tokens else 0)


class _Call:
    """A call's inputs as the kernels read them, and how its tokens are cut."""

    def __init__(
        self,
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
        events: Tensor | None,
        event_bounds: Tensor | None,
        alpha: Tensor | None,
    ) -> None:
        batch, length, self.dim = u.shape
        self.tokens, self.state, self.device = batch * length, A.shape[1], u.device
        self.blocks = triton.cdiv(self.dim, LANES.value)
        self.groups = triton.cdiv(self.state, GROUP.value)
        self.u, self.delta, self.z = _rows(u), _rows(delta), _rows(z)
        self.A, self.D, self.bias = _f32(A), _f32(D), _f32(delta_bias)
        self.BC = _shared(B, C)
        self.initial, self.alpha = _f32(initial_state), _f32(alpha)
        self.repeats = None if repeats is None else repeats.reshape(-1).int().contiguous()
        self.events, self.event_bounds = events, event_bounds
        if events is not None and not len(events):
            self.events = self.event_bounds = None
        if cu_seqlens is None:
            cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=u.device) * length
        self.sequences = cu_seqlens.numel() - 1
        segment = segment_length(self.tokens, self.sequences, self.blocks, _machine(u.device))
        self.one_pass = not self.tokens or (segment is None and self.events is None)
        self.cuts = self.bounds = cu_seqlens.int().contiguous()
        if not self.one_pass:
            cuts = [self.cuts]
            if segment is not None:
                cuts.append(
                    torch.arange(segment, self.tokens, segment, dtype=torch.int32, device=u.device)
                )
            if self.events is not None:
                cuts.append(self.events[:, 0])
            self.cuts = torch.cat(cuts).sort().values
            self.bounds = torch.searchsorted(self.cuts, cu_seqlens, out_int32=True)
        self.segments = len(self.cuts) - 1
        self.softplus, self.reverse = delta_softplus, reverse

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def states(self, rows: int) -> Tensor:
        return self.empty(rows, self.dim, self.state)

    def zeros(self, rows: int) -> Tensor:
        return self.states(rows).zero_()

    def over_segments(self, kernel: Any, *arguments: Any, **options: int) -> None:
        self._launch(
            kernel, (self.segments * self.blocks,), arguments, SOFTPLUS=self.softplus, **options
        )

    def over_sequences(self, kernel: Any, *arguments: Any) -> None:
        self._launch(kernel, (self.sequences * self.blocks, self.groups), arguments)

    def _launch(
        self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], **options: int
    ) -> None:
        if self.tokens and math.prod(grid):
            with torch.cuda.device_of(self.u):
                kernel[grid](
                    *(*arguments, self.dim, self.blocks),
                    STATE=self.state,
                    REVERSE=self.reverse,
                    **options,
                    **OPTIONS,
                )


def _stride(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)


def scan_forward(
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
    events: Tensor | None,
    event_bounds: Tensor | None,
    alpha: Tensor | None,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `flexbench.kernels.scan.cpu.scan_forward`."""
    call = _Call(
        *(u, delta, A, B, C, D, z, delta_bias, delta_softplus),
        *(initial_state, cu_seqlens, repeats, reverse, events, event_bounds, alpha),
    )
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    last = call.zeros(call.sequences) if call.initial is None else call.initial.clone()
    rows = call.tokens // TILE.value + call.segments
    checkpoints = call.states(rows) if training else call.empty(0)
    gap = call.states(0 if call.alpha is None else len(call.alpha))
    start = call.initial
    if not call.one_pass:
        start = call.states(call.segments)
        total, summary = call.empty(call.segments, call.dim), call.states(call.segments)
        call.over_segments(
            *(_summaries, call.u, call.delta, call.A, call.BC, None, call.bias, call.repeats),
            *(call.cuts, total, summary, _stride(call.u), _stride(call.delta), 0),
            ADJOINT=False,
        )
        call.over_sequences(
            *(_walk, call.A, call.cuts, call.bounds, total, summary, call.initial),
            *(call.events, call.event_bounds, call.alpha, start, last, gap),
        )
    call.over_segments(
        *(_outputs, call.u, call.delta, call.A, call.BC, call.D, call.z, call.bias),
        *(call.repeats, call.cuts, start, y, last if call.one_pass else None),
        *(checkpoints if training else None, _stride(call.u), _stride(call.delta)),
        _stride(call.z),
        AHEAD=2 if call.groups <= 4 else 0,
    )
    return y, last, checkpoints, gap if training and len(gap) else call.empty(0)


def scan_backward(
    dout: Tensor,
    dlast: Tensor | None,
    checkpoints: Tensor,
    gap: Tensor,
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
    events: Tensor | None,
    event_bounds: Tensor | None,
    alpha: Tensor | None,
) -> list[Tensor]:
    """As `flexbench.kernels.scan.cpu.scan_backward`."""
    call = _Call(
        *(u, delta, A, B, C, D, z, delta_bias, delta_softplus),
        *(initial_state, cu_seqlens, repeats, reverse, events, event_bounds, alpha),
    )
    rows, dlast = _rows(dout), _f32(dlast)
    dinitial = call.states(call.sequences)
    nodes = 0 if alpha is None else len(alpha)
    dalpha = None if alpha is None else call.empty(call.groups, nodes, call.dim).zero_()
    if call.one_pass:
        dinitial = dh = call.zeros(call.sequences) if dlast is None else dlast.clone()
    else:
        dh = call.states(call.segments)
        total, summary = call.empty(call.segments, call.dim), call.states(call.segments)
        call.over_segments(
            *(_summaries, rows, call.delta, call.A, call.BC, call.z, call.bias, call.repeats),
            *(call.cuts, total, summary, _stride(rows), _stride(call.delta), _stride(call.z)),
            ADJOINT=True,
        )
        call.over_sequences(
            *(_walk_back, call.A, call.cuts, call.bounds, total, summary, dlast),
            *(call.events, call.event_bounds, call.alpha, gap, dh, dinitial),
            *(call.states(nodes), dalpha, nodes),
        )
    du, ddelta, dz = (
        None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for t in (u, delta, z)
    )
    dA = call.zeros(call.segments)
    dD, dbias = call.empty(2, call.segments, call.dim).zero_()
    dBC = call.empty(call.blocks, *call.BC.shape)
    call.over_segments(
        *(_gradients, rows, call.u, call.delta, call.A, call.BC, call.D, call.z, call.bias),
        *(call.repeats, call.cuts, checkpoints, dh, du, ddelta, dz, dA, dBC, dD, dbias),
        *(_stride(rows), _stride(call.u), _stride(call.delta), _stride(call.z), call.tokens),
        SIZE=1 if call.repeats is not None else 2,
    )
    # Copies whatever the shape: what an operator returns may not share memory.
    shares = dBC.sum(0)[..., : call.state].unbind(1)
    dB, dC = (part.clone(memory_format=torch.contiguous_format) for part in shares)
    found = (
        *((u, du), (delta, ddelta), (A, dA.sum(0)), (B, dB), (C, dC), (D, dD.sum(0)), (z, dz)),
        (delta_bias, dbias.sum(0)),
        (initial_state, dinitial),
        (alpha, None if dalpha is None else dalpha.sum(0)),
    )
    return [
        call.empty(0)
        if tensor is None or grad is None
        else grad.to(tensor.dtype).view(tensor.shape)
        for tensor, grad in found
    ]


def compilations() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """What `triton.compile` needs for each kernel, as a training step in bfloat16 runs it: name,
    kernel, signature, constexprs and options."""
    types = dict.fromkeys(("u", "delta", "z", "y", "dout", "du", "ddelta", "dz"), "*bf16")
    types |= dict.fromkeys(("cuts", "bounds", "events", "event_bounds", "repeats"), "*i32")
    types |= dict.fromkeys(("tokens", "nodes", "dim", "blocks"), "i32")
    types |= dict.fromkeys((f"{rows}_stride" for rows in ("u", "delta", "z", "dout")), "i32")
    plain: dict[str, Any] = {"STATE": 16, "REVERSE": False}
    scan = plain | {"SOFTPLUS": True, "repeats": None}
    listed: tuple[tuple[str, Any, dict[str, Any]], ...] = (
        ("scan", _outputs, scan | {"start": None, "AHEAD": 2}),
        ("scan-segment", _outputs, scan | {"last": None, "AHEAD": 2}),
        ("scan-summary", _summaries, scan | {"z": None, "ADJOINT": False}),
        ("scan-summary-adjoint", _summaries, scan | {"ADJOINT": True}),
        ("scan-walk", _walk, plain),
        ("scan-walk-back", _walk_back, plain),
        ("scan-backward", _gradients, scan | {"SIZE": 2}),
        ("scan-backward-repeats", _gradients, plain | {"SOFTPLUS": True, "SIZE": 1}),
    )
    for name, kernel, constexprs in listed:
        signature = {a: types.get(a, "*fp32") for a in kernel.arg_names if a not in constexprs}
        yield name, kernel, signature, constexprs, OPTIONS


run_scan = runner(scan_forward, scan_backward)
