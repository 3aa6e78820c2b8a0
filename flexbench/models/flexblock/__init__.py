"""Flexible Block Mamba: blocks found by scoring and merging, computed as a guide map says."""

from flexbench.models.flexblock.guide import BlockType, GuideMap, Packing
from flexbench.models.flexblock.merge import BlockAttributes, build_guide_map
from flexbench.models.flexblock.mixer import FlexBlockMamba
from flexbench.models.flexblock.router import Route, Router, RouterOptions

__all__ = [
    "BlockAttributes",
    "BlockType",
    "FlexBlockMamba",
    "GuideMap",
    "Packing",
    "Route",
    "Router",
    "RouterOptions",
    "build_guide_map",
]
