"""Whatever interrupts a trial or a sweep, what comes out is what would have come out anyway."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch

from flexbench.harness import Notice, plan, run, trial
from flexbench.harness.executor import Inline
from flexbench.harness.trial import train_trial
from flexbench.records import Record, TrialConfig, scan
from flexbench.tasks.store import Store

ROOT = Path(__file__).parents[1]


class Crash(BaseException):
    """Ends a trial as abruptly as a test in the same process can."""


def configure(model: str = "toys:Mixer", **changes: Any) -> TrialConfig:
    overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    return plan("toy", models=[model], overrides=overrides).cells[0].grid[0]


def outcome(config: TrialConfig, results: Path) -> dict[str, Any]:
    """All that must not depend on interruptions."""
    directory = config.directory(results)
    record = json.loads((directory / "record.json").read_text())
    weights = torch.load(directory / "best.pt", weights_only=True)
    return {
        "metrics": record["metrics"],
        "history": (directory / "history.jsonl").read_text(),
        "answers": (directory / "correct.npy").read_bytes(),
        "weights": {name: value.tolist() for name, value in weights.items()},
        "files": sorted(path.name for path in directory.iterdir()),
    }


def interrupt_at(
    toys: ModuleType, monkeypatch: pytest.MonkeyPatch, calls: set[int], act: Callable[[], None]
) -> None:
    """Act when the data of any split are asked for the n-th time, for n in `calls`."""
    counter = itertools.count()
    batch = toys.Rows.batch

    def counted(self: Any, indices: Any) -> Any:
        if next(counter) in calls:
            act()
        return batch(self, indices)

    monkeypatch.setattr(toys.Rows, "batch", counted)


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def crash() -> None:
    raise Crash


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("act", [press_ctrl_c, crash])
@pytest.mark.parametrize("model", ["toys:Mixer", "flexblock"])
def test_interrupted_trial_ends_with_the_same_bits(
    toys: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    seed: int,
    act: Callable[[], None],
    model: str,
) -> None:
    options = {"training.evaluation_batch_size": 7, "training.evaluations": 3}
    if model == "flexblock":  # its router has a schedule, running statistics and thresholds
        options |= {"flexblock.l0": 2, "flexblock.merge_threshold": 0.0}
    config = configure(model, **options)
    train_trial(config, tmp_path / "whole", Store())

    chance = random.Random(seed)
    monkeypatch.setattr(trial, "CHECKPOINT_SECONDS", chance.choice([0.0, 0.02, 100.0]))
    interrupt_at(toys, monkeypatch, {chance.randrange(10 + 30 * i) for i in range(5)}, act)
    sittings = 0
    while True:
        sittings += 1
        assert sittings < 10
        try:
            record = train_trial(config, tmp_path / "pieces", Store())
        except (KeyboardInterrupt, Crash) as stopped:
            directory = config.directory(tmp_path / "pieces")
            assert not (directory / "record.json").exists()
            if isinstance(stopped, KeyboardInterrupt):
                assert (directory / "checkpoint.pt").exists()
        else:
            break
    assert sittings > 1
    assert record.outcome == "finished"
    assert outcome(config, tmp_path / "pieces") == outcome(config, tmp_path / "whole")


@pytest.mark.parametrize("damage", ["truncate", "garbage", "empty", "foreign", "misfit", "pickle"])
def test_unusable_checkpoint_starts_the_trial_again(
    toys: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: str
) -> None:
    config = configure()
    train_trial(config, tmp_path / "whole", Store())
    with monkeypatch.context() as patch:
        interrupt_at(toys, patch, {30}, press_ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            train_trial(config, tmp_path / "pieces", Store())

    path = config.directory(tmp_path / "pieces") / "checkpoint.pt"
    good = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(good[: len(good) // 2])
    elif damage == "garbage":
        path.write_bytes(b"not a checkpoint")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "pickle":
        torch.save({"schema": 2, "key": config.hash, "state": press_ctrl_c}, path)
    else:
        found = torch.load(path, weights_only=True)
        found["key"] = "another" if damage == "foreign" else found["key"]
        found["state"]["model"].popitem()
        torch.save(found, path)

    notices: list[str] = []
    record = train_trial(
        config,
        tmp_path / "pieces",
        Store(),
        lambda event: notices.append(event.text) if isinstance(event, Notice) else None,
    )
    assert record.outcome == "finished"
    assert len(notices) == 1
    assert "starts again" in notices[0]
    assert "\n" not in notices[0]
    assert outcome(config, tmp_path / "pieces") == outcome(config, tmp_path / "whole")


def test_record_that_cannot_be_read_is_made_again(toys: ModuleType, tmp_path: Path) -> None:
    config = configure()
    first = train_trial(config, tmp_path, Store())
    (config.directory(tmp_path) / "record.json").write_text('{"hash": "12')
    notices: list[Any] = []
    second = train_trial(config, tmp_path, Store(), notices.append)
    assert second.metrics == first.metrics
    assert any(isinstance(event, Notice) for event in notices)


def start_sweep(results: Path, *overrides: str) -> subprocess.Popen[str]:
    """The toy sweep in a process of its own."""
    toys = Path(__file__).parent / "toys"
    return subprocess.Popen(
        [sys.executable, str(toys / "toy_sweep.py"), str(results), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{toys}{os.pathsep}{ROOT}"},
    )


def metrics(results: Path) -> dict[str, Any]:
    skipped: list[str] = []
    found = {record.hash: record.metrics for record in scan(results, Record, skipped)}
    assert not skipped
    return found


def test_sweep_survives_kill_9(toys: ModuleType, tmp_path: Path) -> None:
    overrides = ["toy.delay=0.02"]
    chosen = plan("toy", models=["toys:Mixer", "toys:Seer"], seeds=2, overrides=overrides)
    run(
        chosen,
        results=tmp_path / "whole",
        store=Store(),
        executor=Inline(),
        measure_speed=False,
    )
    chance = random.Random(5)
    for _ in range(2):
        sweep = start_sweep(tmp_path / "killed", *overrides)
        assert sweep.stdout is not None
        if not sweep.stdout.readline():
            break  # all was done
        time.sleep(chance.uniform(0.0, 0.8))
        family = [psutil.Process(sweep.pid), *psutil.Process(sweep.pid).children(recursive=True)]
        sweep.kill()
        sweep.communicate()
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive
    sweep = start_sweep(tmp_path / "killed", *overrides)
    _, errors = sweep.communicate()
    assert sweep.returncode == 0, errors
    assert len(metrics(tmp_path / "whole")) == 4
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


def test_ctrl_c_ends_the_workers_and_leaves_checkpoints(toys: ModuleType, tmp_path: Path) -> None:
    sweep = start_sweep(tmp_path, "toy.delay=0.05", "training.steps=1000")
    assert sweep.stdout is not None
    assert sweep.stdout.readline().startswith("Progress")
    family = psutil.Process(sweep.pid).children(recursive=True)
    sweep.send_signal(signal.SIGINT)
    _, errors = sweep.communicate()
    assert sweep.returncode != 0
    assert errors.count("Traceback") == 1
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    assert list(tmp_path.glob("runs/**/checkpoint.pt"))
    assert not list(tmp_path.glob("runs/**/record.json"))


def test_two_invocations_share_a_sweep(
    toys: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("TOY_LOG", str(log))
    sweeps = [start_sweep(tmp_path / "results", "toy.delay=0.02") for _ in range(2)]
    outputs = [sweep.communicate() for sweep in sweeps]
    assert [sweep.returncode for sweep in sweeps] == [0, 0], outputs
    done = [
        {line.split()[1] for line in output.splitlines() if line.startswith("Done")}
        for output, _ in outputs
    ]
    assert done[0] == done[1] == set(metrics(tmp_path / "results"))
    assert len(done[0]) == 4
    assert len(log.read_text().splitlines()) == 4
