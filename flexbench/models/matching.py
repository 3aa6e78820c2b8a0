"""Equal parameters: solve a mixer's inner width so that comparisons are fair."""

from __future__ import annotations

import functools

import torch

from flexbench.config import StackConfig
from flexbench.errors import UserError
from flexbench.models.base import MixerConfig
from flexbench.models.stack import Backbone

TOLERANCE = 0.02
"""Largest relative difference at which two backbones count as matched."""


@functools.lru_cache(maxsize=4096)
def backbone_parameters(mixer: MixerConfig, stack: StackConfig) -> int:
    """Parameters of the backbone: embedding and head left out, counted on paper if it can be."""
    try:
        with torch.device("meta"):
            backbone = Backbone(stack, mixer)
    except UserError:
        # A mixer of the user's own may need real tensors to initialise itself.
        with torch.random.fork_rng():
            backbone = Backbone(stack, mixer)
    return sum(parameter.numel() for parameter in backbone.parameters())


def is_matched(parameters: int, target: int) -> bool:
    """Whether a backbone's size is within `TOLERANCE` of the target."""
    return abs(parameters - target) <= TOLERANCE * target


def match_width(mixer: MixerConfig, stack: StackConfig, target: int) -> MixerConfig:
    """The mixer with the inner width whose backbone is nearest to `target` parameters.

    A mixer without an inner width, or with one set by hand, comes back as it is. Nearest need not
    be near: ask `is_matched`.
    """
    if not mixer.has_width or mixer.d_inner is not None:
        return mixer

    def parameters(width: int) -> int:
        return backbone_parameters(mixer.override({"d_inner": width}), stack)

    high = 1
    while parameters(high) < target:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if parameters(middle) < target else (low, middle)
    candidates = (low, high) if low else (high,)
    nearest = min(candidates, key=lambda width: abs(parameters(width) - target))
    return mixer.override({"d_inner": nearest})
