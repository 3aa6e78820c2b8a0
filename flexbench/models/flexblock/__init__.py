"""Flexible Block Mamba: blocks found by scoring and merging, computed as a guide map says."""

from flexbench.models.flexblock.guide import BlockType, GuideMap, Packing
from flexbench.models.flexblock.merge import BlockAttributes, build_guide_map

__all__ = ["BlockAttributes", "BlockType", "GuideMap", "Packing", "build_guide_map"]
