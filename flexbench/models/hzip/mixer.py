"""HZip-Mamba, the mixer."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from flexbench.models.bimamba import Share
from flexbench.models.hzip.fusion import (
    LEAN_RANK,
    Form,
    GatedFusion,
    GateForm,
    Kernels,
    check_options,
)
from flexbench.models.mamba import Mamba


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
        block_gating: tokens of a leaf: the gates are also told the structure of a guide map that
            Flexible Block Mamba's builder makes from the context (`BlockStructure`); 0: they are
            not.
        merge_threshold: of that map.
        dynamic_kernels: (width, dilation) of three kernels or more, which a network that reads the
            input and both readings mixes at each position, in place of `context_kernel`.

    Attributes:
        trace: None, or a dict, in which `forward` leaves "forward gate" and "backward gate" (batch,
            length, channels), "kernel mixture" (batch, length, kernels) and "guide map", a
            `GuideMap`, as far as there are such.

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
        block_gating: int = 0,
        merge_threshold: float = 0.5,
        dynamic_kernels: Kernels = (),
        **options: Any,
    ) -> None:
        super().__init__()
        check_options(
            context_kernel=context_kernel,
            gradient_window=gradient_window,
            gradient_smoothing=gradient_smoothing,
            gate_form=gate_form,
            form=form,
            dynamic_kernels=dynamic_kernels,
            block_gating=block_gating,
        )
        self.fusion_at, self.share = fusion_at, share
        self.trace: dict[str, Any] | None = None
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
            block_gating=block_gating,
            merge_threshold=merge_threshold,
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
