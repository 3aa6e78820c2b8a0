"""Flexible Block Mamba in the registry."""

from __future__ import annotations

from torch import nn

from flexbench.models.base import registry
from flexbench.models.flexblock.gates import GateForm, GateNodes
from flexbench.models.flexblock.mixer import FlexBlockMamba, Scope
from flexbench.models.flexblock.router import Router, RouterOptions
from flexbench.models.mamba import MambaOptions, rescale_residual


@registry.register("flexblock")
class FlexBlockConfig(MambaOptions, RouterOptions):
    """Flexible Block Mamba. With scope "model" one map, made from the embedded input, serves all
    layers; with "layer" each makes its own."""

    summary = "blocks found by scoring and merging; each computed fully, reduced or not, either way"
    causal = False

    gate_form: GateForm = "none"
    gate_nodes: GateNodes = "all"
    scope: Scope = "model"

    def build(self, d_model: int, *, layer: int, n_layers: int) -> FlexBlockMamba:
        mixer = FlexBlockMamba(
            d_model,
            **self.mamba_options,
            **self.router_options.model_dump(),
            gate_form=self.gate_form,
            gate_nodes=self.gate_nodes,
            scope=self.scope,
            own_router=self.scope == "layer",
        )
        return rescale_residual(mixer, n_layers)

    def build_router(self, d_model: int) -> nn.Module | None:
        if self.scope == "layer":
            return None
        return Router(
            d_model, self.router_options, gate_form=self.gate_form, gate_nodes=self.gate_nodes
        )

    @property
    def router_options(self) -> RouterOptions:
        return RouterOptions(**self.model_dump(include=set(RouterOptions.model_fields)))

    def state_size(self, d_model: int) -> int:
        return self.scan_state(d_model)
