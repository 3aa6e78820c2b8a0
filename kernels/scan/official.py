"""The CUDA scan of mamba_ssm (https://github.com/state-spaces/mamba), where it is installed."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from flexbench.kernels.gpu import FLOATS, on_gpu, wants_gradient

INSTALLED = find_spec("selective_scan_cuda") is not None
"""Whether the extension is there: the package can be installed without it."""
MOST_STATES = 256


def refusal(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    repeats: Tensor | None,
    reverse: bool,
    return_last_state: bool,
) -> str | None:
    """Why mamba_ssm cannot serve a call; None where it can."""
    if not INSTALLED:
        return "the CUDA extension of mamba-ssm is not installed"
    rows = [t for t in (u, delta, B, C, z) if t is not None]
    rest = [t for t in (A, D, delta_bias) if t is not None]
    reasons = {
        "it does not pack sequences": cu_seqlens is not None,
        "it starts from a state of zero": initial_state is not None,
        "it has no repeats": repeats is not None,
        "it reads from left to right alone": reverse,
        "no gradient flows back from its last state": return_last_state
        and wants_gradient((*rows, *rest)),
        "u, delta, B, C and z must share a type of 32 or 16 bits": len({t.dtype for t in rows}) > 1
        or u.dtype not in FLOATS,
        "A, D and delta_bias must be float32": any(t.dtype != torch.float32 for t in rest),
        f"it has at most {MOST_STATES} states": A.shape[1] > MOST_STATES,
        "it needs a step, a channel and a state at least": not (u.numel() and A.numel()),
        "the tensors are not all on a GPU": not on_gpu((*rows, *rest)),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    return_last_state: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan` for a call that is not refused: its steps come last, and copies are made."""
    interface = import_module("mamba_ssm.ops.selective_scan_interface")
    u, delta, B, C = (t.transpose(1, 2).contiguous() for t in (u, delta, B, C))
    made = interface.selective_scan_fn(
        *(u, delta, A, B, C, D),
        z=None if z is None else z.transpose(1, 2).contiguous(),
        delta_bias=delta_bias,
        delta_softplus=delta_softplus,
        return_last_state=return_last_state,
    )
    if return_last_state:
        y, last_state = made
        return y.transpose(1, 2), last_state
    return made.transpose(1, 2)
