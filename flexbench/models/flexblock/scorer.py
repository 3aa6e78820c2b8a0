"""Step 2: convolutions over the whole sequence, pooled by leaf, to the leaves' attributes."""

from __future__ import annotations

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
    convolutions of several widths and dilations; per leaf their mean, maximum and deviation over
    its real tokens feed a small MLP. Summaries lose their running mean over training before they
    are normalised, since raw ones all point the same way; homogeneity is computed, not learned:
    1 minus the features' variance within the leaf over their running variance. Both running
    statistics are frozen at evaluation.
    """

    running_mean: Tensor
    running_variance: Tensor
    batches: Tensor

    def __init__(self, d_model: int, l0: int, features: int = 24, summary: int = 16) -> None:
        super().__init__()
        self.l0 = l0
        self.sizes = (summary, 1, 1, 3)
        self.project = nn.Linear(d_model, features)
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
        """Score the leaves; no gradient reaches x.

        Args:
            x: (batch, length, d_model), right-padded.
            lengths: (batch,) int64 real tokens, at least 1.
        """
        batch, length, _ = x.shape
        leaves = -(-length // self.l0)
        x = x.detach()
        x = F.rms_norm(x, x.shape[-1:], eps=1e-5)
        x = F.pad(self.project(x), (0, 0, 0, leaves * self.l0 - length))
        real = torch.arange(leaves * self.l0, device=x.device) < lengths[:, None]
        x = (x * real[..., None]).transpose(1, 2)
        convolved = torch.cat([F.gelu(conv(x)) for conv in self.convolutions], 1)
        tokens = convolved.unflatten(2, (leaves, self.l0))  # (batch, channels, leaves, l0)
        mask = real.view(batch, 1, leaves, self.l0)
        count = mask.sum(-1).clamp_min(1)
        mean = (tokens * mask).sum(-1) / count
        variance = ((tokens - mean[..., None]) * mask).square().sum(-1) / count
        highest = tokens.masked_fill(~mask, -torch.inf).amax(-1)
        highest = torch.where(mask.any(-1), highest, 0.0)
        pooled = torch.cat([mean, highest, (variance + 1e-6).sqrt()], 1).transpose(1, 2)
        raw = self.output(F.gelu(self.hidden(pooled)))
        summary, reverse, bidirectional, logits = raw.split(self.sizes, dim=-1)
        if self.training:
            self._track(summary[mask.any(-1)[:, 0]], tokens, mask)
        spread = (variance / self.running_variance[:, None]).mean(1)
        return BlockAttributes(
            summary=unit(summary - self.running_mean),
            homogeneity=(1 - spread).clamp(0, 1).detach(),
            reverse=reverse.squeeze(-1).sigmoid(),
            type_logits=logits,
            bidirectional=bidirectional.squeeze(-1).sigmoid(),
        )

    @torch.no_grad()
    def _track(self, summaries: Tensor, tokens: Tensor, mask: Tensor) -> None:
        self.batches += 1
        share = 1 / self.batches.clamp(max=round(1 / SMALLEST_SHARE))
        total = mask.sum()
        mean = (tokens * mask).sum((0, 2, 3)) / total
        variance = (tokens.square() * mask).sum((0, 2, 3)) / total - mean.square()
        self.running_mean.lerp_(summaries.mean(0), share)
        self.running_variance.lerp_(variance.clamp_min(1e-6), share)
