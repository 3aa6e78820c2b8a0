"""Mamba (Gu and Dao, arXiv 2312.00752), channels last, over flexbench's kernels."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeVar, cast

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from flexbench import kernels
from flexbench.models.base import MixerConfig, registry

M = TypeVar("M", bound=nn.Module)


class Mamba(nn.Module):
    """The Mamba mixer, with the parameters of `mamba_ssm.Mamba`: names, shapes and initialisation.

    A `mamba_ssm.Mamba` state dict loads unchanged and gives the same outputs, and the other way
    round. The arguments up to `dtype` are those of `mamba_ssm.Mamba`; `use_fast_path` is accepted
    for its sake and changes nothing.

    Parameters carry marks for the optimiser: `_no_weight_decay` on A_log, D and dt_proj.bias;
    `_ssm` on A_log and dt_proj, whose learning rate the S4 protocol caps.

    Args:
        d_inner: inner width; None: `expand` * d_model.
        reverse: read from right to left, in the convolution and in the scan.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        d_inner: int | None = None,
        reverse: bool = False,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.d_inner = d_inner or int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.layer_idx = layer_idx
        self.reverse = reverse

        inner, rank = self.d_inner, self.dt_rank
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=bias, device=device, dtype=dtype)
        self.conv1d = nn.Conv1d(
            inner, inner, d_conv, groups=inner, bias=conv_bias, device=device, dtype=dtype
        )
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False, device=device, dtype=dtype)
        self.dt_proj = nn.Linear(rank, inner, device=device, dtype=dtype)
        self._initialise_step(dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
        self.A_log = nn.Parameter(torch.empty(inner, d_state, device=device))
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, d_state + 1, dtype=torch.float32, device="cpu").log())
        self.D = nn.Parameter(torch.ones(inner, device=device))
        self.out_proj = nn.Linear(inner, d_model, bias=bias, device=device, dtype=dtype)

        mark(self.A_log, _no_weight_decay=True, _ssm=True)
        mark(self.D, _no_weight_decay=True)
        mark(self.dt_proj.weight, _ssm=True)
        mark(self.dt_proj.bias, _no_weight_decay=True, _ssm=True, _no_reinit=True)

    @torch.no_grad()
    def _initialise_step(
        self, low: float, high: float, init: str, scale: float, floor: float
    ) -> None:
        """Δ's projection preserves variance; its bias makes Δ log-uniform in low..high."""
        bound = scale * self.dt_rank**-0.5
        weight, bias = self.dt_proj.weight, self.dt_proj.bias
        if weight.is_meta:  # where torch's decompositions would import torch._dynamo: seconds
            return
        if init == "constant":
            nn.init.constant_(weight, bound)
        elif init == "random":
            nn.init.uniform_(weight, -bound, bound)
        else:
            raise ValueError(f"dt_init must be 'random' or 'constant', not {init!r}")
        span = math.log(high) - math.log(low)
        step = torch.exp(torch.rand_like(bias) * span + math.log(low)).clamp(min=floor)
        bias.copy_(step + torch.log(-torch.expm1(-step)))

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mix along the sequence.

        Args:
            x: (batch, length, d_model); with `cu_seqlens` (1, total, d_model), packed sequences.
            cu_seqlens: (sequences + 1,) int32 bounds of the packed sequences.

        Returns:
            x's shape.
        """
        return self.out_proj(self.scan(*self.project(x), cu_seqlens))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """in_proj's two halves, u and z, each (batch, length, d_inner).

        Two products, because the gradients of two views of one product would have to be copied
        next to each other, which costs more than the larger product saves.
        """
        weight, bias = self.in_proj.weight, self.in_proj.bias
        biases = (None, None) if bias is None else bias.chunk(2)
        u, z = (F.linear(x, w, b) for w, b in zip(weight.chunk(2), biases, strict=True))
        return u, z

    def scan(self, u: Tensor, z: Tensor | None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Convolution, scan and gate: u and z, the halves of in_proj's output, to out_proj's input.

        All three are (batch, length, d_inner); without z there is no gate.
        """
        u = self.convolve(u, cu_seqlens)
        inputs = self.scan_inputs(u, z)
        y = kernels.selective_scan(**inputs, cu_seqlens=cu_seqlens, reverse=self.reverse)
        return cast(Tensor, y)

    def convolve(self, u: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """The short convolution and its SiLU: (batch, length, d_inner) to the same."""
        return kernels.causal_conv1d(
            u,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu",
            cu_seqlens=cu_seqlens,
            reverse=self.reverse,
        )

    def scan_inputs(
        self, u: Tensor, z: Tensor | None, factor: Tensor | None = None
    ) -> dict[str, Any]:
        """The arguments of `selective_scan` for the convolved u and for z, if any.

        `factor`, (batch, length, 1), multiplies Δ.
        """
        rank, state = self.dt_rank, self.d_state
        dt, b, c = self.x_proj(u).split([rank, state, state], dim=-1)
        delta = F.linear(dt, self.dt_proj.weight)
        bias = _at_least_float32(self.dt_proj.bias)
        if factor is not None:
            delta = F.softplus(delta + bias) * factor
        return {
            "u": u,
            "delta": delta,
            "A": -torch.exp(_at_least_float32(self.A_log)),
            "B": b,
            "C": c,
            "D": _at_least_float32(self.D),
            "z": z,
            "delta_bias": bias if factor is None else None,
            "delta_softplus": factor is None,
        }


@torch.no_grad()
def rescale_residual(mixer: M, n_layers: int) -> M:
    """Divide every out_proj by √n_layers, as mamba_ssm's models do after GPT-2."""
    for name, parameter in mixer.named_parameters():
        if name.endswith("out_proj.weight"):
            parameter.div_(math.sqrt(n_layers))
    return mixer


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mark(parameter: Tensor, **marks: bool) -> None:
    """Attributes that the optimiser looks for."""
    for name, value in marks.items():
        setattr(parameter, name, value)


class MambaOptions(MixerConfig):
    """What every mixer made of `Mamba` modules can be told."""

    d_state: PositiveInt = 16
    d_conv: int = Field(4, ge=2, le=4)
    expand: PositiveInt = 2
    dt_rank: PositiveInt | Literal["auto"] = "auto"
    dt_min: float = Field(0.001, gt=0.0)
    dt_max: float = Field(0.1, gt=0.0)

    @property
    def mamba_options(self) -> dict[str, Any]:
        """Keyword arguments for `Mamba`."""
        return self.model_dump(include=set(MambaOptions.model_fields))

    def scan_state(self, d_model: int) -> int:
        """Floats carried by one direction: the state and the convolution's window."""
        return (self.d_inner or self.expand * d_model) * (self.d_state + self.d_conv - 1)


@registry.register("mamba")
class MambaConfig(MambaOptions):
    """Baseline Mamba: one causal selective scan a layer."""

    summary = "Mamba, left to right (the baseline that every model is matched to)"
    causal = True

    def build(self, d_model: int, *, layer: int, n_layers: int) -> Mamba:
        return rescale_residual(Mamba(d_model, **self.mamba_options), n_layers)

    def state_size(self, d_model: int) -> int:
        return self.scan_state(d_model)
