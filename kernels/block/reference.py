"""Block scan by its definition: explicit blocks, their summaries, an explicit tree. The oracle."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flexbench.kernels.scan.reference import selective_scan_reference

Summary = tuple[Tensor, Tensor]
"""P and H, (dim, state) each: the map of a state h to P h + H."""


@dataclass
class Block:
    """Tokens start..end: `local` outputs from a zero state, `decay` of a state carried in up to
    each token (tokens, dim, state), and the summary."""

    start: int
    end: int
    local: Tensor
    decay: Tensor
    summary: Summary


@dataclass
class Node:
    """Two readings from one state and the weight of the second: (dim,)."""

    first: list[Block | Node]
    second: list[Block | Node]
    alpha: Tensor


def block_scan_reference(
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
    cu_blocks: Tensor,
    cu_seqlens: Tensor,
    repeats: Tensor | None,
    nodes: Tensor | None,
    alpha: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`block_scan` in plain PyTorch: float64 where any input is, else float32.

    Returns y in u's dtype, and the last state (sequences, dim, state) in the dtype computed in.
    """
    given = (u, delta, A, B, C, D, z, delta_bias, initial_state, alpha)
    double = any(t is not None and t.dtype == torch.float64 for t in given)
    dtype = torch.float64 if double else torch.float32
    out_dtype = u.dtype
    u, delta, A, B, C = (t.to(dtype) for t in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)
    if delta_softplus:
        delta = F.softplus(delta)

    def block(start: int, end: int) -> Block:
        part = slice(start, end)
        many = None if repeats is None else repeats[:, part]
        local, last = selective_scan_reference(
            *(u[:, part], delta[:, part], A, B[:, part], C[:, part], None, None, None),
            delta_softplus=False,
            initial_state=None,
            cu_seqlens=None,
            repeats=many,
            reverse=False,
        )
        steps = delta[0, part] if many is None else delta[0, part] * many[0, :, None]
        decay = torch.exp(A * steps.cumsum(0)[..., None])
        return Block(start, end, local[0], decay, (decay[-1], last[0]))

    bounds = nodes.tolist() if nodes is not None else []
    weights = [] if alpha is None else list(alpha.to(dtype))
    cuts = sorted({*cu_blocks.tolist(), *itertools.chain(*bounds)})
    outer_first = sorted(range(len(bounds)), key=lambda i: (bounds[i][0], -bounds[i][2], i))

    def parse(start: int, end: int, inside: list[int]) -> list[Block | Node]:
        """The blocks and outermost nodes of a stretch, in order."""
        parts: list[Block | Node] = []
        while start < end:
            if inside and bounds[inside[0]][0] == start:
                index, *rest = inside
                _, middle, stop = bounds[index]
                below = [i for i in rest if bounds[i][2] <= stop and bounds[i][0] < stop]
                first = [i for i in below if bounds[i][2] <= middle]
                second = [i for i in below if i not in first]
                parts.append(
                    Node(parse(start, middle, first), parse(middle, stop, second), weights[index])
                )
                inside = [i for i in rest if i not in below]
                start = stop
            else:
                stop = next(cut for cut in cuts if cut > start)
                parts.append(block(start, stop))
                start = stop
        return parts

    identity = (torch.ones_like(A), torch.zeros_like(A))
    y = torch.zeros_like(u[0])

    def summarise(parts: list[Block | Node]) -> Summary:
        """The maps of the parts, one after another."""
        P, H = identity
        for part in parts:
            p, h = part.summary if isinstance(part, Block) else mix(part)
            P, H = p * P, p * H + h
        return P, H

    def mix(node: Node) -> Summary:
        (p, h), (P, H) = summarise(node.first), summarise(node.second)
        a = node.alpha[:, None]
        return (1 - a) * p + a * P, (1 - a) * h + a * H

    def hand_down(parts: list[Block | Node], state: Tensor) -> Tensor:
        """Give every block the state carried into it; the state after the parts."""
        nonlocal y
        for part in parts:
            if isinstance(part, Block):
                tokens = torch.arange(part.start, part.end, device=y.device)
                carried = (part.decay * state * C[0, tokens, None, :]).sum(-1)
                y = y.index_add(0, tokens, part.local + carried)
                P, H = part.summary
            else:
                hand_down(part.first, state)
                hand_down(part.second, state)
                P, H = mix(part)
            state = P * state + H
        return state

    last = []
    for i, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        state = torch.zeros_like(A) if initial_state is None else initial_state[i].to(dtype)
        here = [k for k in outer_first if start <= bounds[k][0] < bounds[k][2] <= end]
        last.append(hand_down(parse(start, end, here), state))
    y = y[None]
    if D is not None:
        y = y + D.to(dtype) * u
    if z is not None:
        y = y * F.silu(z.to(dtype))
    final = torch.stack(last) if last else A.new_zeros(0, *A.shape)
    return y.to(out_dtype), final
