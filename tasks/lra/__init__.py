"""The Long Range Arena (Tay et al., arXiv 2011.04006)."""

PUBLISHED_SOURCE = "arXiv 2505.09022, table 3; Transformer: google-research/long-range-arena"
