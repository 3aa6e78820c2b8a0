"""`python -m flexbench`."""

from __future__ import annotations

import sys
from pathlib import Path


def leave_checkout() -> None:
    """Take the working directory off `sys.path` where it is our own checkout.

    `python -m` puts it first, and `import kernels` would find ours there in place of the published
    package of that name, which other libraries probe for. What the user put on the path stays.
    """
    root = Path(__file__).resolve().parents[1]
    if getattr(sys.flags, "safe_path", False) or not sys.path or not (root / "kernels").is_dir():
        return
    if Path(sys.path[0]).resolve() != root:
        return
    del sys.path[0]
    if not any(_finds_us(finder) for finder in sys.meta_path):
        sys.path.append(str(root))  # not installed: our own child processes must find us


def _finds_us(finder: object) -> bool:
    find_spec = getattr(finder, "find_spec", None)
    return find_spec is not None and find_spec("flexbench", None) is not None


if __name__ == "__main__":
    leave_checkout()
    from flexbench.cli import main

    sys.exit(main())
