"""flexbench: the lab bench for Mamba variants."""

__version__ = "0.1.0"
