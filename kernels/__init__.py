"""Numerical operations, each a plain PyTorch reference and its fast backends."""

from flexbench.kernels.block import block_scan
from flexbench.kernels.conv import causal_conv1d
from flexbench.kernels.fuse import hzip_fuse, hzip_gates
from flexbench.kernels.norm import rms_norm
from flexbench.kernels.rows import gather_runs, scatter_runs
from flexbench.kernels.scan import selective_scan

__all__ = [
    "block_scan",
    "causal_conv1d",
    "gather_runs",
    "hzip_fuse",
    "hzip_gates",
    "rms_norm",
    "scatter_runs",
    "selective_scan",
]
