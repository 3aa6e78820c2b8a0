"""HZip-Mamba in the registry."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from typing_extensions import Self

from flexbench.models.base import registry
from flexbench.models.bimamba import Share
from flexbench.models.hzip.fusion import Form, GateForm, Kernels, check_options
from flexbench.models.hzip.mixer import HZipMamba
from flexbench.models.mamba import MambaOptions, rescale_residual


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
    block_gating: NonNegativeInt = Field(0, description="tokens of a leaf; 0: gates know no blocks")
    merge_threshold: float = Field(0.5, ge=-1.0)
    dynamic_kernels: Kernels = Field((), description="(width, dilation) of three kernels or more")

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        check_options(
            context_kernel=self.context_kernel,
            gradient_window=self.gradient_window,
            gradient_smoothing=self.gradient_smoothing,
            gate_form=self.gate_form,
            form=self.form,
            dynamic_kernels=self.dynamic_kernels,
            block_gating=self.block_gating,
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
