"""Speed and memory of a training step, measured alone on the machine."""

from __future__ import annotations

import ctypes
import gc
import resource
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from flexbench.harness.environment import environment, machine
from flexbench.harness.events import Observer
from flexbench.harness.locks import Machine
from flexbench.harness.process import Died, Process, Raised, Returned, stop
from flexbench.harness.trial import Order, make_optimizer, train_step
from flexbench.interface import Batch
from flexbench.models import build, resolve
from flexbench.records import SpeedRecord, TrialConfig, read_speed_record, speed_path, write_json
from flexbench.tasks.base import registry as task_registry
from flexbench.tasks.store import Store

WARM_UP = 2
BUDGET_SECONDS = 2.0
FEWEST, MOST = 3, 30
"""How many steps are timed, whatever the budget."""
ATTEMPTS = 2


class SpeedFailed(Exception):
    """The measurement's process failed; the message's last line says how."""


def speed_key(config: TrialConfig, threads: int) -> dict[str, Any]:
    """What a measurement depends on, the machine apart."""
    fields = {"suite", "task", "task_version", "task_options", "model", "model_version"}
    fields |= {"model_options", "stack", "device"}
    key = config.model_dump(mode="json", include=fields)
    return {**key, "batch_size": config.training.batch_size, "threads": threads}


def measure(config: TrialConfig, results: Path, store: Store) -> SpeedRecord:
    """The measurement for a trial's task, model and batch size: read, or made and written.

    Made in a fresh process with all of the machine's cores, while no trial computes. One that other
    programs disturbed is made again, here and by whoever asks next, and the calmest is kept.

    Raises:
        SpeedFailed: it ran out of memory, or the model failed.
        CannotWrite: the results or cache directory cannot be written.
    """
    threads = torch.get_num_threads()
    key = speed_key(config, threads)
    where = machine(config.device)
    try:
        record = read_speed_record(speed_path(results, key, where))
    except ValueError:
        record = None
    for _ in range(ATTEMPTS):
        if record is not None and not record.disturbed:
            break
        found = _in_a_process(config, store, threads)
        made = SpeedRecord(key=key, machine=where, environment=environment(config.device), **found)
        if record is None or (made.waited or 0.0) < (record.waited or 0.0):
            record = made
            write_json(record.path(results), record)
    assert record is not None
    return record


def _in_a_process(config: TrialConfig, store: Store, threads: int) -> dict[str, Any]:
    with Machine().exclusive():
        process = Process(_measure, config, store, threads)
        try:
            message = process.read()
        finally:
            stop([process])
    if isinstance(message, Raised):
        raise SpeedFailed(message.text.strip().splitlines()[-1])
    if isinstance(message, Died):
        raise SpeedFailed(message.reason)
    assert isinstance(message, Returned)
    found: dict[str, Any] = message.value
    return found


def _measure(config: TrialConfig, store: Store, threads: int, observe: Observer) -> dict[str, Any]:
    torch.set_num_threads(threads)
    device, training = config.device, config.training
    data = task_registry.get(config.task).parse(config.task_options).load(store)
    order = Order(len(data.train), training.batch_size, config.seed)
    batches = [data.train.batch(order[step]).to(device) for step in range(WARM_UP + MOST)]
    mixer = resolve(config.model).parse(config.model_options)

    def steps(batches: Iterable[Batch]) -> Iterator[tuple[int, float]]:
        """Tokens and seconds of each step of a new model, at a learning rate of 0."""
        torch.manual_seed(config.seed)
        model = build(data.spec, config.stack, mixer).to(device).train()
        optimizer = make_optimizer(model, training, 0.0)
        model.after_step(1.0, 0.0)  # what a schedule does early in training is not its speed
        for batch in batches:
            tokens, start = batch.tokens, _now(device)
            train_step(model, optimizer, batch, training.clip)
            yield tokens, _now(device) - start

    # Libraries that load and threads that start with the first step are not the model's memory.
    list(steps([data.train.batch(order[0][:1]).to(device)]))
    footprint = _Footprint(device)
    seconds: list[float] = []
    speeds: list[float] = []
    before = _schedule()
    for step, (tokens, taken) in enumerate(steps(batches)):
        if step + 1 == WARM_UP:
            before = _schedule()
        if step >= WARM_UP:
            seconds.append(taken)
            speeds.append(tokens / taken)
        if len(seconds) >= FEWEST and sum(seconds) > BUDGET_SECONDS:
            break
    return {
        "tokens_per_second": statistics.median(speeds),
        "step_seconds": statistics.median(seconds),
        "peak_memory": footprint.growth(),
        "repeats": len(seconds),
        "waited": _waited(before, _schedule()),
    }


def _schedule() -> tuple[int, int] | None:
    """Nanoseconds that this process's threads computed, and that they waited for a core.

    None where the system does not account for it (another one than Linux).
    """
    try:
        texts = [path.read_text() for path in Path("/proc/self/task").glob("*/schedstat")]
        counts = [tuple(map(int, text.split()[:2])) for text in texts]
    except (OSError, ValueError):
        return None
    return (sum(ran for ran, _ in counts), sum(waited for _, waited in counts)) if counts else None


def _waited(before: tuple[int, int] | None, after: tuple[int, int] | None) -> float | None:
    if before is None or after is None:
        return None
    ran, waited = after[0] - before[0], after[1] - before[1]
    return max(0.0, waited / (ran + waited)) if ran > 0 else None


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class _Footprint:
    """The most memory held since it was made, above what was held then, in bytes."""

    def __init__(self, device: str) -> None:
        self.device = device
        gc.collect()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return
        if sys.platform == "linux":
            with suppress(OSError, AttributeError):  # another C library keeps what was freed
                ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        self._before = _peak_resident()

    def growth(self) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() - self._before
        return _peak_resident() - self._before


def _peak_resident() -> int:
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
