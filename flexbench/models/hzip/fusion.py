"""From two readings to one: the context, the gates, and the options of both."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from flexbench import kernels
from flexbench.kernels.fuse.reference import Neighbours, rms_normalise
from flexbench.models.hzip.blocks import BlockStructure
from flexbench.models.mamba import mark

GateForm = Literal[
    "sum", "mean", "constant", "concat-linear", "scalar", "vector", "softmax", "input"
]
Form = Literal["dense", "lean", "diag"]
Kernels = tuple[tuple[PositiveInt, PositiveInt], ...]

LEAN_RANK = 8
"""Hidden units of each lean gate."""


class Context(nn.Module):
    """The 2 x k view: convolutions over both readings at once, then SiLU.

    With one kernel a plain convolution. With several a receptive-field controller, a small network
    that reads the layer's input and both readings, mixes them at every position; the mixture starts
    uniform.

    Args:
        dim: width of a reading.
        width: width of the context; None: grouped, every channel sees its own two readings alone.
        shapes: (width, dilation) of every kernel, widths odd.
        d_input: width of the layer's input, for the controller.
    """

    def __init__(
        self, dim: int, width: int | None, shapes: Kernels, d_input: int, **factory: Any
    ) -> None:
        super().__init__()
        self.dim, self.shapes = dim, shapes
        out, seen = (dim, 2) if width is None else (width, 2 * dim)
        self.grouped = width is None
        self.taps = nn.ParameterList(
            nn.Parameter(torch.empty(k, out, seen, **factory)) for k, _ in shapes
        )
        self.bias = nn.Parameter(torch.zeros(out, **factory))
        for taps in self.taps:
            bound = 1 / math.sqrt(taps.shape[0] * seen)
            nn.init.uniform_(taps, -bound, bound)
        self.controller: nn.Sequential | None = None
        if len(shapes) > 1:
            last = nn.Linear(LEAN_RANK, len(shapes), **factory)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            first = nn.Linear(d_input + 2 * dim, LEAN_RANK, **factory)
            self.controller = nn.Sequential(first, nn.SiLU(), last)

    def forward(
        self, x: Tensor, y_f: Tensor, y_b: Tensor, near: Neighbours
    ) -> tuple[Tensor, Tensor | None]:
        """The context (batch, length, width) and the kernels' mixture (batch, length, kernels)."""
        both = torch.cat([y_f, y_b], dim=-1)
        views = [
            self._view(both, taps, dilation, near)
            for taps, (_, dilation) in zip(self.taps, self.shapes, strict=True)
        ]
        if self.controller is None:
            return F.silu(views[0] + self.bias), None
        mixture = self.controller(torch.cat([x, both], dim=-1)).softmax(-1)
        mixed = sum(m * view for m, view in zip(mixture.split(1, dim=-1), views, strict=True))
        return F.silu(mixed + self.bias), mixture

    def _view(self, both: Tensor, taps: Tensor, dilation: int, near: Neighbours) -> Tensor:
        """One convolution: products first, so that only outputs need to be shifted."""
        if self.grouped:
            pairs = both.unflatten(-1, (2, self.dim))
            products = [(pairs * tap.T).sum(-2) for tap in taps]
        else:
            products = list(F.linear(both, taps.flatten(0, 1)).chunk(len(taps), dim=-1))
        half = len(taps) // 2
        shifted = [near.at(p, (k - half) * dilation) for k, p in enumerate(products)]
        return torch.stack(shifted).sum(0)


class GatedFusion(nn.Module):
    """Two readings of width `dim` to one, by any of the gate forms; see `HZipMamba`."""

    def __init__(
        self,
        dim: int,
        d_input: int,
        *,
        gate_form: GateForm,
        form: Form,
        rank: int,
        context_kernel: int,
        dynamic_kernels: Kernels,
        gradient_window: int,
        gradient_smoothing: int,
        gradient_side: str,
        gate_norm: bool,
        block_gating: int,
        merge_threshold: float,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.gate_form, self.gate_norm = gate_form, gate_norm
        gated = gate_form in ("scalar", "vector", "softmax")
        self.window = gradient_window if gated else 0
        self.options: dict[str, Any] = {
            "window": self.window,
            "smoothing": gradient_smoothing,
            "centred": gradient_side == "centred",
            "normalise": gate_norm,
            "softmax": gate_form == "softmax",
        }
        self.context: Context | None = None
        self.blocks: BlockStructure | None = None
        self.linear: nn.Linear | None = None
        self.told: nn.Linear | None = None
        for name in ("taps", "taps_bias", "down", "hidden_bias", "up", "diagonal", "bias"):
            self.register_parameter(name, None)
        if gate_form in ("sum", "mean"):
            return
        if gate_form == "concat-linear":
            self.linear = nn.Linear(2 * dim, dim, bias=False, **factory)
            with torch.no_grad():
                self.linear.weight.copy_(0.5 * torch.eye(dim).repeat(1, 2))
            return

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, **factory))

        gates = 1 if gate_form == "scalar" else dim
        self.bias = zeros(2, gates)
        mark(self.bias, _no_weight_decay=True)  # a bias for all its two axes
        if gate_form == "constant":
            return
        told = d_input if gate_form == "input" else 0
        fused = 2 if self.window else 0
        shapes = dynamic_kernels or (((context_kernel, 1),) if context_kernel else ())
        if gated and shapes:
            if form == "dense" or dynamic_kernels or block_gating:
                width = rank if form == "dense" else None
                self.context = Context(dim, width, shapes, d_input, **factory)
                told = width or dim
                if block_gating:
                    self.blocks = BlockStructure(told, block_gating, merge_threshold).to(**factory)
                    told += self.blocks.width
            else:
                fused += 1
                self.taps, self.taps_bias = zeros(dim, 2, context_kernel), zeros(dim)
                bound = 1 / math.sqrt(2 * context_kernel)
                nn.init.uniform_(self.taps, -bound, bound)
        if form == "diag":
            self.diagonal = zeros(2, fused, dim)
            return
        bound = 1 / math.sqrt(told + fused * dim)
        if fused:
            self.down = zeros(2 * rank, fused, dim)
            nn.init.uniform_(self.down, -bound, bound)
        if told:
            self.told = nn.Linear(told, 2 * rank, bias=False, **factory)
            nn.init.uniform_(self.told.weight, -bound, bound)
        self.hidden_bias = zeros(2 * rank)
        nn.init.uniform_(self.hidden_bias, -bound, bound)
        self.up = zeros(2, gates, rank)

    def forward(
        self,
        x: Tensor,
        y_f: Tensor,
        y_b: Tensor,
        z: Tensor | None,
        cu_seqlens: Tensor | None,
        trace: dict[str, Any] | None,
    ) -> Tensor:
        """The fused reading, times silu(z) where that is given.

        Args:
            x: (batch, length, d_input), the layer's input.
            y_f, y_b, z: (batch, length, dim).
        """
        if self.linear is not None:
            y = self.linear(torch.cat([y_f, y_b], dim=-1))
            return y if z is None else y * F.silu(z)
        told = x if self.gate_form == "input" else None
        if self.context is not None:
            told = self._explicit(x, y_f, y_b, cu_seqlens, trace)
        dim = y_f.shape[-1]
        inputs: dict[str, Any] = {
            "taps": self.taps,
            "taps_bias": self.taps_bias,
            "down": self.down,
            "hidden": None if told is None or self.told is None else self.told(told),
            "hidden_bias": self.hidden_bias,
            "up": None if self.up is None else self.up.expand(-1, dim, -1),
            "diagonal": self.diagonal,
            "bias": None if self.bias is None else self.bias.expand(-1, dim),
            "cu_seqlens": cu_seqlens,
        }
        if trace is not None and self.bias is not None:
            with torch.no_grad():
                gates = kernels.hzip_gates(y_f, y_b, **inputs, **self.options)
            trace["forward gate"], trace["backward gate"] = gates
        y = kernels.hzip_fuse(y_f, y_b, z, **inputs, **self.options)
        return 2 * y if self.gate_form == "sum" else y

    def _explicit(
        self,
        x: Tensor,
        y_f: Tensor,
        y_b: Tensor,
        cu_seqlens: Tensor | None,
        trace: dict[str, Any] | None,
    ) -> Tensor:
        """What the kernel cannot make itself: a context with channels mixed, and the blocks."""
        assert self.context is not None
        context, mixture = self.context(x, y_f, y_b, Neighbours(y_f, cu_seqlens))
        told = rms_normalise(context) if self.gate_norm else context
        if trace is not None and mixture is not None:
            trace["kernel mixture"] = mixture.detach()
        if self.blocks is None:
            return told
        structure, guide = self.blocks(context, cu_seqlens)
        if trace is not None:
            trace["guide map"] = guide
        return torch.cat([told, structure], dim=-1)


def check_options(
    *,
    context_kernel: int,
    gradient_window: int,
    gradient_smoothing: int,
    gate_form: GateForm,
    form: Form,
    dynamic_kernels: Kernels,
    block_gating: int,
) -> None:
    """Refuse what does not go together.

    Raises:
        ValueError: one sentence.
    """
    reads = gate_form in ("scalar", "vector", "softmax")
    widths = [width for width, _ in dynamic_kernels] or [context_kernel or 1]
    if any(width % 2 == 0 for width in widths):
        raise ValueError("kernels of the context must have odd widths (or context_kernel 0)")
    if gradient_smoothing % 2 == 0:
        raise ValueError("gradient_smoothing must be odd")
    if reads and not (context_kernel or dynamic_kernels or gradient_window):
        raise ValueError("without context and rate of change no gate is left but 'constant'")
    if dynamic_kernels and len(set(dynamic_kernels)) < 3:
        raise ValueError("dynamic_kernels must be three different (width, dilation) or more")
    if dynamic_kernels and (form == "diag" or not reads):
        raise ValueError("dynamic_kernels need dense or lean gates that read the context")
    if block_gating and (form == "diag" or not reads or not (context_kernel or dynamic_kernels)):
        raise ValueError("block_gating needs dense or lean gates that read the context")
    if form == "diag" and gate_form in ("scalar", "input"):
        raise ValueError(f"gates of form 'diag' cannot be '{gate_form}'")
