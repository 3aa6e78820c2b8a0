"""The body that every model shares: encoder, pre-norm residual mixers, pooling, decoder."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexbench import kernels
from flexbench.config import StackConfig
from flexbench.errors import UserError
from flexbench.interface import IGNORED, Batch, ProblemSpec
from flexbench.models.base import MixerConfig, untraced
from flexbench.models.flops import count_flops


@dataclass(frozen=True)
class Layout:
    """Where the real steps of a ragged batch lie.

    Attributes:
        rows, length: the padded batch's shape.
        lengths: (rows,) int64 real steps of each row.
        packed: whether the backbone sees (1, total, d), the rows' real steps one after another, or
            the padded (rows, length, d).
        real: (rows, length, 1) bool, False at padding.
        positions: (total,) int64 indices of the real steps among the rows * length.
        cu_seqlens: (rows + 1,) int32 bounds of the packed rows.
    """

    rows: int
    length: int
    lengths: Tensor
    packed: bool
    real: Tensor
    positions: Tensor
    cu_seqlens: Tensor

    @classmethod
    def of(cls, batch: Batch, packed: bool) -> Layout | None:
        """The batch's layout; None where every row fills the length."""
        rows, length = batch.inputs.shape[:2]
        lengths = batch.lengths
        if lengths is None or bool((lengths == length).all()):
            return None
        steps = torch.arange(length, device=lengths.device)
        real = (steps < lengths[:, None]).unsqueeze(-1)
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
        positions = real.flatten().nonzero().squeeze(1)
        return cls(rows, length, lengths, packed, real, positions, cu_seqlens)

    def pack(self, x: Tensor) -> Tensor:
        """(rows, length, ...) to (1, total, ...), padding left out."""
        return x.flatten(0, 1).index_select(0, self.positions).unsqueeze(0)

    def unpack(self, x: Tensor) -> Tensor:
        """(1, total, d) to (rows, length, d), zeros at padding."""
        padded = x.new_zeros(self.rows * self.length, x.shape[-1])
        return padded.index_copy(0, self.positions, x[0]).view(self.rows, self.length, -1)


class ResidualLayer(nn.Module):
    """x + dropout(mixer(norm(x))).

    Under autocast the residual x stays in float32, and the mixer's input is cast once, here, not by
    each of its products.
    """

    def __init__(self, mixer: nn.Module, stack: StackConfig) -> None:
        super().__init__()
        self.norm = make_norm(stack)
        self.mixer = mixer
        self.dropout = nn.Dropout(stack.dropout)
        taken = inspect.signature(mixer.forward).parameters
        self.takes_cu_seqlens = "cu_seqlens" in taken
        self.takes_lengths = "lengths" in taken

    def forward(self, x: Tensor, layout: Layout | None = None, guide: Any = None) -> Tensor:
        normed = self.norm(x)
        if torch.is_autocast_enabled(x.device.type):
            normed = normed.to(torch.get_autocast_dtype(x.device.type))
        more = {} if guide is None else {"guide": guide}
        if layout is None:
            mixed = self.mixer(normed, **more)
        elif layout.packed:
            mixed = self.mixer(normed, cu_seqlens=layout.cu_seqlens, **more)
        else:
            lengths = {"lengths": layout.lengths} if self.takes_lengths else {}
            mixed = self.mixer(normed * layout.real, **lengths, **more)
        if not isinstance(mixed, Tensor) or mixed.shape != x.shape:
            got = tuple(mixed.shape) if isinstance(mixed, Tensor) else type(mixed).__name__
            raise UserError(
                f"{type(self.mixer).__name__} must return a tensor of its input's shape "
                f"{tuple(x.shape)}, but returned {got}"
            )
        return x + self.dropout(mixed)


class Backbone(nn.Module):
    """`n_layers` residual layers and a last norm: what is compared, and matched in parameters.

    Where the mixer's config builds a router, it sees the embedded input once and every layer gets
    what it returns.
    """

    def __init__(self, stack: StackConfig, mixer: MixerConfig) -> None:
        super().__init__()
        d_model, n_layers = stack.d_model, stack.n_layers
        mixers = [mixer.build(d_model, layer=i, n_layers=n_layers) for i in range(n_layers)]
        self.layers = nn.ModuleList(ResidualLayer(module, stack) for module in mixers)
        self.norm = make_norm(stack)
        self.router = mixer.build_router(d_model)

    @property
    def packs(self) -> bool:
        """Whether every mixer reads packed sequences."""
        return all(layer.takes_cu_seqlens for layer in self.layers)

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """(batch, length, d_model) to the same; (1, total, d_model) where the layout is packed."""
        guide = None
        if self.router is not None:
            guide = self.router(x, cu_seqlens=layout.cu_seqlens if layout else None)
        for layer in self.layers:
            x = layer(x, layout, guide)
        return self.norm(x)


class PairHead(nn.Module):
    """LRA's head for two towers: an MLP on (a, b, a - b, a * b)."""

    def __init__(self, d_model: int, classes: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(4 * d_model, d_model)
        self.output = nn.Linear(d_model, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(2 * examples, d_model), pairs adjacent, to (examples, classes)."""
        a, b = x.unflatten(0, (-1, 2)).unbind(1)
        return self.output(F.relu(self.hidden(torch.cat([a, b, a - b, a * b], dim=-1))))


class SequenceModel(nn.Module):
    """A classifier of sequences or of their steps, for any task and any mixer.

    A ragged batch is packed before the encoder, so that no padding is ever computed, where every
    mixer reads packed sequences; else mixers see the padded batch with zeros at padding. Either
    way the pool and the logits leave padding out.

    Args:
        spec: the task's inputs and outputs.
        stack: width, depth, norm, dropout and pool.
        mixer: the mixer of every layer.
    """

    def __init__(self, spec: ProblemSpec, stack: StackConfig, mixer: MixerConfig) -> None:
        super().__init__()
        if spec.towers not in (1, 2) or (spec.towers == 2 and spec.output == "token"):
            raise ValueError(f"no model for {spec.towers} towers with one label a {spec.output}")
        self.spec, self.stack, self.mixer = spec, stack, mixer
        self.encoder = make_encoder(spec, stack.d_model)
        self.backbone = Backbone(stack, mixer)
        self.decoder: nn.Module
        if spec.towers == 2:
            self.decoder = PairHead(stack.d_model, spec.classes)
        else:
            self.decoder = nn.Linear(stack.d_model, spec.classes)
        for module in self.decoder.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, batch: Batch) -> Tensor:
        """Logits (examples, classes), or (examples, length, classes) for one label a token."""
        return self.decoder(self._features(batch))

    def answers(self, batch: Batch) -> Tensor:
        """Logits (asked, classes) where the labels ask something, in their order: with one label a
        token no others are computed, which a large vocabulary would make dear.
        """
        features = self._features(batch)
        if self.spec.output == "token":
            asked = (batch.labels.flatten() != IGNORED).nonzero().squeeze(1)
            features = features.flatten(0, 1).index_select(0, asked)
        return self.decoder(features)

    def _features(self, batch: Batch) -> Tensor:
        """What the decoder reads: (rows, d_model), or (rows, length, d_model)."""
        layout = None
        if batch.lengths is not None:
            layout = untraced(Layout.of)(batch, self.backbone.packs)
        packing = layout if layout is not None and layout.packed else None
        x = self.encoder(packing.pack(batch.inputs) if packing else batch.inputs)
        x = self.backbone(x.to(torch.promote_types(x.dtype, torch.float32)), layout)
        if packing:
            x = packing.unpack(x)
        if self.spec.output == "sequence":
            x = pool(x, layout, self.stack.pool)
        return x

    def backbone_parameters(self) -> int:
        """Number of parameters between the encoder and the decoder."""
        return sum(parameter.numel() for parameter in self.backbone.parameters())

    def state_size(self) -> int | None:
        """Floats of recurrent state carried from step to step, all layers; None: unknown."""
        size = self.mixer.state_size(self.stack.d_model)
        return None if size is None else size * self.stack.n_layers

    def flops_per_token(self, length: int, example: Batch | None = None) -> float:
        """Floating-point operations of a forward pass by `length` real steps, for each step.

        Matrix products, convolutions and attention by `torch.utils.flop_counter`, and the kernels
        of flexbench; a multiplication and an addition are two. Elementwise work is left out. Where
        the work depends on the data, it is counted on `example`, if given, instead.
        """
        rows = self.spec.towers
        if self.spec.input == "tokens":
            inputs = torch.zeros(rows, length, dtype=torch.int64)
        else:
            inputs = torch.zeros(rows, length, self.spec.channels)
        batch = Batch(inputs, torch.zeros(1, dtype=torch.int64))
        try:
            with torch.device("meta"):
                model = SequenceModel(self.spec, self.stack, self.mixer)
            return count_flops(model, batch.to("meta")) / (rows * length)
        except Exception:  # it does not run without data
            example = example or batch
            device = next(self.parameters()).device
            with torch.random.fork_rng():
                return count_flops(deepcopy(self).eval(), example.to(device)) / example.tokens

    def after_step(self, progress: float, loss: float) -> None:
        """Tell whoever asks how far the training has come, in [0, 1], and the step's mean loss."""
        for module in self._having("after_step"):
            module.after_step(progress, loss)

    @property
    def settled(self) -> bool:
        """Whether every mixer and router does by now what its options ask for."""
        return all(getattr(module, "settled", True) for module in self.backbone.modules())

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Let whoever asks set what it needs for evaluation by passes over training data."""
        asking = self._having("begin_calibration")
        if not asking:
            return
        for module in asking:
            module.begin_calibration()
        for batch in batches:
            self(batch)
        for module in asking:
            module.end_calibration()

    def diagnostics(self) -> dict[str, float]:
        """What mixers and routers report in `diagnostics()`, averaged over those that report it."""
        reports = [module.diagnostics() for module in self._having("diagnostics")]
        found: dict[str, list[float]] = {}
        for report in reports:
            for key, value in report.items():
                found.setdefault(key, []).append(value)
        return {key: sum(values) / len(values) for key, values in found.items()}

    def _having(self, method: str) -> list[Any]:
        """The modules of the backbone that have a method of that name."""
        return [m for m in self.backbone.modules() if callable(getattr(m, method, None))]


class RMSNorm(nn.RMSNorm):
    """torch's module on flexbench's kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps or 0.0)


def make_norm(stack: StackConfig) -> nn.Module:
    kind = RMSNorm if stack.norm == "rms" else nn.LayerNorm
    return kind(stack.d_model, eps=1e-5)


def make_encoder(spec: ProblemSpec, d_model: int) -> nn.Module:
    """An embedding for tokens, a linear map for values.

    The linear map keeps its random bias: the pre-norm of a multiple of one vector knows only its
    sign, so without the bias a single channel's magnitude would be lost.
    """
    if spec.input == "values":
        return nn.Linear(spec.channels, d_model)
    embedding = nn.Embedding(spec.vocab_size, d_model)
    nn.init.normal_(embedding.weight, std=0.02)
    return embedding


def pool(x: Tensor, layout: Layout | None, kind: str) -> Tensor:
    """(rows, length, d) to (rows, d), over the real steps."""
    if kind == "mean":
        if layout is None:
            return x.mean(1)
        return (x * layout.real).sum(1) / layout.lengths[:, None]
    if kind == "max":
        return (x if layout is None else x.masked_fill(~layout.real, -torch.inf)).amax(1)
    if layout is None:
        return x[:, -1]
    return x[torch.arange(len(x), device=x.device), layout.lengths - 1]
