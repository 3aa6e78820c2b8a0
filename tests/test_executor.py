"""Workers that die, fail or run out of memory cost their own trial and nothing else."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flexbench.errors import UserError
from flexbench.harness import Done, Progress, make_executor, plan, run
from flexbench.harness.environment import cores
from flexbench.harness.executor import Executor, Inline, Pool, Trained
from flexbench.harness.locks import Busy, Machine, trial_lock
from flexbench.records import CannotWrite, Record, TrialConfig
from flexbench.tasks.store import Store

EXECUTORS = [Inline(), Pool(2)]


def trials(count: int) -> list[TrialConfig]:
    cell = plan("toy", models=["toys:Mixer"]).cells[0]
    return [cell.grid[0].model_copy(update={"seed": seed}) for seed in range(count)]


def answer(config: TrialConfig, observe: Any) -> Record:
    observe(Progress(config, 1, 2))
    return Record(hash=config.hash, config=config, outcome="finished")


def refuse_the_second(config: TrialConfig, observe: Any) -> Record:
    if config.seed == 1:
        raise UserError("the disk is full")
    return answer(config, observe)


@pytest.mark.parametrize("executor", EXECUTORS, ids=["inline", "pool"])
def test_every_trial_ends_once_and_events_arrive(toys: ModuleType, executor: Executor) -> None:
    events: list[Any] = []
    ends = list(executor.run(trials(5), answer, events.append))
    assert sorted(end.trial.seed for end in ends) == [0, 1, 2, 3, 4]
    assert all(isinstance(end, Trained) and end.record.hash == end.trial.hash for end in ends)
    assert sorted(event.trial.seed for event in events) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("executor", EXECUTORS, ids=["inline", "pool"])
def test_user_error_stops_the_run(toys: ModuleType, executor: Executor) -> None:
    with pytest.raises(UserError, match="the disk is full"):
        list(executor.run(trials(3), refuse_the_second, lambda event: None))


def sweep(results: Path, executor: Executor, *overrides: str) -> tuple[list[Record], list[Done]]:
    """The records, and the trials that were not read from earlier ones."""
    fresh: list[Done] = []

    def observe(event: Any) -> None:
        if isinstance(event, Done) and not event.cached:
            fresh.append(event)

    chosen = plan("toy", models=["toys:Mixer"], seeds=2, overrides=overrides)
    result = run(
        chosen,
        results=results,
        store=Store(),
        executor=executor,
        observe=observe,
        measure_speed=False,
    )
    return list(result.cells[0].records), fresh


@pytest.mark.parametrize(
    ("trap", "outcome", "text", "again"),
    [
        ("kill", "failed", "SIGKILL", True),
        ("raise", "failed", "the trap is sprung", True),
        ("memory", "out of memory", "MemoryError", True),
        ("nan", "diverged", "step", False),
    ],
)
def test_every_outcome_is_a_record(
    toys: ModuleType, tmp_path: Path, trap: str, outcome: str, text: str, again: bool
) -> None:
    overrides = [f"toy.trap={trap}", "toy.trap_from=63"]
    records, fresh = sweep(tmp_path, Pool(2), *overrides)
    assert [record.outcome for record in records] == [outcome] * 2
    assert all(record.metrics is None and text in (record.error or "") for record in records)
    assert len(fresh) == 2
    records, fresh = sweep(tmp_path, Pool(2), *overrides)
    assert [record.outcome for record in records] == [outcome] * 2
    assert len(fresh) == (2 if again else 0)


def test_pool_and_inline_give_the_same_bits(toys: ModuleType, tmp_path: Path) -> None:
    pool, _ = sweep(tmp_path / "pool", Pool(2))
    inline, _ = sweep(tmp_path / "inline", Inline())
    assert [record.metrics for record in pool] == [record.metrics for record in inline]


def test_default_number_of_workers() -> None:
    assert make_executor(0).__class__ is Inline
    for executor, workers in [
        (make_executor(), cores()),
        (make_executor(threads=2 * cores()), 1),
        (make_executor(device="cuda"), 1),
        (make_executor(3), 3),
    ]:
        assert isinstance(executor, Pool)
        assert executor.workers == workers


def test_trial_lock_keeps_a_second_holder_out(tmp_path: Path) -> None:
    with (
        trial_lock(tmp_path / "trial", wait=True),
        pytest.raises(Busy),
        trial_lock(tmp_path / "trial", wait=False),
    ):
        pass
    with trial_lock(tmp_path / "trial", wait=False):
        pass


def test_measurement_waits_for_trials_and_trials_let_it_pass(tmp_path: Path) -> None:
    inside = threading.Event()

    def measure() -> None:
        with Machine(tmp_path).exclusive():
            inside.set()

    trial, other = Machine(tmp_path), Machine(tmp_path)
    with trial.shared(), other.shared():
        measurement = threading.Thread(target=measure)
        measurement.start()
        time.sleep(0.1)
        assert not inside.is_set()
        pauses = [threading.Thread(target=machine.pause) for machine in (trial, other)]
        for pause in pauses:
            pause.start()
        assert inside.wait(20)
        for thread in (*pauses, measurement):
            thread.join(20)
            assert not thread.is_alive()


def test_lock_in_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CannotWrite, match="cannot write"),
        trial_lock(tmp_path / "file" / "trial", wait=True),
    ):
        pass
    with pytest.raises(CannotWrite, match="cannot write"), Machine(tmp_path / "file").exclusive():
        pass
