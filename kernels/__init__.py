"""Numerical operations, each a plain PyTorch reference and its fast backends."""

from flexbench.kernels.conv import causal_conv1d
from flexbench.kernels.fuse import hzip_fuse, hzip_gates
from flexbench.kernels.norm import rms_norm
from flexbench.kernels.scan import selective_scan

__all__ = ["causal_conv1d", "hzip_fuse", "hzip_gates", "rms_norm", "selective_scan"]
