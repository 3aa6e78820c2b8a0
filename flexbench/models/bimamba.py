"""Bidirectional Mamba: a forward and a backward reading of the sequence, fused."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from flexbench.models.base import registry
from flexbench.models.mamba import Mamba, MambaOptions, rescale_residual

Fusion = Literal["add", "concat", "gate"]
Share = Literal["none", "projections"]


class BiMamba(nn.Module):
    """Two Mamba readings, y_f from left to right and y_r from right to left.

    `share="projections"` is what Vim (arXiv 2401.09417, `bimamba_type="v2"`) and Caduceus (arXiv
    2403.03234, `bidirectional_weight_tie`) do: one in_proj and one out_proj serve both directions;
    convolution, x_proj, dt_proj, A_log and D are each direction's own. The names are Caduceus's
    (`mamba_fwd`, `mamba_rev`), so that the state dict of one of its layers loads unchanged.

    Fusions of the two outputs of width d_model:

    - `add`: y_f + y_r (Vim, Caduceus).
    - `concat`: W (y_f, y_r), a linear map that starts as the sum.
    - `gate`: g y_f + (1 - g) y_r with g = sigmoid(W (y_f, y_r) + b), which starts as the mean.

    Args:
        d_model: width of input and output.
        fusion: "add", "concat" or "gate".
        share: "none" or "projections".
        **options: passed to both `Mamba` modules.
    """

    def __init__(
        self, d_model: int, fusion: Fusion = "add", share: Share = "none", **options: Any
    ) -> None:
        super().__init__()
        self.fusion = fusion
        self.share = share
        self.mamba_fwd = Mamba(d_model, **options)
        self.mamba_rev = Mamba(d_model, **options, reverse=True)
        if share == "projections":
            self.mamba_rev.in_proj = self.mamba_fwd.in_proj
            self.mamba_rev.out_proj = self.mamba_fwd.out_proj
        if fusion != "add":
            self.fuse = nn.Linear(2 * d_model, d_model, bias=fusion == "gate")
            self.reset_fusion()

    @torch.no_grad()
    def reset_fusion(self) -> None:
        """Let `concat` start as the sum and `gate` as the mean."""
        nn.init.zeros_(self.fuse.weight)
        if self.fusion == "concat":
            d_model = self.fuse.out_features
            self.fuse.weight.copy_(torch.eye(d_model, device=self.fuse.weight.device).repeat(1, 2))
        else:
            nn.init.zeros_(self.fuse.bias)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mix along the sequence in both directions; shapes as in `Mamba.forward`."""
        forward, reverse = self.mamba_fwd, self.mamba_rev
        if self.share == "none":
            return self._fuse(forward(x, cu_seqlens), reverse(x, cu_seqlens))
        u, z = forward.project(x)
        y_f, y_r = forward.scan(u, z, cu_seqlens), reverse.scan(u, z, cu_seqlens)
        if self.fusion == "add" and forward.out_proj.bias is None:
            return forward.out_proj(y_f + y_r)
        return self._fuse(forward.out_proj(y_f), forward.out_proj(y_r))

    def _fuse(self, y_f: Tensor, y_r: Tensor) -> Tensor:
        if self.fusion == "add":
            return y_f + y_r
        mixed = self.fuse(torch.cat([y_f, y_r], dim=-1))
        return mixed if self.fusion == "concat" else torch.lerp(y_r, y_f, torch.sigmoid(mixed))


@registry.register("bimamba")
class BiMambaConfig(MambaOptions):
    """Bidirectional Mamba. At equal parameters each direction is about half as wide as Mamba."""

    summary = "two Mamba readings a layer, forwards and backwards, fused"
    causal = False

    fusion: Fusion = "add"
    share: Share = "none"

    def build(self, d_model: int, *, layer: int, n_layers: int) -> BiMamba:
        bimamba = BiMamba(d_model, self.fusion, self.share, **self.mamba_options)
        return rescale_residual(bimamba, n_layers)

    def state_size(self, d_model: int) -> int:
        return 2 * self.scan_state(d_model)
