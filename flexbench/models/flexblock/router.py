"""From a sequence to its guide map, and how the choice behind it is learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from flexbench.config import StrictModel
from flexbench.kernels.block import Schedule, schedule
from flexbench.models.base import untraced
from flexbench.models.flexblock.gates import GateForm, GateNodes, Nodes, gated_nodes
from flexbench.models.flexblock.guide import BlockType, GuideMap, Packing, Resolution
from flexbench.models.flexblock.merge import (
    BlockAttributes,
    Level,
    at_nodes,
    build_tree,
    merge,
    to_map,
)
from flexbench.models.flexblock.readings import TwoReadings
from flexbench.models.flexblock.scorer import Scorer

RouterGradient = Literal["saliency", "ste", "gate", "soft", "random", "fixed", "uniform"]
RevSource = Literal["learned", "random", "all", "off"]
RevGate = Literal["hard", "soft"]

ROUTER_WEIGHT = 0.1
"""Weight of the router's own losses; small, since the gradient's norm is clipped as a whole."""
OBSERVED_SHARE = 0.25
"""Share of the steps that observe saliency once the ratio is at its target."""
LONGEST_HOLD = 0.4
"""Share of the training after which the hold ends even if the loss has not moved."""
SETTLED = 20
"""Steps whose mean loss is the one that a later loss is compared with."""
BISECTIONS = 12


class RouterOptions(StrictModel):
    """How blocks are found and what becomes of them."""

    l0: PositiveInt = Field(64, description="tokens of a leaf")
    merge_threshold: float = Field(0.9, description="cosine; above 1 nothing merges, -1 all")
    remerge_threshold: float | None = Field(
        None,
        description="looser; None: no second pass. It has the effect of a merge_threshold this "
        "low, with no homogeneity_threshold",
    )
    homogeneity_threshold: float = Field(0.0, ge=0.0, le=1.0)
    max_level: int | None = Field(None, ge=0, description="of a block; None: no limit")
    rev: RevSource = Field("learned", description="which blocks are read from their end")
    rev_threshold: float = Field(0.5, ge=0.0, le=1.0)
    rev_gate: RevGate = Field("hard", description="soft: both readings, mixed")
    rev_share: float = Field(
        0.25, gt=0.0, le=1.0, description="of sequences that compare directions"
    )
    target_ratio: float = Field(0.5, gt=0.0, le=1.0, description="computed tokens a real token")
    reduced_share: float = Field(0.25, ge=0.0, le=1.0, description="of tokens in reduced blocks")
    reduce_stride: PositiveInt = Field(4, description="tokens of a run in a reduced leaf")
    reduce: Literal["exact", "euler"] = Field("exact", description="euler: Δ times the run")
    resolution: Resolution = Field("block", description="fixed: runs do not grow with the block")
    router_gradient: RouterGradient = "saliency"
    router_hold: float = Field(0.2, ge=0.0, le=1.0, description="drop of the loss that ends it")
    router_warmup: float = Field(0.1, ge=0.0, le=1.0, description="share of steps to the target")
    exploration: float = Field(0.05, ge=0.0, le=1.0, description="of leaves, kept full at random")

    @model_validator(mode="after")
    def _thresholds_in_order(self) -> Self:
        if self.remerge_threshold is not None and self.remerge_threshold > self.merge_threshold:
            raise ValueError("remerge_threshold must not exceed merge_threshold")
        return self


@dataclass(frozen=True, eq=False)
class Route:
    """A guide map and all that the layers need to follow it, made once for all of them.

    What a layer runs reads these tensors and decides nothing by their values, so that it neither
    waits for a GPU nor breaks a traced graph.

    Attributes:
        guide: the map.
        packing: what it computes.
        factor: (batch, leaves), by which a leaf's output and Δ are multiplied; None: 1.
        keep: (batch, leaves), how much of what a leaf writes is carried on; None: all.
        reversal: (blocks,), the weight of a block's reversed reading where both are computed; None:
            the flags decide.
        readings: the blocks that are read in both directions, if any.
        gates: the tree's nodes that carry a gate; None: no node does.
        is_plain: whether the map asks for nothing but an ordinary scan of every token.
        token_factor: (scanned, 1), the factor of the leaf in which each scanned token's run begins.
        weights: (gates or blocks, 1) α of nodes that every layer shares: the mean of `keep` over
            each block's leaves, then the weight of each second reading.
        shares: (computed, 1) and (again, 1), the weights of both readings' outputs.
        twins: (n,) which of `gates` each gate of `schedule` is; None: they are the same.
        schedule: gates, then the nodes of `weights`, for `block_scan`; None: there are none.
    """

    guide: GuideMap
    packing: Packing
    factor: Tensor | None = None
    keep: Tensor | None = None
    reversal: Tensor | None = None
    readings: TwoReadings | None = None
    gates: Nodes | None = None
    is_plain: bool = field(init=False)
    token_factor: Tensor | None = field(init=False)
    weights: Tensor | None = field(init=False)
    shares: tuple[Tensor, Tensor] | None = field(init=False)
    twins: Tensor | None = field(init=False)
    schedule: Schedule | None = field(init=False)

    def __post_init__(self) -> None:
        packing, readings = self.packing, self.readings
        nodes, weights = [], []
        token_factor = shares = twins = None
        if self.factor is not None:
            token_factor = self._factor_at(packing)
            if readings is not None:
                token_factor = readings.interleave(token_factor, self._factor_at(readings))
        if self.gates is not None:
            bounds = torch.stack([self.gates.start, self.gates.start, self.gates.end], 1)
            if readings is not None:
                bounds, twins = readings.gates(self.gates)
            nodes.append(bounds)
        if self.keep is not None:
            blocks = self.scanned.cu_blocks.long()
            nodes.append(torch.stack([blocks[:-1], blocks[:-1], blocks[1:]], 1))
            weights.append(self._block_keep(self.keep))
        if readings is not None:
            assert self.reversal is not None
            other = torch.where(self.guide.reverse, 1 - self.reversal, self.reversal)
            nodes.append(readings.forks)
            weights.append(other[readings.forked])
            other = torch.where(readings.forked, other, 0.0)[:, None]
            shares = (1 - other[packing.block], other[readings.block])
        made = {
            "is_plain": self._is_plain(),
            "token_factor": token_factor,
            "weights": torch.cat(weights)[:, None] if weights else None,
            "shares": shares,
            "twins": twins,
            "schedule": schedule(torch.cat(nodes).int(), self.scanned.cu_seqlens)
            if nodes
            else None,
        }
        for name, value in made.items():
            object.__setattr__(self, name, value)

    @classmethod
    def by_hand(
        cls,
        guide: GuideMap,
        reduce_stride: int = 4,
        resolution: Resolution = "block",
        row_length: int | None = None,
    ) -> Route:
        """Follow a map as it is; the arguments are those of `GuideMap.pack`."""
        return cls(guide, guide.pack(reduce_stride, resolution, row_length))

    @property
    def scanned(self) -> Packing | TwoReadings:
        """What is scanned: the computed tokens, second readings included."""
        return self.readings or self.packing

    def _is_plain(self) -> bool:
        if any(extra is not None for extra in (self.factor, self.keep, self.reversal, self.gates)):
            return False
        return bool(((self.guide.type == BlockType.FULL) & ~self.guide.reverse).all())

    def _factor_at(self, packed: Packing | TwoReadings) -> Tensor:
        """(tokens, 1): the factor of the leaf in which each token's run begins."""
        assert self.factor is not None
        batch = self.guide.batch[packed.block]
        leaf = (packed.start - self.packing.first_tokens[batch]) // self.guide.l0
        return self.factor[batch, leaf, None]

    def _block_keep(self, keep: Tensor) -> Tensor:
        """(blocks,): the mean of `keep` over each block's leaves."""
        levels = [keep]
        while levels[-1].shape[1] > 1:
            odd = levels[-1].shape[1] % 2
            padded = F.pad(levels[-1], (0, odd))
            levels.append(padded.unflatten(1, (-1, 2)).mean(-1))
        return of_blocks(levels, self.guide)


class Router(nn.Module):
    """Scores leaves, decides their types and directions, and builds the map.

    No hard decision has a gradient, so each is given one. Directions: in a random share of the
    sequences of a training batch both readings of every block are computed, and the weight of the
    reversed one is the flag plus its probability minus itself, so that the gradient is what the
    other reading would have changed. Types, by `router_gradient`:

    - saliency: the score is regressed on the logarithm of the gradient's size at the leaf's factor,
      1, by which its output and its Δ are multiplied; types are quantiles of the score.
    - ste: the factor is the probability of the type taken, 1 in value; a budget loss holds the
      ratio.
    - gate: the probability of `full` gates what the leaf writes into the state.
    - soft: everything is computed and multiplied by that probability; evaluation is hard.
    - random, fixed: leaves at random, or evenly spaced: controls.
    - uniform: runs of 1 / `target_ratio` tokens, rounded, throughout; no router at all.

    Until the task's loss has fallen by `router_hold`, everything is computed and directions are
    random; then the ratio falls to its target. At evaluation types are cut at thresholds that
    passes over training data set, so a sequence's map does not depend on its batch.

    Args:
        d_model: width of the input.
        options: see there.
        gate_form, gate_nodes: which nodes the layers gate; their gates read the attributes, and so
            train the scorer.
    """

    thresholds: Tensor
    release: Tensor
    progress: Tensor
    losses: Tensor
    tally: Tensor

    TALLIED = ("computed", "tokens", "reversed", "full", "reduced", "identity", "blocks")
    OBSERVED = ("loss", "observations")
    LEVELS = 16

    def __init__(
        self,
        d_model: int,
        options: RouterOptions,
        *,
        gate_form: GateForm = "none",
        gate_nodes: GateNodes = "all",
    ) -> None:
        super().__init__()
        self.options = options
        self.gate_form, self.gate_nodes = gate_form, gate_nodes
        self.scorer = Scorer(d_model, options.l0)
        if options.rev_gate == "soft":
            self.both_ways = nn.Parameter(torch.zeros(()))
        self.register_buffer("thresholds", torch.full((2,), -torch.inf))
        self.register_buffer("release", torch.full((), torch.inf, device="cpu"))
        self.register_buffer("progress", torch.zeros((), device="cpu"))
        # Steps seen, mean loss of the first ones, running loss.
        self.register_buffer("losses", torch.zeros(3, dtype=torch.float64, device="cpu"))
        # What was computed since training, and since evaluation, began.
        self.register_buffer(
            "tally",
            torch.zeros(2, len(self.TALLIED + self.OBSERVED) + self.LEVELS, dtype=torch.float64),
        )
        self.trace: dict[str, Any] | None = None
        self._collected: list[tuple[BlockAttributes, Tensor]] | None = None

    @property
    def summary_width(self) -> int:
        return self.scorer.sizes[0]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Keep the schedule on the CPU, which asks for it: a GPU would have to be waited for."""
        kept = {name: getattr(self, name) for name in ("release", "progress", "losses")}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            setattr(self, name, buffer)
        return self

    # -- following a sequence ------------------------------------------------------------------

    def forward(
        self, x: Tensor, lengths: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Route:
        """The route of a batch; no gradient reaches it through x.

        Args:
            x: (batch, length, d_model), right-padded; with `cu_seqlens` (1, total, d_model).
            lengths: (batch,) int64 real tokens of each row; None: all.
            cu_seqlens: (sequences + 1,) int32 bounds of the packed sequences.
        """
        return untraced(self._find)(x, lengths, cu_seqlens)

    def _find(self, x: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None) -> Route:
        row_length = x.shape[1] if cu_seqlens is None else None
        if self.options.router_gradient == "uniform":
            return self._uniform(x, lengths, cu_seqlens, row_length)
        observed = self._observes()
        with torch.set_grad_enabled(torch.is_grad_enabled() and (observed or self._steers)):
            found, lengths = self.attributes(x, lengths, cu_seqlens)
        tokens = self._tokens(found, lengths)
        score = self._score(found)
        if self._collected is not None:
            self._collected.append((found, lengths))
        types = self._types(score, tokens)
        factor, types = self._factor(score, types, tokens, observed)
        keep = None
        if self.options.router_gradient == "gate":
            keep = score.sigmoid()
        tree, guide = self._map(found, lengths, types)
        how = (self.options.reduce_stride, self.options.resolution, row_length)
        packing = guide.pack(*how)
        reversal = readings = None
        forked = self._forked(guide)
        if forked is not None:
            readings = TwoReadings(guide, packing, forked, *how)
            reversal = self._reversal(found, guide, tree)
        gates = self._gates(tree, guide, packing)
        route = Route(guide, packing, factor, keep, reversal, readings, gates)
        if self._collected is None:
            self._count(route)
        if self.trace is not None:
            scores = score.detach().repeat_interleave(self.options.l0, 1)
            self.trace |= {"guide map": guide, "leaf score": scores}
        return route

    def _uniform(
        self,
        x: Tensor,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None,
        row_length: int | None,
    ) -> Route:
        """The control that looks at nothing: runs of one length from a sequence's start."""
        lengths = real_lengths(x, lengths, cu_seqlens)
        guide = GuideMap.uniform(len(lengths), lengths, int(lengths.max()), type=BlockType.REDUCED)
        stride = round(1 / self.options.target_ratio)
        route = Route(guide, guide.pack(stride, "fixed", row_length))
        self._count(route)
        if self.trace is not None:
            self.trace["guide map"] = guide
        return route

    def tree(
        self, x: Tensor, lengths: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> list[Level]:
        """The attributes of all nodes; arguments as in `forward`."""
        return build_tree(*self.attributes(x, lengths, cu_seqlens), self.options.l0)

    def follow(
        self,
        guide: GuideMap,
        x: Tensor,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Route:
        """The route of a map made by hand, with gates; further arguments as in `forward`."""
        row_length = x.shape[1] if cu_seqlens is None else None
        packing = guide.pack(self.options.reduce_stride, self.options.resolution, row_length)
        if self.gate_form == "none":
            return Route(guide, packing)
        tree = self.tree(x, lengths, cu_seqlens)
        return Route(guide, packing, gates=self._gates(tree, guide, packing))

    def _gates(self, tree: list[Level], guide: GuideMap, packing: Packing) -> Nodes | None:
        if self.gate_form == "none":
            return None
        return gated_nodes(tree, guide, packing, self.gate_form, self.gate_nodes)

    def attributes(
        self, x: Tensor, lengths: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[BlockAttributes, Tensor]:
        """The leaves' attributes, and (batch,) int64 lengths; arguments as in `forward`."""
        lengths = real_lengths(x, lengths, cu_seqlens)
        if cu_seqlens is not None:
            x = torch.nn.utils.rnn.pad_sequence(
                x.detach()[0].split(lengths.tolist()), batch_first=True
            )
        return self.scorer(x, lengths), lengths

    def _map(
        self, found: BlockAttributes, lengths: Tensor, types: Tensor
    ) -> tuple[list[Level], GuideMap]:
        """Steps 3 to 6 with the types decided."""
        options = self.options
        decided = BlockAttributes(
            summary=found.summary,
            homogeneity=found.homogeneity,
            reverse=self._reverse(found.reverse),
            type_logits=F.one_hot(types, len(BlockType)).to(found.reverse.dtype),
            bidirectional=found.bidirectional,
        )
        tree = build_tree(decided, lengths, options.l0)
        level_of_leaf = merge(
            tree,
            merge_threshold=options.merge_threshold,
            remerge_threshold=options.remerge_threshold,
            homogeneity_threshold=options.homogeneity_threshold,
            max_level=options.max_level,
            rev_threshold=options.rev_threshold,
        )
        return tree, to_map(tree, level_of_leaf, options.l0, options.rev_threshold)

    def _observes(self) -> bool:
        """Whether this pass measures saliency: in training, at the target ratio now and then."""
        if not self.training or self.options.router_gradient != "saliency":
            return False
        return not self._at_target or float(torch.rand(())) < OBSERVED_SHARE

    @property
    def _steers(self) -> bool:
        """Whether the task's own loss sends gradients to the scorer."""
        options = self.options
        return (
            options.rev == "learned"
            or self.gate_form != "none"
            or options.router_gradient in ("ste", "gate", "soft")
        )

    def _factor(
        self,
        score: Tensor,
        types: Tensor,
        tokens: Tensor,
        observed: bool,
    ) -> tuple[Tensor | None, Tensor]:
        """What a leaf's output and Δ are multiplied by while it trains, and the types for that."""
        if not self.training:
            return None, types
        if self.options.router_gradient == "saliency":
            if not observed:
                return None, types
            computed = tokens.gt(0) & types.ne(BlockType.IDENTITY)
            return _Saliency.apply(score, computed, self.tally[0]), types
        probability = score.sigmoid()
        if self.options.router_gradient == "ste":
            taken = torch.where(types == BlockType.FULL, probability, 1 - probability)
            factor = taken + (1 - taken).detach()
            return self._with_budget(factor, probability, types, tokens), types
        if self.options.router_gradient == "soft":
            return probability, torch.zeros_like(types)
        return None, types

    def _tokens(self, found: BlockAttributes, lengths: Tensor) -> Tensor:
        begins = torch.arange(found.reverse.shape[1], device=lengths.device) * self.options.l0
        return (lengths[:, None] - begins).clamp(0, self.options.l0)

    # -- types ---------------------------------------------------------------------------------

    def _score(self, found: BlockAttributes) -> Tensor:
        """(batch, leaves): the higher, the rather a leaf is computed in full; where types have
        probabilities, the logit of `full` against `identity`."""
        shape, device = found.reverse.shape, found.reverse.device
        if self.options.router_gradient == "random":
            if self.training:
                return torch.rand(shape, device=device)
            draw = torch.Generator().manual_seed(0)  # a leaf's fate depends on its place alone
            return torch.rand(shape[1], generator=draw).to(device).expand(shape)
        if self.options.router_gradient == "fixed":
            golden = torch.arange(1, shape[1] + 1, device=device) * 0.6180339887
            return (golden % 1.0).expand(shape)
        return found.type_logits[..., BlockType.FULL] - found.type_logits[..., BlockType.IDENTITY]

    @property
    def released(self) -> bool:
        """Whether the hold is over."""
        return float(self.progress) >= float(self.release)

    @property
    def ratio(self) -> float:
        """The computed-token ratio aimed at now."""
        gone = float(self.progress) - float(self.release)
        share = min(max(gone / max(self.options.router_warmup, 1e-9), 0.0), 1.0)
        return 1 - (1 - self.options.target_ratio) * share

    @property
    def settled(self) -> bool:
        """Whether the hold is over and the ratio has reached its target."""
        if self.options.router_gradient == "uniform":
            return True
        return self.released and self._at_target

    @property
    def _at_target(self) -> bool:
        return self.ratio == 1 - (1 - self.options.target_ratio)

    def _shares(self, ratio: float) -> tuple[float, float]:
        """The shares of tokens in `full` and in `reduced` blocks that come to a ratio."""
        cost = 1 / self.options.reduce_stride
        reduced = self.options.reduced_share
        full = ratio - reduced * cost
        if full > 1 - reduced:
            full = (ratio - cost) / (1 - cost)
            reduced = 1 - full
        return max(full, 0.0), min(reduced, max(0.0, ratio / cost))

    def _types(self, score: Tensor, tokens: Tensor) -> Tensor:
        """(batch, leaves) int64 by `BlockType`."""
        source = self.options.router_gradient
        score = score.detach()
        if not self.training:
            return types_by_threshold(score, self.thresholds)
        if self.ratio == 1:
            return torch.zeros_like(tokens)
        if source == "ste":
            return types_by_threshold(score, torch.zeros_like(self.thresholds))
        full, reduced = self._shares(self.ratio)
        if source == "saliency":
            explored = torch.rand_like(score) < self.options.exploration * full
            score = score.masked_fill(explored, torch.inf)
        return types_by_share(score, tokens, full, reduced)

    def _with_budget(
        self, factor: Tensor, probability: Tensor, types: Tensor, tokens: Tensor
    ) -> Tensor:
        """The factor, with the gradient of the ratio loss of H-Net (arXiv 2507.07955) attached."""
        target = self.ratio
        if target == 1:
            return factor
        share = tokens / tokens.sum()
        selected = (share * types.ne(BlockType.IDENTITY)).sum()
        expected = (share * probability).sum()
        loss = selected * expected / target + (1 - selected) * (1 - expected) / (1 - target)
        return _Attach.apply(factor, loss * ROUTER_WEIGHT)

    # -- directions ----------------------------------------------------------------------------

    def _reverse(self, probability: Tensor) -> Tensor:
        """(batch, leaves): the probabilities that decide the flags."""
        source = self.options.rev
        if source == "off":
            return torch.zeros_like(probability)
        if source == "all":
            return torch.ones_like(probability)
        if source == "random" or (self.training and not self.released):
            if self.training:
                return torch.randint_like(probability, 2)
            draw = torch.Generator().manual_seed(1)
            flags = torch.randint(2, probability.shape[1:], generator=draw)
            return flags.to(probability).expand(probability.shape)
        return probability

    def _forked(self, guide: GuideMap) -> Tensor | None:
        """(blocks,) bool: which blocks are read in both directions; None: no block is."""
        if self.options.rev != "learned":
            return None
        if self.options.rev_gate == "soft":
            return torch.ones_like(guide.reverse)
        if not self.training:
            return None
        compared = (
            torch.rand(len(guide.lengths), device=guide.start.device) < self.options.rev_share
        )
        return compared[guide.batch] if bool(compared.any()) else None

    def _reversal(self, found: BlockAttributes, guide: GuideMap, tree: list[Level]) -> Tensor:
        """(blocks,) the weight of the reversed reading, where both are computed."""
        if self.training and not self.released:  # flags are random, what was found is not
            tree = build_tree(found, guide.lengths, guide.l0)
        reverse = of_blocks([level.reverse for level in tree], guide)
        if self.options.rev_gate == "soft":
            both = of_blocks([level.bidirectional for level in tree], guide)
            logit = torch.logit(reverse, eps=1e-6)
            return torch.sigmoid(logit + F.softplus(self.both_ways) * (2 * both - 1))
        return guide.reverse.to(reverse.dtype) + reverse - reverse.detach()

    # -- the schedule --------------------------------------------------------------------------

    @torch.no_grad()
    def after_step(self, progress: float, loss: float) -> None:
        """Hear how far the training has come, in [0, 1], and the step's mean loss."""
        self.progress.fill_(progress)
        steps, first, running = self.losses.tolist()
        if steps < SETTLED:
            first = running = (first * steps + loss) / (steps + 1)
        else:
            running += 0.05 * (loss - running)
        self.losses.copy_(torch.tensor([steps + 1, first, running]))
        moved = steps >= SETTLED and running <= (1 - self.options.router_hold) * first
        if torch.isinf(self.release) and (moved or progress >= LONGEST_HOLD):
            self.release.fill_(min(progress, LONGEST_HOLD))

    def begin_calibration(self) -> None:
        """Collect what the coming evaluation passes score."""
        self._collected = []

    @torch.no_grad()
    def end_calibration(self) -> None:
        """Set the thresholds so that what was collected comes to the ratio aimed at now."""
        collected, self._collected = self._collected or [], None
        if self.ratio == 1 or not collected:
            self.thresholds.fill_(-torch.inf)
            return
        if self.options.router_gradient == "ste":
            self.thresholds.fill_(0.0)
            return
        scores = [self._score(found) for found, _ in collected]
        tokens = [self._tokens(found, lengths) for found, lengths in collected]
        pooled = torch.cat([score.flatten() for score in scores])
        weight = torch.cat([count.flatten() for count in tokens])
        pooled, weight = pooled[weight > 0], weight[weight > 0]
        full, reduced = self._shares(self.ratio)
        low, high = 0.0, 1.0
        for _ in range(BISECTIONS):  # merged, reduced blocks are cheaper than their leaves
            thresholds = share_thresholds(pooled, weight, full, reduced)
            computed = 0
            for (found, lengths), score in zip(collected, scores, strict=True):
                _, guide = self._map(found, lengths, types_by_threshold(score, thresholds))
                how = (self.options.reduce_stride, self.options.resolution)
                computed += int(guide.computed(*how).sum())
            low, high = (full, high) if computed < self.ratio * int(weight.sum()) else (low, full)
            full = (low + high) / 2
        self.thresholds.copy_(thresholds)

    # -- what it comes to ----------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        if mode != self.training:
            self.tally[0 if mode else 1].zero_()
        return super().train(mode)

    @torch.no_grad()
    def _count(self, route: Route) -> None:
        guide = route.guide
        row = self.tally[0 if self.training else 1]
        row[0] += len(route.packing)
        row[1] += guide.length.sum()
        row[2] += (guide.length * guide.reverse).sum()
        row[3:6].index_add_(0, guide.type, guide.length.to(row.dtype))
        row[6] += len(guide)
        level = guide.level.clamp(max=self.LEVELS - 1)
        row[-self.LEVELS :].index_add_(0, level, torch.ones_like(level, dtype=row.dtype))

    def diagnostics(self) -> dict[str, float]:
        """What was computed, in this or the last training phase and evaluation.

        Keys, those of training with "training_" before them: computed_token_ratio, rev_share,
        full_share, reduced_share, identity_share (of tokens), mean_block_length, level_<k>_share
        (of blocks), and training_router_loss.
        """
        found: dict[str, float] = {}
        for prefix, row in (("", self.tally[1]), ("training_", self.tally[0])):
            values = row.tolist()
            named = dict(zip(self.TALLIED + self.OBSERVED, values, strict=False))
            if not named["tokens"]:
                continue
            tokens = named["tokens"]
            found[f"{prefix}computed_token_ratio"] = named["computed"] / tokens
            found[f"{prefix}rev_share"] = named["reversed"] / tokens
            for kind in ("full", "reduced", "identity"):
                found[f"{prefix}{kind}_share"] = named[kind] / tokens
            found[f"{prefix}mean_block_length"] = tokens / named["blocks"]
            if named["observations"]:
                found[f"{prefix}router_loss"] = named["loss"] / named["observations"]
            for level, count in enumerate(values[-self.LEVELS :]):
                if count:
                    found[f"{prefix}level_{level}_share"] = count / named["blocks"]
        return found


def real_lengths(x: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """(batch,) int64 real tokens of each sequence, by whichever is given."""
    if cu_seqlens is not None:
        return cu_seqlens.diff().long()
    if lengths is None:
        return torch.full((len(x),), x.shape[1], device=x.device)
    return lengths.long()


def of_blocks(levels: list[Tensor], guide: GuideMap) -> Tensor:
    """(blocks,) the values of the map's blocks, given (batch, nodes) those of every level."""
    index = guide.start // (guide.l0 << guide.level)
    return at_nodes(levels, guide.batch, guide.level, index)


def types_by_share(score: Tensor, tokens: Tensor, full: float, reduced: float) -> Tensor:
    """The best leaves of a batch full, the next reduced, by shares of its tokens.

    Args:
        score, tokens: (batch, leaves); leaves without tokens are `full`, which costs nothing.
    """
    order = score.masked_fill(tokens == 0, -torch.inf).flatten().argsort(descending=True)
    weight = tokens.flatten()[order]
    before = (weight.cumsum(0) - weight / 2) / weight.sum()
    types = before.ge(full).long() + before.ge(min(full + reduced, 1.0)).long()
    types = torch.empty_like(types).scatter_(0, order, types).view(score.shape)
    return types.masked_fill(tokens == 0, BlockType.FULL)


def share_thresholds(score: Tensor, weight: Tensor, full: float, reduced: float) -> Tensor:
    """(2,) scores above which leaves are full, or else reduced, by shares of `weight`."""
    order = score.argsort(descending=True)
    before = (weight[order].cumsum(0) - weight[order] / 2) / weight.sum()
    ranked = score[order]

    def cut(share: float) -> Tensor:
        inside = int((before < share).sum())
        if inside == 0:
            return ranked[0] + 1
        if inside == len(ranked):
            return torch.full_like(ranked[0], -torch.inf)
        return (ranked[inside - 1] + ranked[inside]) / 2

    return torch.stack([cut(full), cut(full + reduced)])


def types_by_threshold(score: Tensor, thresholds: Tensor) -> Tensor:
    """(batch, leaves) int64: full at or above the first threshold, reduced at the second."""
    return score.lt(thresholds[0]).long() + score.lt(thresholds[1]).long()


class _Saliency(torch.autograd.Function):
    """Ones, whose gradient's size the score learns to predict.

    Backwards the score gets the gradient of a Huber loss between itself and the logarithm of the
    factor's gradient, relative to the mean over the sequence's computed leaves.
    """

    @staticmethod
    def forward(ctx, score, observed, tally):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(score, observed)
        ctx.tally = tally
        return torch.ones_like(score)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        score, observed = ctx.saved_tensors
        size = grad.abs() * observed
        count = observed.sum(1, keepdim=True).clamp_min(1)
        mean = size.sum(1, keepdim=True) / count
        target = torch.log(size / mean.clamp_min(1e-30) + 1e-4)
        asked = observed & (mean > 0)
        error = (score - target) * asked
        total = asked.sum().clamp_min(1)
        losses = F.huber_loss(error, torch.zeros_like(error), reduction="sum")
        first = len(Router.TALLIED)
        ctx.tally[first : first + 2] += torch.stack([losses / total, torch.ones_like(losses)])
        return ROUTER_WEIGHT * error.clamp(-1, 1) / total, None, None


class _Attach(torch.autograd.Function):
    """The first input as it is; backwards the second, a loss, counts as part of the total."""

    @staticmethod
    def forward(ctx, x, loss):  # type: ignore[no-untyped-def]
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad, grad.new_ones(())
