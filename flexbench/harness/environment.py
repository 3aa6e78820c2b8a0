"""What a number was made with."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from pathlib import Path

import torch

import flexbench

_ROOT = Path(flexbench.__file__).resolve().parents[1]


@functools.cache
def environment(device: str) -> dict[str, str]:
    """Versions, commit and machine, as records keep them."""
    return {
        "flexbench": flexbench.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": machine(device),
        "device": device,
    }


@functools.cache
def machine(device: str) -> str:
    """The processor that computes, in words: "AMD EPYC 9254, 8 cores" or the GPU's name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{_processor()}, {cores()} cores"


def cores() -> int:
    """Logical cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The checkout's commit, "+dirty" where files other than results differ; else nothing."""
    if not (_ROOT / ".git").exists():
        return ""
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", ".", ":(exclude)results")
    return f"{commit}+dirty" if commit and changed else commit


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
