"""What the harness promises: one order of data, one budget, selection on validation alone."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from flexbench.config import TrainingConfig
from flexbench.errors import UserError
from flexbench.harness import Cell, Done, Plan, SweepResult, plan, run
from flexbench.harness.executor import Inline
from flexbench.harness.speed import SpeedFailed, measure
from flexbench.harness.sweep import MODELS
from flexbench.harness.trial import Order, evaluation_steps, make_optimizer, schedule, train_trial
from flexbench.records import (
    Absence,
    CannotWrite,
    Record,
    Selection,
    SpeedRecord,
    TaskRecord,
    scan,
    write_json,
)
from flexbench.report.results import collect
from flexbench.tasks.store import Store


def planned(*overrides: str, **options: Any) -> Plan:
    chosen: dict[str, Any] = {"models": ["toys:Mixer"], **options}
    return plan("toy", overrides=overrides, **chosen)


def sweep(results: Path, chosen: Plan, events: list[Any] | None = None) -> SweepResult:
    observe = (events if events is not None else []).append
    return run(
        chosen,
        results=results,
        store=Store(),
        executor=Inline(),
        observe=observe,
        measure_speed=False,
    )


# -- the order of the data, the schedule, the optimiser ---------------------------------------


@given(
    examples=st.integers(1, 50),
    batch_size=st.integers(1, 60),
    seed=st.integers(0, 5),
    step=st.integers(0, 40),
)
def test_order_is_a_function_of_seed_and_step(
    examples: int, batch_size: int, seed: int, step: int
) -> None:
    order = Order(examples, batch_size, seed)
    steps = [order[each] for each in range(step + 1)]
    np.testing.assert_array_equal(Order(examples, batch_size, seed)[step], steps[step])
    size = min(batch_size, examples)
    a_round = examples // size
    for start in range(0, step + 1 - a_round, a_round):
        epoch = np.concatenate(steps[start : start + a_round])
        assert len(set(epoch.tolist())) == a_round * size
        assert epoch.min() >= 0
        assert epoch.max() < examples


def test_epochs_and_seeds_differ() -> None:
    order = Order(64, 64, 0)
    assert order[0].tolist() != order[1].tolist()
    assert order[0].tolist() != Order(64, 64, 1)[0].tolist()


def test_two_models_read_the_same_examples(
    toys: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read: list[tuple[int, list[int]]] = []
    batch = toys.Rows.batch

    def logged(self: Any, indices: Any) -> Any:
        read.append((self.split, indices.tolist()))
        return batch(self, indices)

    monkeypatch.setattr(toys.Rows, "batch", logged)
    orders = []
    for model in ("toys:Mixer", "toys:Seer"):
        read.clear()
        train_trial(planned(models=[model]).cells[0].grid[0], tmp_path, Store())
        orders.append(list(read))
    assert orders[0] == orders[1]
    assert sum(split == 0 for split, _ in orders[0]) == 40


@given(steps=st.integers(1, 500), evaluations=st.integers(1, 50))
def test_evaluations_are_evenly_spaced(steps: int, evaluations: int) -> None:
    points = sorted(evaluation_steps(TrainingConfig(steps=steps, evaluations=evaluations)))
    assert len(points) == min(steps, evaluations)
    assert points[-1] == steps
    gaps = np.diff([0, *points])
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1 + (steps % len(points) != 0)


@given(steps=st.integers(1, 300), warmup=st.floats(0, 1))
def test_schedule_rises_then_falls(steps: int, warmup: float) -> None:
    training = TrainingConfig(steps=steps, warmup=warmup)
    rates = [schedule(step, training) for step in range(steps)]
    peak = int(np.argmax(rates))
    assert rates[peak] == pytest.approx(1.0)
    assert all(a < b for a, b in pairwise(rates[: peak + 1]))
    assert all(a >= b for a, b in pairwise(rates[peak:]))
    assert min(rates) > 0 or rates[-1] == pytest.approx(0.0, abs=1e-9)


def test_optimizer_heeds_the_marks() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    marked: Any = model[2].weight
    marked._no_weight_decay = marked._ssm = True
    training = TrainingConfig(weight_decay=0.1, ssm_learning_rate=1e-3)
    rules = {
        id(parameter): (group["peak"], group["weight_decay"])
        for group in make_optimizer(model, training, 1e-2).param_groups
        for parameter in group["params"]
    }
    assert rules[id(model[0].weight)] == (1e-2, 0.1)
    assert rules[id(model[0].bias)] == (1e-2, 0.0)
    assert rules[id(model[1].weight)] == (1e-2, 0.0)
    assert rules[id(marked)] == (1e-3, 0.0)
    assert len(rules) == len(list(model.parameters()))


# -- selection ---------------------------------------------------------------------------------


def test_selection_never_sees_the_test_set(toys: ModuleType, tmp_path: Path) -> None:
    """With test labels turned round, the best on validation is the worst on test."""
    chosen = planned("toy.flip_test=true", "training.steps=60", preset="small", seeds=2)
    (cell,) = sweep(tmp_path, chosen).cells
    skipped: list[str] = []
    grid = {
        record.config.learning_rate: record.metrics or {}
        for record in scan(tmp_path, Record, skipped)
        if record.config.seed == 0
    }
    assert len(grid) == 2
    validation = {rate: metrics["validation_accuracy"] for rate, metrics in grid.items()}
    test = {rate: metrics["test_accuracy"] for rate, metrics in grid.items()}
    best = max(validation, key=lambda rate: validation[rate])
    assert best != max(test, key=lambda rate: test[rate])
    assert cell.selection is not None
    assert cell.selection.learning_rate == best
    assert [record.config.learning_rate for record in cell.records] == [best, best]
    assert [record.config.seed for record in cell.records] == [0, 1]
    assert list(scan(tmp_path, Selection, skipped)) == [cell.selection]
    assert not skipped


def test_best_weights_are_the_best_on_validation(
    toys: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read: list[int] = []
    batch = toys.Rows.batch

    def logged(self: Any, indices: Any) -> Any:
        read.append(self.split)
        return batch(self, indices)

    monkeypatch.setattr(toys.Rows, "batch", logged)
    config = planned("training.evaluations=8", "training.learning_rates=[0.3]").cells[0].grid[0]
    record = train_trial(config, tmp_path, Store())
    assert 2 not in read[: read.index(2)]
    assert set(read[read.index(2) :]) == {2}, "after the test set nothing else is read"
    assert read.count(2) == 1

    directory = config.directory(tmp_path)
    history = [json.loads(line) for line in (directory / "history.jsonl").open()]
    assert [entry["step"] for entry in history] == [5, 10, 15, 20, 25, 30, 35, 40]
    best = max(history, key=lambda entry: (entry["validation_accuracy"], -entry["validation_loss"]))
    assert record.metrics is not None
    assert record.metrics["best_step"] == best["step"]
    assert record.metrics["validation_accuracy"] == best["validation_accuracy"]
    answers = np.unpackbits(np.load(directory / "correct.npy"), count=64)
    assert answers.mean() == record.metrics["test_accuracy"]
    weights = torch.load(directory / "best.pt", weights_only=True)
    assert all(value.isfinite().all() for value in weights.values())
    assert not (directory / "checkpoint.pt").exists()


def test_a_checkpoint_from_before_a_schedule_has_settled_is_kept_only_if_there_is_no_other(
    toys: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def after_step(self: Any, progress: float, loss: float) -> None:
        self.settled = progress > settles_after

    monkeypatch.setattr(toys.Mixer, "after_step", after_step, raising=False)
    config = planned("training.evaluations=8").cells[0].grid[0]
    for settles_after, steps in ((0.9, {40}), (1.0, set(range(5, 41, 5)))):
        record = train_trial(config, tmp_path / str(settles_after), Store())
        assert record.metrics is not None
        history = (config.directory(tmp_path / str(settles_after)) / "history.jsonl").open()
        entries = [json.loads(line) for line in history]
        among = [entry for entry in entries if entry["step"] in steps]
        assert {entry["settled"] for entry in among} == {settles_after < 1}
        assert record.metrics["validation_accuracy"] == max(
            entry["validation_accuracy"] for entry in among
        )


# -- plans -------------------------------------------------------------------------------------


def test_nothing_is_trained_twice(toys: ModuleType, tmp_path: Path) -> None:
    first = sweep(tmp_path, planned(seeds=2))
    events: list[Any] = []
    second = sweep(tmp_path, planned(seeds=3, preset="quick"), events)
    done = {event.trial.seed: event.cached for event in events if isinstance(event, Done)}
    assert done == {0: True, 1: True, 2: False}
    assert second.cells[0].records[:2] == first.cells[0].records


def test_a_record_from_before_an_option_was_added_is_found(
    toys: ModuleType, tmp_path: Path
) -> None:
    (cell,) = sweep(tmp_path, planned()).cells
    (record,) = cell.records
    assert cell.selection is not None
    options = {k: v for k, v in record.config.task_options.items() if k != "flip_test"}
    config = record.config.model_copy(update={"task_options": options})
    older = record.model_copy(update={"config": config, "hash": config.hash})
    record.config.directory(tmp_path).rename(config.directory(tmp_path))
    write_json(config.directory(tmp_path) / "record.json", older)
    cell.selection.path(tmp_path).unlink()

    events: list[Any] = []
    (again,) = sweep(tmp_path, planned(), events).cells
    assert [event.cached for event in events if isinstance(event, Done)] == [True]
    assert again.records == (older,)
    assert again.selection is not None
    assert again.selection.trials == {"0": older.hash}
    (suite,), skipped = collect(tmp_path)
    assert [row.trials for row in suite.rows] == [(older,)]
    assert suite.rows[0].facts is not None
    assert not skipped

    (other,) = sweep(tmp_path, planned("toy.flip_test=true")).cells
    assert other.records[0].hash != older.hash


def test_grid_does_not_change_the_hash_but_all_else_does(toys: ModuleType) -> None:
    base = planned().cells[0].grid[0]
    wider = planned("training.learning_rates=[0.01, 0.1]").cells[0].grid
    assert [trial.hash == base.hash for trial in wider] == [True, False]
    assert {trial.cell for trial in wider} == {base.cell}
    for override in ("training.steps=41", "stack.d_model=9", "toy.length=9", "model.d_inner=3"):
        assert planned(override).cells[0].grid[0].hash != base.hash
    assert planned(threads=2).cells[0].grid[0].hash != base.hash


def test_widths_are_matched_and_overrides_apply(toys: ModuleType, tmp_path: Path) -> None:
    chosen = planned("stack.d_model=16", "training.steps=3", "task.length=5", models=None)
    assert [cell.model for cell in chosen.cells] == list(MODELS)
    for cell in chosen.cells:
        (trial,) = cell.grid
        assert trial.stack.d_model == 16
        assert trial.training.steps == 3
        assert trial.task_options["length"] == 5
    widths = {cell.model: cell.grid[0].model_options["d_inner"] for cell in chosen.cells}
    assert widths["mamba"] == widths["alternating"] == 32
    assert widths["bimamba"] < 20
    (record,) = sweep(tmp_path, planned()).cells[0].records
    assert record.model_facts["matched"] is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "quik"}, "quick"),
        ({"tasks": ["toyy"]}, "toy"),
        ({"models": ["mambo"]}, "mamba"),
        ({"overrides": ["trainng.steps=3"]}, "training.steps"),
        ({"overrides": ["steps=3"]}, "training.steps"),
        ({"overrides": ["training.step=3"]}, "steps"),
        ({"overrides": ["toy.lenght=3"]}, "length"),
        ({"overrides": ["toy.length=long"]}, "toy.length"),
        ({"overrides": ["training.steps=-1"]}, "training.steps"),
        ({"overrides": ["training.steps"]}, "key=value"),
        ({"overrides": ["mamba.d_stat=3"], "models": ["mamba"]}, "d_state"),
        ({"seeds": 0}, "seeds"),
        ({"threads": 0}, "threads"),
        ({"device": "gpu"}, "device"),
    ],
)
def test_bad_input_is_one_sentence(toys: ModuleType, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        plan("toy", **options)
    assert "\n" not in str(caught.value)


def test_unknown_suite_is_named(toys: ModuleType) -> None:
    with pytest.raises(UserError, match="toy"):
        plan("toi")


def test_causal_task_refuses_what_sees_the_future(toys: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sees the future"):
        plan("toy-causal", models=["toys:Mixer", "toys:Seer"])
    by_default = plan("toy-causal", overrides=["training.steps=1"])
    assert {cell.model: cell.status for cell in by_default.cells} == {
        "mamba": "planned",
        "bimamba": "refused",
        "alternating": "refused",
        "flexblock": "refused",
        "hzip": "refused",
    }


def test_cells_that_are_not_run_say_why(toys: ModuleType, tmp_path: Path) -> None:
    (cell,) = planned(preset="paper").cells
    assert (cell.status, cell.reason) == ("omitted", "nothing is published")
    result = sweep(tmp_path, planned("toy.available=false"))
    assert result.cells[0].cell.status == "no data"
    assert "data fetch toy" in result.cells[0].cell.reason
    assert not result.cells[0].records
    (absence,) = scan(tmp_path, Absence, [])
    assert (absence.task, absence.status) == ("toy", "no data")


def test_task_facts_are_worked_out_once(
    toys: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sweep(tmp_path, planned())
    (fact,) = scan(tmp_path, TaskRecord, [])
    assert fact.trivial == {"majority": 0.5}
    assert fact.asked == 1
    assert fact.data_source == {"kind": "synthetic", "detail": "a seed"}
    monkeypatch.delattr(toys.Toy, "trivial_predictors")
    sweep(tmp_path, planned())
    assert list(scan(tmp_path, TaskRecord, [])) == [fact]


# -- places that cannot be written -------------------------------------------------------------


def test_results_directory_that_cannot_be_written(toys: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match="--results"):
        sweep(tmp_path / "file", planned())


@pytest.mark.skipif(os.getuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("option", ["ro", "size=12k"])
def test_read_only_and_full_disk(toys: ModuleType, tmp_path: Path, option: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no right to mount")
    try:
        with pytest.raises(CannotWrite, match="--results"):
            sweep(disk, planned())
        assert not list(disk.glob("**/record.json"))
        assert not list(disk.glob("**/.*")), "no half-written file stays"
        subprocess.run(["mount", "-o", "remount,rw,size=10m", str(disk)], check=True)
        (record,) = sweep(disk, planned()).cells[0].records
        assert record.outcome == "finished"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# -- speed -------------------------------------------------------------------------------------


def test_speed_is_measured_once(
    toys: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("flexbench.records.DISTURBED", 1.0)
    config = planned().cells[0].grid[0]
    first = measure(config, tmp_path, Store())
    assert first.tokens_per_second > 0
    assert math.isclose(first.step_seconds * first.tokens_per_second, 8 * 8, rel_tol=0.5)
    assert 0 <= first.peak_memory < 1 << 28
    assert first.repeats >= 3
    assert first.waited is None or 0 <= first.waited <= 1
    again = config.model_copy(update={"seed": 7, "learning_rate": 0.5})
    assert measure(again, tmp_path, Store()) == first


def test_a_disturbed_measurement_is_made_again(
    toys: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    waits = iter([0.5, 0.3, 0.4, 0.01])
    timing = {"tokens_per_second": 1.0, "step_seconds": 1.0, "peak_memory": 1, "repeats": 3}
    monkeypatch.setattr(
        "flexbench.harness.speed._in_a_process", lambda *_: {**timing, "waited": next(waits)}
    )
    config = planned().cells[0].grid[0]
    assert measure(config, tmp_path, Store()).waited == 0.3
    assert measure(config, tmp_path, Store()).waited == 0.01
    assert measure(config, tmp_path, Store()).waited == 0.01
    (record,) = scan(tmp_path, SpeedRecord, [])
    assert not record.disturbed
    assert next(waits, None) is None


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the system does not tell")
def test_waiting_for_a_core_is_noticed() -> None:
    """Two threads that share a core wait for each other half of the time."""
    script = """
import os, time
from flexbench.harness.speed import _schedule, _waited
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
other = os.fork()
start, before = time.monotonic(), _schedule()
while time.monotonic() - start < 0.6:
    pass
if other:
    os.waitpid(other, 0)
    print(_waited(before, _schedule()))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert float(done.stdout) > 0.2


def test_speed_that_cannot_be_measured(toys: ModuleType, tmp_path: Path) -> None:
    config = planned("toy.trap=kill").cells[0].grid[0]
    with pytest.raises(SpeedFailed, match="SIGKILL"):
        measure(config, tmp_path, Store())


def test_a_cell_holds_no_more_than_it_says(toys: ModuleType) -> None:
    (cell,) = planned(seeds=3).cells
    assert isinstance(cell, Cell)
    assert cell.seeds == (0, 1, 2)
    assert [trial.seed for trial in cell.grid] == [0]


def test_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    write_json(tmp_path / "ours.json", {})
    (tmp_path / "plain").touch()
    assert (tmp_path / "ours.json").stat().st_mode == (tmp_path / "plain").stat().st_mode
