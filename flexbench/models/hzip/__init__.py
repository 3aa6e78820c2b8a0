"""HZip-Mamba: two readings of a sequence, fused by gates that see context and rate of change."""

from flexbench.models.hzip.mixer import HZipMamba

__all__ = ["HZipMamba"]
