from __future__ import annotations

import importlib
import os
import signal
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import settings

# Without a GPU the Triton kernels run in NumPy. Triton and the kernels read this when imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from flexbench.tasks.base import registry

# Started in the background, a shell has us ignore Ctrl-C, which the tests press.
signal.signal(signal.SIGINT, signal.default_int_handler)

# CI checks the same examples every time; elsewhere every run looks at new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

# Small tensors gain nothing from threads, and lose much where several test processes share cores.
torch.set_num_threads(1)

TOYS = Path(__file__).parent / "toys"


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The toy tasks and mixers, registered while the test lasts; an empty cache of its own."""
    monkeypatch.setenv("FLEXBENCH_CACHE", str(tmp_path / "cache"))
    registry.names()
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.syspath_prepend(TOYS)
    module = importlib.import_module("toys")
    registry.register("toy")(module.Toy)
    registry.register("toy-causal")(module.ToyCausal)
    return module
