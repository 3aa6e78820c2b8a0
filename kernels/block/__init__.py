"""The selective scan over blocks: summaries, one prefix scan of them, gates on the way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexbench.kernels.backends import check_cu_seqlens, choose, cpu_refusal
from flexbench.kernels.block.reference import block_scan_reference
from flexbench.kernels.gpu import triton_refusal
from flexbench.kernels.scan import check_scan, run_scan

BACKENDS = ("cpu", "triton", "reference")

OPEN, SWAP, MIX = range(3)
"""What happens to the state at a node's start, middle and end: see scan.cpp."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """Nodes, and what a walk from left to right does at which token.

    Attributes:
        nodes: (nodes, 3) int32, as for `block_scan`.
        events: (events, 4) int32 (token that it comes before, operation, node, slot) by sequence
            and in order. A slot is the depth at which a node lies.
        bounds: (sequences + 1,) int32, of each sequence's events.
    """

    nodes: Tensor
    events: Tensor
    bounds: Tensor


def block_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    cu_blocks: Tensor,
    cu_seqlens: Tensor | None = None,
    nodes: Tensor | Schedule | None = None,
    alpha: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    repeats: Tensor | None = None,
    return_last_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan` of packed sequences as blocks with a state carried between them.

    A stretch of tokens is an affine map of the state, h to P h + H, its summary: P = exp(A ΣΔ), H
    its last state from zero. A block's outputs are its local ones, from a zero state, plus what the
    state carried into it adds, and that state is a prefix scan of the summaries. Without nodes the
    result is that of one plain scan, and however a backend cuts the sequence changes nothing.

    A node (start, middle, end) mixes two readings that begin from one state, that at `start`: the
    stretch start..middle and the stretch middle..end. After it the state is (1 - α) times that
    after the first plus α times that after the second, again an affine map of the state at `start`.
    A gate is a node whose first stretch is empty: it mixes the summary of start..end with the
    identity. Nodes nest, so they say leaf gates, tree gates (every node of a tree but its root) and
    blocks read in both directions alike. Outputs inside a node are those of the ungated recurrence
    from the state handed to it. α = 1 everywhere at gates is the ungated scan.

    Args:
        u, delta, A, B, C, D, z, delta_bias, initial_state, repeats: as in `selective_scan`, with
            batch 1: (1, total, dim) and so on, initial_state (sequences, dim, state).
        cu_blocks: (blocks + 1,) int32, rising from 0 to total: the blocks' bounds, among them those
            of the sequences.
        cu_seqlens: (sequences + 1,) int32 bounds of the sequences; None: there is one.
        nodes: (nodes, 3) int32 start <= middle < end, or all equal (no effect), each inside one
            sequence and any two either apart or one within a stretch of the other; of two with the
            same bounds the earlier row is the outer one. Or what `schedule` made of them and of
            `cu_seqlens`, for scans that share them.
        alpha: (nodes, 1) or (nodes, dim), in [0, 1].
        return_last_state: also return the state after the last token, (sequences, dim, state).
        backend: "auto", or one of `BACKENDS`.

    Returns:
        y, of u's shape and dtype; with `return_last_state` a pair with the last state.

    Raises:
        ValueError: shapes that do not fit, bad bounds, nodes that cross, or a backend that cannot
            serve the call.
    """
    _, length, dim = check_scan(u, delta, A, B, C, D, z, delta_bias, initial_state, repeats)
    check_cu_seqlens(cu_blocks, u)
    if cu_seqlens is None:
        # Not made from a list: the copy to a GPU would wait for it.
        cu_seqlens = torch.arange(2, dtype=torch.int32, device=u.device) * length
    sequences = check_cu_seqlens(cu_seqlens, u)
    if initial_state is not None and initial_state.shape != (sequences, dim, A.shape[1]):
        shape = (sequences, dim, A.shape[1])
        raise ValueError(f"initial_state must be {shape}, not {tuple(initial_state.shape)}")
    if (nodes is None) != (alpha is None):
        raise ValueError("nodes and alpha go together")
    mixed = events = bounds = None
    if nodes is not None and alpha is not None:
        plan = nodes if isinstance(nodes, Schedule) else schedule(nodes, cu_seqlens)
        mixed, events, bounds = plan.nodes, plan.events, plan.bounds
        if alpha.dim() != 2 or alpha.shape[0] != len(mixed) or alpha.shape[1] not in (1, dim):
            wanted = f"({len(mixed)}, 1 or {dim})"
            raise ValueError(f"alpha must be {wanted}, not {tuple(alpha.shape)}")
        alpha = alpha.expand(-1, dim)
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state, alpha)
    refusal = {
        "cpu": cpu_refusal(tensors),
        "triton": triton_refusal((*tensors, cu_blocks, cu_seqlens, repeats, mixed)),
        "reference": None,
    }
    chosen = choose("block_scan", backend, BACKENDS, refusal)
    if chosen == "reference":
        y, last_state = block_scan_reference(
            *(u, delta, A, B, C, D, z, delta_bias, delta_softplus),
            *(initial_state, cu_blocks, cu_seqlens, repeats, mixed, alpha),
        )
    else:
        y, last_state = run_scan(
            *(chosen, u, delta, A, B, C, D, z, delta_bias, delta_softplus),
            *(initial_state, cu_seqlens, repeats, False, events, bounds, alpha),
        )
    return (y, last_state) if return_last_state else y


def schedule(nodes: Tensor, cu_seqlens: Tensor) -> Schedule:
    """The nodes of a `block_scan` put in order; both arguments as there.

    Raises:
        ValueError: no int32 triples, or nodes that cross or leave their sequence.
    """
    if nodes.dim() != 2 or nodes.shape[1] != 3 or nodes.dtype != torch.int32:
        raise ValueError(f"nodes must be (nodes, 3) int32, not {tuple(nodes.shape)}")
    index = torch.arange(len(nodes), device=nodes.device)
    start, middle, end = nodes.long().T.contiguous()
    sequence = torch.searchsorted(cu_seqlens[1:].long(), start, right=True)
    forked = (middle > start).nonzero()[:, 0]
    real = (end > start).nonzero()[:, 0]
    # At one token inner nodes end first, then second readings begin, then outer nodes start first.
    parts = [
        (sequence[real], end[real], torch.full_like(real, MIX), -start[real], -real),
        (sequence[forked], middle[forked], torch.full_like(forked, SWAP), forked, forked),
        (sequence[real], start[real], torch.full_like(real, OPEN), -end[real], real),
    ]
    who = torch.cat([index[real], index[forked], index[real]])
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    order = torch.arange(len(who), device=nodes.device)
    for column in reversed([columns[0], columns[1], -columns[2], columns[3], columns[4]]):
        order = order[torch.argsort(column[order], stable=True)]
    where, position, operation = (column[order] for column in columns[:3])
    node = who[order]
    opened, mixed = operation == OPEN, operation == MIX
    depth = (opened.long() - mixed.long()).cumsum(0) - 1 + mixed.long()
    slot = torch.zeros_like(index)
    slot[node[opened]] = depth[opened]
    ends = cu_seqlens.long()[1:][sequence.clamp(max=max(0, len(cu_seqlens) - 2))]
    legal = (start <= middle) & (middle <= end) & (start >= 0) & (end <= ends)
    legal &= (middle < end) | (start == end)
    if not bool(legal.all()) or not torch.equal(slot[node], depth):
        raise ValueError("nodes must nest, each within one sequence")
    events = torch.stack([position, operation, node, slot[node]], 1).int().contiguous()
    counts = torch.bincount(where, minlength=len(cu_seqlens) - 1)
    return Schedule(nodes, events, torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int())
