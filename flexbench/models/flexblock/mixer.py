"""Step 7: Mamba run by a guide map."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor

from flexbench import kernels
from flexbench.models.flexblock.gates import GateForm, GateNodes, NodeGate
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
        self.gate_form = gate_form
        self.scope = scope
        router = Router(d_model, self.options, gate_form=gate_form, gate_nodes=gate_nodes)
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
            ValueError: the map is not of these sequences, or there is none and no router, or there
                are gates and it does not say of which nodes.
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
        real = real_lengths(x, lengths, cu_seqlens)
        if not torch.equal(guide.lengths, real):
            raise ValueError(
                f"the map is of sequences of {guide.lengths.tolist()} tokens, not {real.tolist()}"
            )
        if self.router is not None:
            return self.router.follow(guide, x, lengths, cu_seqlens)
        how = (self.options.reduce_stride, self.options.resolution)
        return Route.by_hand(guide, *how, x.shape[1] if cu_seqlens is None else None)

    def _alpha(self, route: Route) -> Tensor | None:
        """(nodes, 1 or d_inner): α of the nodes of the route's schedule."""
        parts = [] if route.weights is None else [route.weights]
        if self.gate_form != "none":
            if route.gates is None:
                raise ValueError("gates need the tree's attributes, which this map does not bring")
            alpha = self.node_gate(route.gates)
            parts.insert(0, alpha if route.twins is None else alpha[route.twins])
        if not parts:
            return None
        wide = max(part.shape[1] for part in parts)
        return torch.cat([part.expand(-1, wide) for part in parts])

    def _follow(self, rows: Tensor, route: Route) -> Tensor:
        """(tokens, d_model) to the same, by a route with one reading of each block."""
        packing = route.packing
        u, z = self.project(kernels.gather_runs(rows, packing.start, packing.count)[None])
        y = self._scan(self.convolve(u, packing.cu_seqlens), z, route)
        return kernels.scatter_runs(y, packing.start, packing.count, len(rows))

    def _follow_both(self, rows: Tensor, route: Route) -> Tensor:
        """The same where some blocks have two readings, which are mixed."""
        readings, packing = route.readings, route.packing
        assert readings is not None
        assert route.shares is not None
        first = kernels.gather_runs(rows, packing.start, packing.count)
        second = kernels.gather_runs(rows, readings.start, readings.count)
        (u, z), (other_u, other_z) = (self.project(x[None]) for x in (first, second))
        other_u = readings.convolve(u[0], other_u[0], self.convolve)
        u = self.convolve(u, packing.cu_seqlens)
        y = self._scan(
            readings.interleave(u[0], other_u)[None],
            readings.interleave(z[0], other_z[0])[None],
            route,
        )
        one, other = (
            part * share for part, share in zip(readings.separate(y), route.shares, strict=True)
        )
        return kernels.scatter_runs(
            one, packing.start, packing.count, len(rows)
        ) + kernels.scatter_runs(other, readings.start, readings.count, len(rows))

    def _scan(self, u: Tensor, z: Tensor, route: Route) -> Tensor:
        """Block scan and out_proj of (1, tokens, d_inner), to (tokens, d_model)."""
        scanned, factor = route.scanned, route.token_factor
        repeats, stretch = scanned.repeats, factor
        if repeats is not None and self.options.reduce == "euler":
            stretch = repeats[0, :, None].to(u.dtype)
            stretch = stretch if factor is None else factor * stretch
            repeats = None
        y = kernels.block_scan(
            **self.scan_inputs(u, z, stretch),
            cu_blocks=scanned.cu_blocks,
            cu_seqlens=scanned.cu_seqlens,
            repeats=repeats,
            nodes=route.schedule,
            alpha=self._alpha(route),
        )
        y = self.out_proj(cast(Tensor, y)[0])
        return y if factor is None else y * factor
