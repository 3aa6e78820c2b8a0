"""The gated fusion of two scans of HZip-Mamba, with any of its backends."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import Tensor

from flexbench.kernels.backends import check_cu_seqlens, choose, cpu_refusal, is_eager
from flexbench.kernels.fuse.cpu import EagerFuse, hzip_fuse_backward_op, hzip_fuse_op
from flexbench.kernels.fuse.reference import hzip_fuse_reference, hzip_gates_reference
from flexbench.kernels.gpu import triton_refusal

BACKENDS = ("cpu", "triton", "reference")
MOST_UNITS, FARTHEST = 16, 8
"""What the Triton kernels hold in registers: hidden units of both gates, and steps looked at."""


def hzip_fuse(
    y_f: Tensor,
    y_b: Tensor,
    z: Tensor | None = None,
    *,
    taps: Tensor | None = None,
    taps_bias: Tensor | None = None,
    down: Tensor | None = None,
    hidden: Tensor | None = None,
    hidden_bias: Tensor | None = None,
    up: Tensor | None = None,
    diagonal: Tensor | None = None,
    bias: Tensor | None = None,
    window: int = 0,
    smoothing: int = 1,
    centred: bool = False,
    normalise: bool = False,
    softmax: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """g_f * y_f + g_b * y_b, times silu(z), with gates from the readings themselves::

        context[t] = silu(taps_bias + sum over k of taps[:, 0, k] y_f[t + k - width // 2]
                                              + taps[:, 1, k] y_b[t + k - width // 2])
        G_f[t] = mean over j = 1 .. window of |y_f[t] - y_f[t - j]|;  G_b the same with t + j
        h = silu(hidden + hidden_bias + sum over features f of down[:, f] · x_f)
        g_d = sigmoid(bias[d] + sum over f of diagonal[d, f] * x_f + up[d] · h_d)

    where the features x are the context and both G, h_f and h_b are the two halves of h, and d is f
    or b. Whatever is not given is left out; with nothing but y_f and y_b both gates are ½. No
    feature or gate is written to memory by the compiled backends. Gradients reach every floating
    input. The same input gives the same bits, whatever the number of threads.

    Args:
        y_f, y_b, z: (batch, length, dim).
        taps: (dim, 2, width), width odd: the context's kernel over each channel of both readings.
        taps_bias: (dim,).
        down: (2 rank, features, dim), features = 1 for the context, if any, and 2 for both G.
        hidden: (batch, length, 2 rank), what else the hidden layer is told.
        hidden_bias: (2 rank,).
        up: (2, dim, rank).
        diagonal: (2, features, dim).
        bias: (2, dim).
        window: steps that G looks at, existing ones only; 0: without G.
        smoothing: odd width of a centred moving average over G; above 1 only the reference has it.
        centred: G looks at both sides.
        normalise: each feature is divided by its root mean square over the channels.
        softmax: g_f + g_b = 1, g_f being the sigmoid of the difference of both logits.
        cu_seqlens: (sequences + 1,) int32: batch is 1 and the length axis packs several sequences,
            none of which sees its neighbours.
        backend: "auto", or one of `BACKENDS`.

    Returns:
        y, of y_f's shape and dtype.

    Raises:
        ValueError: shapes that do not fit, a bad `cu_seqlens`, or a backend that cannot serve the
            call.
    """
    floats = (y_f, y_b, z, taps, taps_bias, down, hidden, hidden_bias, up, diagonal, bias)
    _check(*floats, window, smoothing)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, y_f)
    refusal = {
        "cpu": cpu_refusal(floats),
        "triton": triton_refusal((*floats, cu_seqlens)) or _too_large(taps, up, window),
        "reference": None,
    }
    if smoothing > 1:
        refusal["cpu"] = refusal["triton"] = "it does not smooth G"
    chosen = choose("hzip_fuse", backend, BACKENDS, refusal)
    options = (centred, normalise, softmax)
    if chosen == "reference":
        return hzip_fuse_reference(*floats, cu_seqlens, window, smoothing, *options)
    run: Callable[..., Tensor] = hzip_fuse_op
    if is_eager(floats):
        run = EagerFuse.apply if chosen == "cpu" else _triton().TritonFuse.apply
    return run(*floats, cu_seqlens, window, *options)


def _too_large(taps: Tensor | None, up: Tensor | None, window: int) -> str | None:
    """Why Triton cannot serve these sizes, such as dense gates, which torch's products serve."""
    if up is not None and 2 * up.shape[2] > MOST_UNITS:
        return f"it has at most {MOST_UNITS} hidden units"
    if max(window, 0 if taps is None else taps.shape[2] // 2) > FARTHEST:
        return f"it looks at most {FARTHEST} steps back and ahead"
    return None


def _triton() -> ModuleType:
    """Imported at the first use: Triton is not a requirement."""
    return import_module("flexbench.kernels.fuse.triton")


@hzip_fuse_op.register_kernel("cuda")
def _(*inputs: Any) -> Tensor:
    return _triton().fuse_forward(*inputs)


@hzip_fuse_backward_op.register_kernel("cuda")
def _(*inputs: Any) -> list[Tensor]:
    return _triton().fuse_backward(*inputs)


def hzip_gates(
    y_f: Tensor,
    y_b: Tensor,
    *,
    taps: Tensor | None = None,
    taps_bias: Tensor | None = None,
    down: Tensor | None = None,
    hidden: Tensor | None = None,
    hidden_bias: Tensor | None = None,
    up: Tensor | None = None,
    diagonal: Tensor | None = None,
    bias: Tensor | None = None,
    window: int = 0,
    smoothing: int = 1,
    centred: bool = False,
    normalise: bool = False,
    softmax: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gates g_f and g_b of `hzip_fuse`, (batch, length, dim) each, by the reference: to look at
    them, which training never does.
    """
    return hzip_gates_reference(
        *(y_f, y_b, taps, taps_bias, down, hidden, hidden_bias, up, diagonal, bias),
        *(cu_seqlens, window, smoothing, centred, normalise, softmax),
    )


def _check(
    y_f: Tensor,
    y_b: Tensor,
    z: Tensor | None,
    taps: Tensor | None,
    taps_bias: Tensor | None,
    down: Tensor | None,
    hidden: Tensor | None,
    hidden_bias: Tensor | None,
    up: Tensor | None,
    diagonal: Tensor | None,
    bias: Tensor | None,
    window: int,
    smoothing: int,
) -> None:
    if y_f.dim() != 3:
        raise ValueError(f"y_f must be (batch, length, dim), not {tuple(y_f.shape)}")
    if taps is not None and (taps.dim() != 3 or taps.shape[2] % 2 == 0):
        raise ValueError(f"taps must be (dim, 2, an odd width), not {tuple(taps.shape)}")
    if up is not None and up.dim() != 3:
        raise ValueError(f"up must be (2, dim, rank), not {tuple(up.shape)}")
    if window < 0 or smoothing < 1 or smoothing % 2 == 0:
        raise ValueError(
            f"window must be at least 0 and smoothing odd, not {window} and {smoothing}"
        )
    batch, length, dim = y_f.shape
    width = 1 if taps is None else taps.shape[2]
    rank = 0 if up is None else up.shape[2]
    features = (taps is not None) + 2 * (window > 0)
    wanted = {
        "y_b": (y_b, (batch, length, dim)),
        "z": (z, (batch, length, dim)),
        "taps": (taps, (dim, 2, width)),
        "taps_bias": (taps_bias, (dim,)),
        "down": (down, (2 * rank, features, dim)),
        "hidden": (hidden, (batch, length, 2 * rank)),
        "hidden_bias": (hidden_bias, (2 * rank,)),
        "up": (up, (2, dim, rank)),
        "diagonal": (diagonal, (2, features, dim)),
        "bias": (bias, (2, dim)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape}, not {tuple(tensor.shape)}")
