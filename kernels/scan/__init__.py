"""The selective scan of Mamba (arXiv 2312.00752, section 3.3), with any of its backends."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flexbench.kernels.backends import check_cu_seqlens, choose, cpu_refusal, is_eager
from flexbench.kernels.gpu import triton_refusal
from flexbench.kernels.scan import official
from flexbench.kernels.scan.cpu import run_scan as cpu_scan
from flexbench.kernels.scan.cpu import triton_kernels
from flexbench.kernels.scan.reference import selective_scan_reference

BACKENDS = ("cpu", "triton", "mamba_ssm", "reference")


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    repeats: Tensor | None = None,
    reverse: bool = False,
    return_last_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective state-space recurrence, per channel d and state n, in float32 inside::

        h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t        y_t = C_t · h_t + D u_t,  times silu(z_t)

    with Δ = delta + delta_bias, through softplus if asked. Names follow `selective_scan_fn` of
    mamba_ssm; the layout is channels-last. Gradients reach every floating input and flow back from
    the last state. The same input gives the same bits, whatever the number of threads.

    Args:
        u, delta, z: (batch, length, dim).
        A: (dim, state), usually negative.
        B, C: (batch, length, state).
        D, delta_bias: (dim,).
        initial_state: (sequences, dim, state), zeros if None.
        cu_seqlens: (sequences + 1,) int32, rising from 0 to length: batch is 1 and the length axis
            packs several sequences, as in flash-attention; the state starts anew at each.
        repeats: (batch, length) positive integers m: a token stands for m equal tokens in a row, in
            one exact step: decay exp(mΔA), input Δ B u expm1(mΔA) / expm1(ΔA); y is read after
            the last of them.
        reverse: read each sequence from its end.
        return_last_state: also return the state after the last step, (sequences, dim, state).
        backend: "auto", or one of `BACKENDS`.

    Returns:
        y, of u's shape and dtype; with `return_last_state` a pair with the last state, float32
        (float64 where the reference computes in float64).

    Raises:
        ValueError: shapes that do not fit, a bad `cu_seqlens`, or a backend that cannot serve the
            call.
    """
    batch, _, dim = check_scan(u, delta, A, B, C, D, z, delta_bias, initial_state, repeats)
    sequences = batch
    if cu_seqlens is not None:
        sequences = check_cu_seqlens(cu_seqlens, u)
    if initial_state is not None and initial_state.shape != (sequences, dim, A.shape[1]):
        wanted = (sequences, dim, A.shape[1])
        raise ValueError(f"initial_state must be {wanted}, not {tuple(initial_state.shape)}")
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    refusal = {
        "cpu": cpu_refusal(tensors),
        "triton": triton_refusal((*tensors, cu_seqlens, repeats)),
        "mamba_ssm": official.refusal(*tensors, cu_seqlens, repeats, reverse, return_last_state),
        "reference": None,
    }
    chosen = choose("selective_scan", backend, BACKENDS, refusal)
    if chosen == "mamba_ssm":
        return official.scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
    if chosen == "reference":
        y, last_state = selective_scan_reference(
            *(u, delta, A, B, C, D, z, delta_bias, delta_softplus),
            *(initial_state, cu_seqlens, repeats, reverse),
        )
    else:
        y, last_state = run_scan(
            *(chosen, u, delta, A, B, C, D, z, delta_bias, delta_softplus),
            *(initial_state, cu_seqlens, repeats, reverse, None, None, None),
        )
    return (y, last_state) if return_last_state else y


def run_scan(backend: str, *inputs: Any) -> tuple[Tensor, Tensor]:
    """y and the last state by a fast backend: the inputs of `scan_forward` up to `alpha`.

    Traced, either is the operator, which goes by the device: a trace cannot pass an import.
    """
    if backend == "triton" and is_eager([t for t in inputs if isinstance(t, Tensor)]):
        return triton_kernels().run_scan(*inputs)
    return cpu_scan(*inputs)


def check_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    repeats: Tensor | None,
) -> tuple[int, int, int]:
    """Batch, length and dim of a scan's inputs.

    Raises:
        ValueError: shapes that do not fit.
    """
    if u.dim() != 3 or A.dim() != 2:
        raise ValueError(
            f"u must be (batch, length, dim) and A (dim, state), not {tuple(u.shape)} and "
            f"{tuple(A.shape)}"
        )
    batch, length, dim = u.shape
    state = A.shape[1]
    wanted = {
        "delta": (delta, (batch, length, dim)),
        "A": (A, (dim, state)),
        "B": (B, (batch, length, state)),
        "C": (C, (batch, length, state)),
        "D": (D, (dim,)),
        "z": (z, (batch, length, dim)),
        "delta_bias": (delta_bias, (dim,)),
        "repeats": (repeats, (batch, length)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape}, not {tuple(tensor.shape)}")
    if repeats is not None and repeats.is_floating_point():
        raise ValueError("repeats must be integers")
    return batch, length, dim
