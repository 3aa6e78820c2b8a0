"""The short causal depthwise convolution of Mamba, with any of its backends."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

from torch import Tensor

from flexbench.kernels.backends import check_cu_seqlens, choose, cpu_refusal, is_eager
from flexbench.kernels.conv import official
from flexbench.kernels.conv.cpu import EagerConv, causal_conv1d_backward_op, causal_conv1d_op
from flexbench.kernels.conv.reference import causal_conv1d_reference
from flexbench.kernels.gpu import triton_refusal

BACKENDS = ("cpu", "triton", "causal_conv1d", "reference")


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Depthwise convolution over the present and the `width - 1` steps before::

        y[t] = act(bias + sum over k of weight[k] x[t - (width - 1) + k])

    Named after the package causal-conv1d; the layout is channels-last. Gradients reach x, weight
    and bias. The same input gives the same bits, whatever the number of threads.

    Args:
        x: (batch, length, dim).
        weight: (dim, width), width 2 to 4.
        bias: (dim,).
        activation: "silu" or None.
        cu_seqlens: (sequences + 1,) int32: batch is 1 and the length axis packs several sequences,
            none of which sees its neighbours.
        reverse: the anti-causal convolution: read each sequence from its end.
        backend: "auto", or one of `BACKENDS`.

    Returns:
        y, of x's shape and dtype.

    Raises:
        ValueError: shapes that do not fit, a width out of range, a bad `cu_seqlens`, an unknown
            activation, or a backend that cannot serve the call.
    """
    if x.dim() != 3:
        raise ValueError(f"x must be (batch, length, dim), not {tuple(x.shape)}")
    dim = x.shape[2]
    if weight.dim() != 2 or weight.shape[0] != dim or not 2 <= weight.shape[1] <= 4:
        raise ValueError(f"weight must be ({dim}, 2 to 4), not {tuple(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (dim,):
        raise ValueError(f"bias must be ({dim},), not {tuple(bias.shape)}")
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be None or 'silu', not {activation!r}")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x)
    tensors = (x, weight, bias)
    refusal = {
        "cpu": cpu_refusal(tensors),
        "triton": triton_refusal((*tensors, cu_seqlens)),
        "causal_conv1d": official.refusal(x, weight, bias, cu_seqlens, reverse),
        "reference": None,
    }
    chosen = choose("causal_conv1d", backend, BACKENDS, refusal)
    run: Callable[..., Tensor]
    if chosen == "reference":
        run = causal_conv1d_reference
    elif chosen == "causal_conv1d":
        run = official.conv
    elif not is_eager(tensors):
        run = causal_conv1d_op
    else:
        run = EagerConv.apply if chosen == "cpu" else _triton().TritonConv.apply
    return run(x, weight, bias, activation == "silu", cu_seqlens, reverse)


def _triton() -> ModuleType:
    """Imported at the first use: Triton is not a requirement."""
    return import_module("flexbench.kernels.conv.triton")


@causal_conv1d_op.register_kernel("cuda")
def _(*inputs: Any) -> Tensor:
    return _triton().conv_forward(*inputs)


@causal_conv1d_backward_op.register_kernel("cuda")
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _triton().conv_backward(*inputs)
