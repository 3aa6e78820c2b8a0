"""Where things that can be made again are kept: downloads, prepared arrays, compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_directory() -> Path:
    """`$FLEXBENCH_CACHE`, else the user's cache directory for flexbench. Not created here."""
    given = os.environ.get("FLEXBENCH_CACHE")
    return Path(given).expanduser() if given else Path(platformdirs.user_cache_dir("flexbench"))
