"""Step 7: Mamba run by a guide map."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from flexbench import kernels
from flexbench.models.flexblock.gates import GateForm, GateNodes, NodeGate, gated_nodes
from flexbench.models.flexblock.guide import GuideMap
from flexbench.models.flexblock.router import Route, Router, RouterOptions, real_lengths
from flexbench.models.mamba import Mamba

Scope = Literal["model", "layer"]


class FlexBlockMamba(Mamba):
    """Mamba that computes what a guide map says, where and in which direction it says.

    The computed tokens of all sequences are gathered in map order into one packed sequence, the
    whole mixer runs on it (projections, convolution, scan), and its outputs are put back; what is
    not computed is zero. The parameters of `Mamba` keep their names, so that a `mamba_ssm.Mamba`
    state dict loads with `strict=False`.

    Args:
        d_model, *arguments: those of `mamba_ssm.Mamba`, in its order.
        d_inner: inner width; None: `expand` * d_model.
        gate_form: gates on the summaries of the tree's nodes: "none", "leaf-scalar",
            "leaf-channel", "tree-scalar" or "tree-channel".
        gate_nodes: which nodes a tree form gates: "merged" (inside full blocks), "above" (blocks
            and what is above them) or "all".
        scope: "layer": the map is made here, from this layer's input; "model": so too, unless one
            is handed in, as a stack does that makes one map for all its layers.
        own_router: False: there is no router here; every call brings a map.
        **options: the fields of `RouterOptions` (l0, thresholds, rev, target_ratio, …), and more
            arguments of `Mamba`.

    Raises:
        UserError: an option that does not exist or is out of range.
    """

    causal = False

    def __init__(
        self,
        d_model: int,
        *arguments: Any,
        d_inner: int | None = None,
        gate_form: GateForm = "none",
        gate_nodes: GateNodes = "all",
        scope: Scope = "model",
        own_router: bool = True,
        **options: Any,
    ) -> None:
        chosen = {key: options.pop(key) for key in RouterOptions.model_fields if key in options}
        super().__init__(d_model, *arguments, d_inner=d_inner, **options)
        self.options = RouterOptions.parse(chosen)
        self.gate_form, self.gate_nodes = gate_form, gate_nodes
        self.scope = scope
        router = Router(d_model, self.options, gated=gate_form != "none")
        self.router = router if own_router else None
        if gate_form != "none":
            channels = 1 if gate_form.endswith("scalar") else self.d_inner
            self.node_gate = NodeGate(router.summary_width, channels)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        guide: GuideMap | Route | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Mix along the sequence by a map.

        Args:
            x: (batch, length, d_model), right-padded; with `cu_seqlens` (1, total, d_model).
            lengths: (batch,) int64 real tokens of each row; None: all.
            guide: the map to follow, or the route that a router found; None: found here.
            cu_seqlens: (sequences + 1,) int32 bounds of packed sequences.

        Returns:
            x's shape; zero at padding and wherever the map computes nothing.

        Raises:
            ValueError: the map is not of these sequences, or there is none and no router.
        """
        route = self._route(x, lengths, guide, cu_seqlens)
        if route.is_plain and self.gate_form == "none" and lengths is None:
            return super().forward(x, cu_seqlens)
        if not len(route.packing):
            nothing = torch.zeros_like(x)
            # A budget on the factor must be able to end this.
            return nothing if route.factor is None else nothing + 0 * route.factor.sum()
        rows = x.flatten(0, 1)
        follow = self._follow if route.readings is None else self._follow_both
        return follow(rows, route).view_as(x)

    def _route(
        self,
        x: Tensor,
        lengths: Tensor | None,
        guide: GuideMap | Route | None,
        cu_seqlens: Tensor | None,
    ) -> Route:
        if isinstance(guide, Route):
            return guide
        if guide is None:
            if self.router is None:
                raise ValueError("this layer has no router of its own; hand it a guide")
            return cast(Route, self.router(x, lengths, cu_seqlens))
        lengths = real_lengths(x, lengths, cu_seqlens)
        if not torch.equal(guide.lengths, lengths):
            raise ValueError(
                f"the map is of sequences of {guide.lengths.tolist()} tokens, "
                f"not {lengths.tolist()}"
            )
        row_length = x.shape[1] if cu_seqlens is None else None
        route = Route.by_hand(
            guide, self.options.reduce_stride, self.options.resolution, row_length
        )
        if self.gate_form == "none" or self.router is None:
            return route
        return replace(route, tree=self.router.tree(x, lengths, cu_seqlens))

    def _gates(self, route: Route) -> tuple[list[Tensor], list[Tensor]]:
        """The bounds (nodes, 3) of gates and their α (nodes, 1 or d_inner), outer ones first."""
        readings = route.readings
        bounds, alphas = [], []
        if self.gate_form != "none":
            if route.tree is None:
                raise ValueError("gates need the tree's attributes, which this map does not bring")
            nodes = gated_nodes(
                route.tree, route.guide, route.packing, self.gate_form, self.gate_nodes
            )
            alpha = self.node_gate(route.tree, nodes)
            if readings is None:
                bounds.append(torch.stack([nodes.start, nodes.start, nodes.end], 1))
            else:
                placed, which = readings.gates(nodes)
                bounds.append(placed)
                alpha = alpha[which]
            alphas.append(alpha)
        if route.block_keep is not None:
            blocks = (readings or route.packing).cu_blocks.long()
            bounds.append(torch.stack([blocks[:-1], blocks[:-1], blocks[1:]], 1))
            alphas.append(route.block_keep[:, None])
        return bounds, alphas

    def _follow(self, rows: Tensor, route: Route) -> Tensor:
        """(tokens, d_model) to the same, by a route with one reading of each block."""
        packing, factor = route.packing, route.token_factor
        u, z = self.project(kernels.gather_runs(rows, packing.start, packing.count)[None])
        y = self._scan(
            self.convolve(u, packing.cu_seqlens),
            z,
            factor,
            *self._gates(route),
            cu_blocks=packing.cu_blocks,
            cu_seqlens=packing.cu_seqlens,
            repeats=packing.repeats,
        )
        y = y if factor is None else y * factor
        return kernels.scatter_runs(y, packing.start, packing.count, len(rows))

    def _follow_both(self, rows: Tensor, route: Route) -> Tensor:
        """The same where some blocks have two readings, which are mixed."""
        readings, packing = route.readings, route.packing
        assert readings is not None
        first = kernels.gather_runs(rows, packing.start, packing.count)
        second = kernels.gather_runs(rows, readings.start, readings.count)
        (u, z), (other_u, other_z) = (self.project(x[None]) for x in (first, second))
        other_u = readings.convolve(u[0], other_u[0], self.d_conv, self.convolve)
        u = self.convolve(u, packing.cu_seqlens)
        factor = route.token_factor
        factors = None if factor is None else readings.interleave(factor, route.factor_at(readings))
        bounds, alphas = self._gates(route)
        weight = route.other_weight
        y = self._scan(
            readings.interleave(u[0], other_u)[None],
            readings.interleave(z[0], other_z[0])[None],
            factors,
            [*bounds, readings.forks],
            [*alphas, weight[readings.forked, None]],
            cu_blocks=readings.cu_blocks,
            cu_seqlens=readings.cu_seqlens,
            repeats=readings.repeats,
        )
        y = y if factors is None else y * factors
        share = torch.where(readings.forked, weight, 0.0)[:, None]
        one, other = readings.separate(y)
        one, other = one * (1 - share[packing.block]), other * share[readings.block]
        return kernels.scatter_runs(
            one, packing.start, packing.count, len(rows)
        ) + kernels.scatter_runs(other, readings.start, readings.count, len(rows))

    def _scan(
        self,
        u: Tensor,
        z: Tensor,
        factor: Tensor | None,
        bounds: list[Tensor],
        alphas: list[Tensor],
        **packed: Tensor | None,
    ) -> Tensor:
        """Block scan and out_proj of (1, tokens, d_inner), to (tokens, d_model)."""
        nodes = alpha = None
        if bounds:
            wide = max(part.shape[1] for part in alphas)
            nodes = torch.cat(bounds).int()
            alpha = torch.cat([part.expand(-1, wide) for part in alphas])
        repeats = packed["repeats"]
        if repeats is not None and self.options.reduce == "euler":
            stretch = repeats[0, :, None].to(u.dtype)
            factor = stretch if factor is None else factor * stretch
            packed["repeats"] = None
        inputs = self.scan_inputs(u, z, factor)
        y = kernels.block_scan(**inputs, **packed, nodes=nodes, alpha=alpha)  # type: ignore[arg-type]
        return self.out_proj(cast(Tensor, y)[0])
