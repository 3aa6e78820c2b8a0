"""The page on adding a task does as it says: its module, in a distribution of its own, runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "add-a-task.md"


@pytest.fixture
def flexbench(tmp_path):
    """Runs flexbench beside an installed distribution that holds the page's module."""
    page = PAGE.read_text(encoding="utf-8")
    (module,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (entry,) = re.findall(r"^ +(parity = .*)$", page, re.MULTILINE)
    site = tmp_path / "site"
    info = site / "my_tasks-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "my_tasks.py").write_text(module, encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-tasks\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[flexbench.tasks]\n" + entry.replace('"', "") + "\n")
    environment = {
        **os.environ,
        "PYTHONPATH": str(site),
        "FLEXBENCH_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "flexbench", *arguments],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_the_task_of_the_page_is_listed_and_run(flexbench):
    assert re.search(r"parity +mine +accuracy, chance 50 %", flexbench("ls", "tasks"))
    table = flexbench(
        "run", "--suite", "mine", "--models", "mamba", "--set", "parity.length=5", "--workers", "0"
    )
    assert re.search(r"parity +chance 50\.0 · best trivial", table)
    assert "synthetic data" in table
