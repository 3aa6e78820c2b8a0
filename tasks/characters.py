"""Text as character ids: 0 pads, 1 stands for what the alphabet lacks, 2 ends a text."""

from __future__ import annotations

import numpy as np

PAD, UNKNOWN, END = 0, 1, 2
SPECIAL = 3

PRINTABLE = np.arange(0x20, 0x7F, dtype=np.uint32)


def encode(text: str, alphabet: np.ndarray) -> np.ndarray:
    """Ids of the characters: (length,) uint8.

    Args:
        text: any text.
        alphabet: ascending code points, (n,) uint32, n at most 253; character i has id i + 3.
    """
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    places = np.searchsorted(alphabet, points).clip(max=len(alphabet) - 1)
    return np.where(alphabet[places] == points, places + SPECIAL, UNKNOWN).astype(np.uint8)
