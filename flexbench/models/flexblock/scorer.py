"""Step 2: convolutions over the whole sequence, pooled by leaf, to the leaves' attributes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexbench.models.flexblock.merge import BlockAttributes, unit

CONVOLUTIONS = ((3, 1), (5, 1), (3, 4))
"""Width and dilation of the depthwise convolutions, each with as many channels as `features`."""

SMALLEST_SHARE = 0.01
"""How far one batch moves a running statistic, once enough have been seen."""


class Scorer(nn.Module):
    """Attributes of every leaf of `l0` tokens, each from its own tokens and their neighbours.

    The input is normalised, projected to `features` channels, and goes through depthwise
    convolutions of several widths and dilations and a ReLU; per leaf their mean, maximum and
    deviation over its real tokens feed a small MLP. Summaries lose their running mean over training
    before they are normalised, since raw ones all point the same way; homogeneity is computed, not
    learned: 1 minus the features' variance within the leaf over their running variance. Both
    running statistics are frozen at evaluation.
    """

    running_mean: Tensor
    running_variance: Tensor
    batches: Tensor

    def __init__(self, d_model: int, l0: int, features: int = 16, summary: int = 16) -> None:
        super().__init__()
        self.l0 = l0
        self.sizes = (summary, 1, 1, 3)
        self.project = nn.Linear(d_model, features, bias=False)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(
                features,
                features,
                width,
                padding=width // 2 * dilation,
                dilation=dilation,
                groups=features,
            )
            for width, dilation in CONVOLUTIONS
        )
        pooled = len(CONVOLUTIONS) * features
        self.hidden = nn.Linear(3 * pooled, 2 * features)
        self.output = nn.Linear(2 * features, sum(self.sizes))
        self.register_buffer("running_mean", torch.zeros(summary))
        self.register_buffer("running_variance", torch.ones(pooled))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, lengths: Tensor) -> BlockAttributes:
        """Score the leaves; no gradient reaches x, and autocast does not reach in here.

        Args:
            x: (batch, length, d_model), right-padded.
            lengths: (batch,) int64 real tokens, at least 1.
        """
        with torch.autocast(x.device.type, enabled=False):  # a threshold needs every bit
            return self._score(x.detach().to(self.project.weight.dtype), lengths)

    def _score(self, x: Tensor, lengths: Tensor) -> BlockAttributes:
        _, length, d_model = x.shape
        leaves = -(-length // self.l0)
        begins = torch.arange(leaves, device=x.device) * self.l0
        tokens = (lengths[:, None] - begins).clamp(0, self.l0)[:, None]  # (batch, 1, leaves)
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / math.sqrt(d_model)
        x = self.project(x) / (size + 1e-6)
        x = F.pad(x.transpose(1, 2), (0, leaves * self.l0 - length))
        real = None
        if int(lengths.min()) < leaves * self.l0:
            real = (torch.arange(x.shape[2], device=x.device) < lengths[:, None])[:, None]
            x = x * real
        x = torch.cat([conv(x) for conv in self.convolutions], 1).relu_()
        if real is not None:  # zeros change neither sums nor, after a ReLU, maxima
            x = x * real
        count = tokens.clamp_min(1)
        mean = F.avg_pool1d(x, self.l0) * (self.l0 / count)
        square = (
            torch.linalg.vector_norm(x.unflatten(2, (leaves, self.l0)), dim=-1).square() / count
        )
        variance = (square - mean.square()).clamp_min(0)
        highest = F.max_pool1d(x, self.l0)
        pooled = torch.cat([mean, highest, (variance + 1e-6).sqrt()], 1).transpose(1, 2)
        raw = self.output(F.gelu(self.hidden(pooled)))
        summary, reverse, bidirectional, logits = raw.split(self.sizes, dim=-1)
        if self.training:
            self._track(summary, mean, square, tokens)
        spread = (variance / self.running_variance[:, None]).mean(1)
        return BlockAttributes(
            summary=unit(summary - self.running_mean),
            homogeneity=(1 - spread).clamp(0, 1).detach(),
            reverse=reverse.squeeze(-1).sigmoid(),
            type_logits=logits,
            bidirectional=bidirectional.squeeze(-1).sigmoid(),
        )

    @torch.no_grad()
    def _track(self, summary: Tensor, mean: Tensor, square: Tensor, tokens: Tensor) -> None:
        """Move the running statistics towards those of a batch, given those of its leaves."""
        self.batches += 1
        share = 1 / self.batches.clamp(max=round(1 / SMALLEST_SHARE))
        weight = tokens / tokens.sum()
        mean, square = ((x * weight).sum((0, 2)) for x in (mean, square))
        real = (tokens[:, 0] > 0)[..., None]
        self.running_mean.lerp_((summary * real).sum((0, 1)) / real.sum(), share)
        self.running_variance.lerp_((square - mean.square()).clamp_min(1e-6), share)
