"""Made-up problems that ask for one skill each: recall, selection, counting on one's state.

Where a label is asked for, the answer never stands in the input after its question, so that a model
which sees the future cannot read it there.
"""

from __future__ import annotations

import numpy as np


def distinct(rng: np.random.Generator, rows: int, count: int, size: int) -> np.ndarray:
    """Draws below `size` without replacement, in random order: (rows, count) int64.

    Floyd's algorithm (Bentley & Floyd 1987), all rows at once.
    """
    drawn = np.empty((rows, count), dtype=np.int64)
    for place, top in enumerate(range(size - count, size)):
        draw = rng.integers(0, top + 1, rows)
        taken = (drawn[:, :place] == draw[:, None]).any(1)
        drawn[:, place] = np.where(taken, top, draw)
    return rng.permuted(drawn, axis=1)
