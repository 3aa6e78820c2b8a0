"""Forward and backward Mamba layers in turn (the alternation of Mamba-ND, arXiv 2402.05892)."""

from __future__ import annotations

from flexbench.models.base import registry
from flexbench.models.mamba import Mamba, MambaOptions, rescale_residual


@registry.register("alternating")
class AlternatingConfig(MambaOptions):
    """Even layers read left to right, odd ones right to left; parameters and cost are Mamba's."""

    summary = "Mamba layers that read forwards and backwards in turn (the cheap control)"
    causal = False

    def build(self, d_model: int, *, layer: int, n_layers: int) -> Mamba:
        mamba = Mamba(d_model, **self.mamba_options, reverse=layer % 2 == 1)
        return rescale_residual(mamba, n_layers)

    def state_size(self, d_model: int) -> int:
        return self.scan_state(d_model)
