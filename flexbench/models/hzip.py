"""HZip-Mamba: two readings of a sequence, fused by gates that see context and rate of change."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from flexbench import kernels
from flexbench.kernels.fuse.reference import Neighbours, rms_normalise
from flexbench.models.base import registry
from flexbench.models.bimamba import Share
from flexbench.models.mamba import Mamba, MambaOptions, rescale_residual

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
        if gate_form == "constant":
            return
        told = d_input if gate_form == "input" else 0
        fused = 2 if self.window else 0
        shapes = dynamic_kernels or (((context_kernel, 1),) if context_kernel else ())
        if gated and shapes:
            if form == "dense" or dynamic_kernels:
                width = rank if form == "dense" else None
                self.context = Context(dim, width, shapes, d_input, **factory)
                told = width or dim
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
        trace: dict[str, Tensor] | None,
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
            told, mixture = self.context(x, y_f, y_b, Neighbours(y_f, cu_seqlens))
            if self.gate_norm:
                told = rms_normalise(told)
            if trace is not None and mixture is not None:
                trace["kernel mixture"] = mixture.detach()
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


class HZipMamba(nn.Module):
    """A forward and a backward Mamba reading, fused by gates::

        c = silu(conv(y_f, y_b))                  the context, `context_kernel` wide
        G_f[t] = |y_f[t] - y_f[t - 1]|            the rate of change, zero at the ends
        G_b[t] = |y_b[t] - y_b[t + 1]|
        g_f, g_b = sigmoid(MLP_f(c, G_f, G_b)), sigmoid(MLP_b(c, G_f, G_b))
        y = g_f * y_f + g_b * y_b

    Each MLP has one hidden layer with SiLU; its output starts at zero and so both gates at ½. No
    context and no rate of change reaches beyond a sequence's end.

    `fusion_at="model"`, the design note's: y_f and y_b are the outputs of two whole Mamba modules.
    At "inner" they are the scans' outputs, of width d_inner, and one gate z and one out_proj follow
    the fusion.

    Args:
        d_model, *mamba, **options: those of `Mamba`, in its order; both directions get them.
        context_kernel: width of the context, odd; 0: gates without it.
        gradient_window: steps over which the rate of change is a mean; 0: gates without it.
        gradient_smoothing: odd width of a moving average over the rate of change; above 1 the
            compiled kernel cannot serve.
        gradient_side: "one", the side each scan comes from, or "centred", both.
        gate_form: "vector", the design; "scalar", one value for all channels; "softmax",
            g_f + g_b = 1; "input", from the layer's input alone; "constant", learned, one a
            channel; "concat-linear", W (y_f, y_b), which starts as the mean; "mean"; "sum".
        gate_rank: hidden units of each MLP and, in the dense form, width of the context; None: 8 if
            lean; if dense the width of y_f, or d_inner where that is smaller.
        gate_norm: context, G_f and G_b are each divided by their root mean square over channels.
        fusion_at: "model" or "inner".
        form: "dense"; "lean", where a channel's context sees that channel's two readings alone;
            "diag", lean with gates that are linear in their own channel's context and rates.
        share: "none", or "projections": both directions share in_proj (and out_proj).
        dynamic_kernels: (width, dilation) of three kernels or more, which a network that reads the
            input and both readings mixes at each position, in place of `context_kernel`.

    Attributes:
        trace: None, or a dict, in which `forward` leaves "forward gate" and "backward gate" (batch,
            length, channels), and "kernel mixture" (batch, length, kernels).

    Raises:
        ValueError: options that do not go together.
    """

    def __init__(
        self,
        d_model: int,
        *mamba: Any,
        context_kernel: int = 3,
        gradient_window: int = 1,
        gradient_smoothing: int = 1,
        gradient_side: Literal["one", "centred"] = "one",
        gate_form: GateForm = "vector",
        gate_rank: int | None = None,
        gate_norm: bool = False,
        fusion_at: Literal["model", "inner"] = "model",
        form: Form = "dense",
        share: Share = "none",
        dynamic_kernels: Kernels = (),
        **options: Any,
    ) -> None:
        super().__init__()
        check_options(
            context_kernel, gradient_window, gradient_smoothing, gate_form, form, dynamic_kernels
        )
        self.fusion_at, self.share = fusion_at, share
        self.trace: dict[str, Tensor] | None = None
        self.mamba_fwd = forward = Mamba(d_model, *mamba, **options)
        self.mamba_rev = reverse = Mamba(d_model, *mamba, **options, reverse=True)
        inner, in_proj = forward.d_inner, forward.in_proj
        factory = {"device": in_proj.weight.device, "dtype": in_proj.weight.dtype}
        if share == "projections":
            reverse.in_proj = in_proj
        elif fusion_at == "inner":  # z comes from the forward module
            reverse.in_proj = nn.Linear(d_model, inner, in_proj.bias is not None, **factory)
        if share == "projections" or fusion_at == "inner":
            reverse.out_proj = forward.out_proj
        dim = d_model if fusion_at == "model" else inner
        rank = gate_rank or (min(dim, inner) if form == "dense" else LEAN_RANK)
        self.fusion = GatedFusion(
            dim,
            d_model,
            gate_form=gate_form,
            form=form,
            rank=rank,
            context_kernel=context_kernel,
            dynamic_kernels=dynamic_kernels,
            gradient_window=gradient_window,
            gradient_smoothing=gradient_smoothing,
            gradient_side=gradient_side,
            gate_norm=gate_norm,
            **factory,
        )

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mix along the sequence in both directions; shapes as in `Mamba.forward`."""
        forward, reverse = self.mamba_fwd, self.mamba_rev
        z = None
        if self.fusion_at == "inner":
            u, z = forward.project(x)
            u_r = u if self.share == "projections" else reverse.in_proj(x)
            y_f, y_b = forward.scan(u, None, cu_seqlens), reverse.scan(u_r, None, cu_seqlens)
        elif self.share == "projections":
            u, gate = forward.project(x)
            scans = (direction.scan(u, gate, cu_seqlens) for direction in (forward, reverse))
            y_f, y_b = map(forward.out_proj, scans)
        else:
            y_f, y_b = forward(x, cu_seqlens), reverse(x, cu_seqlens)
        y = self.fusion(x, y_f, y_b, z, cu_seqlens, self.trace)
        return forward.out_proj(y) if self.fusion_at == "inner" else y


def check_options(
    context_kernel: int,
    gradient_window: int,
    gradient_smoothing: int,
    gate_form: GateForm,
    form: Form,
    dynamic_kernels: Kernels,
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
    if form == "diag" and gate_form in ("scalar", "input"):
        raise ValueError(f"gates of form 'diag' cannot be '{gate_form}'")


class HZipOptions(MambaOptions):
    """What `HZipMamba` can be told."""

    causal = False

    context_kernel: NonNegativeInt = 3
    gradient_window: NonNegativeInt = 1
    gradient_smoothing: PositiveInt = 1
    gradient_side: Literal["one", "centred"] = "one"
    gate_form: GateForm = "vector"
    gate_rank: PositiveInt | None = None
    gate_norm: bool = False
    fusion_at: Literal["model", "inner"] = "model"
    form: Form = "dense"
    share: Share = "none"
    dynamic_kernels: Kernels = Field((), description="(width, dilation) of three kernels or more")

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        check_options(
            *(self.context_kernel, self.gradient_window, self.gradient_smoothing),
            *(self.gate_form, self.form, self.dynamic_kernels),
        )
        return self

    def build(self, d_model: int, *, layer: int, n_layers: int) -> HZipMamba:
        own = set(HZipOptions.model_fields) - set(MambaOptions.model_fields)
        return rescale_residual(
            HZipMamba(d_model, **self.mamba_options, **self.model_dump(include=own)), n_layers
        )

    def state_size(self, d_model: int) -> int:
        return 2 * self.scan_state(d_model)


@registry.register("hzip")
class HZipConfig(HZipOptions):
    """The design note to the letter. At equal parameters scanners and gates narrow together."""

    summary = "HZip-Mamba to the letter: two readings fused by dense gates"


@registry.register("hzip-lean")
class HZipLeanConfig(HZipOptions):
    """HZip-Mamba as we would use it: low-rank gates between the scans and one out_proj."""

    summary = "HZip-Mamba with low-rank gates, fused before the projection"

    gate_norm: bool = True
    fusion_at: Literal["model", "inner"] = "inner"
    form: Form = "lean"
