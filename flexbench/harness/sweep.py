"""From a choice of tasks and models to a plan, and from the plan to records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from flexbench.config import PRESETS, Preset, StackConfig, TrainingConfig, digest
from flexbench.errors import DataUnavailable, UserError, did_you_mean
from flexbench.harness.events import Done, Notice, Observer, Stage, Step, label
from flexbench.harness.executor import Executor, Lost, Postponed
from flexbench.harness.scores import asked
from flexbench.harness.speed import SpeedFailed, measure
from flexbench.harness.trial import merit, record_loss, settled, train_trial
from flexbench.kernels import build
from flexbench.models import MixerConfig, backbone_parameters, match_width, resolve
from flexbench.records import (
    Absence,
    Record,
    Selection,
    SpeedRecord,
    TaskRecord,
    TrialConfig,
    check_writable,
    read_task_record,
    write_json,
)
from flexbench.tasks.base import Task, suites
from flexbench.tasks.base import registry as task_registry
from flexbench.tasks.store import Store

BASELINE = "mamba"
"""The model whose backbone's size every other is matched to."""

MODELS = ("mamba", "bimamba", "alternating", "flexblock", "hzip")
"""What is compared where nothing else is asked for."""

SEEDS = {"quick": 1, "small": 3, "paper": 5}

Status = Literal["planned", "omitted", "refused", "no data", "skipped"]


@dataclass(frozen=True)
class Cell:
    """One task with one model: the trials planned for it, or why there are none.

    Attributes:
        grid: the first seed at every learning rate; the best on validation is used.
        seeds: the seeds in order.
        baseline: backbone parameters of the baseline, which this model is matched to.
        status: "planned"; else nothing is trained and `reason` says why: the preset leaves the task
            out ("omitted"), the model sees the future ("refused"), "no data", or an ablation
            leaves it out ("skipped").
    """

    suite: str
    task: str
    model: str
    preset: str
    grid: tuple[TrialConfig, ...] = ()
    seeds: tuple[int, ...] = ()
    baseline: int | None = None
    status: Status = "planned"
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """All that a sweep will do; made without data, network or training."""

    device: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class CellResult:
    """What became of a cell.

    Attributes:
        records: the chosen learning rate's records, one a seed, in seed order, any outcome.
        selection: which rate was chosen and what the others reached.
        speed: measured alone; None where the cell was not run or measuring failed.
    """

    cell: Cell
    records: tuple[Record, ...] = ()
    selection: Selection | None = None
    speed: SpeedRecord | None = None


@dataclass(frozen=True)
class SweepResult:
    """What became of every cell of a plan, in its order."""

    plan: Plan
    cells: tuple[CellResult, ...]


def plan(
    suite: str,
    *,
    tasks: Sequence[str] | None = None,
    models: Sequence[str] | None = None,
    seeds: int | None = None,
    preset: str = "quick",
    device: str = "auto",
    overrides: Sequence[str] = (),
    threads: int = 1,
) -> Plan:
    """Check everything that can be checked before anything is trained.

    Args:
        suite: a suite's name.
        tasks: names within the suite; None: all of it.
        models: registry names or "package.module:Class"; None: `MODELS`.
        seeds: how many, from 0; None: 1 at quick, 3 at small, 5 at paper.
        preset: "quick", "small" or "paper".
        device: "cpu", "cuda" or "auto".
        overrides: "key=value" with keys `training.*`, `stack.*`, `task.*`, `model.*`,
            `<task name>.*` or `<model name>.*`; values are JSON, or else text.
        threads: threads a trial computes with.

    Raises:
        UserError: an unknown or unusable suite, task, model, preset, device, key or value.
    """
    if preset not in PRESETS:
        raise UserError(f"unknown preset '{preset}'{did_you_mean(preset, PRESETS)}")
    known = suites()
    if suite not in known:
        raise UserError(f"unknown suite '{suite}'{did_you_mean(suite, known)}")
    for name in tasks or ():
        if name not in known[suite]:
            hint = did_you_mean(name, known[suite])
            raise UserError(f"unknown task '{name}' in suite '{suite}'{hint}")
    if threads < 1:
        raise UserError(f"threads must be at least 1 (got {threads})")
    chosen = list(dict.fromkeys(tasks or known[suite]))
    mixers = list(dict.fromkeys(models or MODELS))
    causal = {name: resolve(name).causal for name in mixers}
    count = SEEDS[preset] if seeds is None else seeds
    if count < 1:
        raise UserError(f"seeds must be at least 1 (got {count})")
    device = choose_device(device)
    settings = _Overrides(overrides, tasks=chosen, models=mixers)
    seeded = tuple(range(count))
    cells = []
    for name in chosen:
        task_type = task_registry.get(name)
        if preset in task_type.omitted or preset not in task_type.presets:
            reason = task_type.omitted.get(preset, f"it has no {preset} preset")
            cells += [
                Cell(suite, name, model, preset, status="omitted", reason=reason)
                for model in mixers
            ]
            continue
        task, setup = settings.task(task_type, task_type.presets[preset])
        baseline = backbone_parameters(settings.baseline(), setup.stack)
        for model in mixers:
            if task_type.requires_causal and not causal[model]:
                reason = f"'{name}' is causal, but '{model}' sees the future; choose another model"
                if models is not None:
                    raise UserError(reason)
                cells.append(Cell(suite, name, model, preset, status="refused", reason=reason))
                continue
            mixer = match_width(settings.model(model, setup), setup.stack, baseline)
            grid = tuple(
                TrialConfig(
                    suite=suite,
                    task=name,
                    task_version=task.version,
                    task_options=task.model_dump(mode="json"),
                    model=model,
                    model_version=mixer.version,
                    model_options=mixer.model_dump(mode="json"),
                    stack=setup.stack,
                    training=setup.training,
                    learning_rate=rate,
                    preset=preset,
                    seed=0,
                    device=device,
                    threads=threads,
                )
                for rate in setup.training.learning_rates
            )
            cells.append(Cell(suite, name, model, preset, grid, seeded, baseline))
    return Plan(device, tuple(cells))


def run(
    plan: Plan,
    *,
    results: Path,
    store: Store,
    executor: Executor,
    observe: Observer = lambda event: None,
    measure_speed: bool = True,
) -> SweepResult:
    """Do what is planned and not yet done; what is done is read.

    Raises:
        UserError: the results directory cannot be written, the disk is full.
        KeyboardInterrupt: passed on after the workers left their checkpoints.
    """
    check_writable(results)
    if plan.device == "cpu":
        build.prepare(lambda text: observe(Notice(text)))
    absent = _prepare(plan, results, store, observe)
    cells = [_or_absent(cell, absent, results) for cell in plan.cells]
    planned = [cell for cell in cells if cell.status == "planned"]
    train = _Trainer(
        results,
        store,
        executor,
        observe,
        baselines={cell.grid[0].cell: cell.baseline for cell in planned},
    )
    observe(Stage("trials", sum(len(cell.grid) + len(cell.seeds) - 1 for cell in planned)))
    first: list[TrialConfig] = []
    rest: list[TrialConfig] = []
    for cell in planned:
        # A grid of one rate needs no choice, so its other seeds need not wait for the first.
        first += _over_seeds(cell, cell.grid[0]) if len(cell.grid) == 1 else cell.grid
    records = train(first)
    chosen = []
    for cell in planned:
        best = _best(cell.grid, records) if len(cell.grid) > 1 else cell.grid[0]
        chosen.append(_over_seeds(cell, best) if best else [cell.grid[0]])
        rest += [trial for trial in chosen[-1] if trial.hash not in records]
    records |= train(rest)
    done = []
    for cell, trials in zip(planned, chosen, strict=True):
        selection = _select(cell, trials, records)
        write_json(selection.path(results), selection)
        done.append(CellResult(cell, tuple(records[trial.hash] for trial in trials), selection))
    if measure_speed:
        observe(Stage("speed", len(planned)))
        for place, outcome in enumerate(done):
            done[place] = replace(outcome, speed=_speed(outcome, results, store, observe))
            observe(Step(f"{outcome.cell.task} {outcome.cell.model}"))
    outcomes = iter(done)
    made = [next(outcomes) if cell.status == "planned" else CellResult(cell) for cell in cells]
    return SweepResult(plan, tuple(made))


# -- planning --------------------------------------------------------------------------------


class _Overrides:
    """`--set key=value`, sorted by what they apply to."""

    def __init__(self, texts: Sequence[str], *, tasks: list[str], models: list[str]) -> None:
        scopes = ["training", "stack", "task", "model", *tasks, *models, BASELINE]
        self._models = models
        self._values: dict[str, dict[str, Any]] = {scope: {} for scope in scopes}
        for text in texts:
            key, equals, value = text.partition("=")
            scope, _, name = key.strip().rpartition(".")
            if not equals:
                raise UserError(f"'{text}' sets nothing; write key=value")
            if scope not in self._values:
                known = [f"{each}.{name}" for each in scopes]
                if not scope:
                    known = [f"training.{field}" for field in TrainingConfig.model_fields]
                    known += [f"stack.{field}" for field in StackConfig.model_fields]
                raise UserError(f"unknown key '{key}'{did_you_mean(key, known)}")
            self._values[scope][name] = _value(value.strip())

    def task(self, kind: type[Task], preset: Preset) -> tuple[Task, Preset]:
        """The task's options, and the preset's stack and training, as overridden."""
        task = kind.parse(preset.options, where=kind.name)
        for scope in ("task", kind.name):
            task = task.override(self._values[scope], where=scope)
        stack = preset.stack.override(self._values["stack"], where="stack")
        training = preset.training.override(self._values["training"], where="training")
        return task, preset.model_copy(update={"stack": stack, "training": training})

    def model(self, name: str, preset: Preset) -> MixerConfig:
        """The mixer's options as overridden, its inner width not yet solved."""
        mixer = resolve(name).for_preset(preset)
        for scope in ("model", name):
            mixer = mixer.override(self._values[scope], where=scope)
        return mixer

    def baseline(self) -> MixerConfig:
        """The baseline's options; where it is not run, what it does not know leaves it alone."""
        if BASELINE in self._models:
            return self.model(BASELINE, Preset())
        fields = resolve(BASELINE).model_fields
        shared = {key: value for key, value in self._values["model"].items() if key in fields}
        return resolve(BASELINE).parse({**shared, **self._values[BASELINE]}, where=BASELINE)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def choose_device(name: str) -> str:
    """ "cpu" or "cuda": what "auto" is here, or the one named.

    Raises:
        UserError: another name, or a GPU that is not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UserError(f"unknown device '{name}'{did_you_mean(name, ('auto', 'cpu', 'cuda'))}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device is available; choose --device cpu")
    return name


# -- running ---------------------------------------------------------------------------------


def _prepare(plan: Plan, results: Path, store: Store, observe: Observer) -> dict[str, str]:
    """Prepare all data and write down its facts; for what cannot be had, why not."""
    first = {_data(cell): cell.grid[0] for cell in plan.cells if cell.status == "planned"}
    observe(Stage("data", len(first)))
    absent = {}
    for data, trial in first.items():
        task = task_registry.get(trial.task).parse(trial.task_options)
        try:
            task.prepare(store)
            _write_facts(task, trial, results, store, observe)
        except DataUnavailable as error:
            absent[data] = str(error)
        observe(Step(trial.task))
    return absent


def _data(cell: Cell) -> str:
    """Digest of all that decides a planned cell's data."""
    return digest([cell.task, cell.grid[0].task_version, cell.grid[0].task_options])


def _write_facts(
    task: Task, trial: TrialConfig, results: Path, store: Store, observe: Observer
) -> None:
    """What a score is to be judged against, worked out once."""
    empty = TaskRecord(
        suite=trial.suite,
        task=trial.task,
        task_version=trial.task_version,
        task_options=trial.task_options,
        preset=trial.preset,
        metric=task.metric,
        chance=task.chance_level(),
        trivial={},
        data_source={},
        license=task.license,
    )
    path = empty.path(results)
    try:
        known = read_task_record(path)
    except ValueError as error:
        observe(Notice(f"{error}; it is made again"))
        known = None
    if known is None or known.asked is None:
        data = task.load(store)
        found = {
            "trivial": task.trivial_predictors(data),
            "asked": asked(data.test, data.spec),
            "data_source": asdict(data.source),
        }
        write_json(path, empty.model_copy(update=found))


def _or_absent(cell: Cell, absent: Mapping[str, str], results: Path) -> Cell:
    """The cell, or why it is not run, which goes on record."""
    if cell.status == "planned" and (reason := absent.get(_data(cell))):
        cell = replace(cell, status="no data", reason=reason)
    if cell.status in ("no data", "refused"):
        absence = Absence(
            suite=cell.suite,
            task=cell.task,
            model=cell.model,
            preset=cell.preset,
            status=cell.status,
            reason=cell.reason,
        )
        write_json(absence.path(results), absence)
    return cell


@dataclass(frozen=True)
class _Work:
    """What a worker does with a trial; travels to it."""

    results: Path
    store: Store
    baselines: Mapping[str, int | None]
    wait: bool

    def __call__(self, trial: TrialConfig, observe: Observer) -> Record:
        baseline = self.baselines[trial.cell]
        return train_trial(
            trial, self.results, self.store, observe, baseline=baseline, wait=self.wait
        )


@dataclass(frozen=True)
class _Trainer:
    """Trials to records, by hash, on an executor."""

    results: Path
    store: Store
    executor: Executor
    observe: Observer
    baselines: Mapping[str, int | None]

    def __call__(self, trials: Sequence[TrialConfig]) -> dict[str, Record]:
        records: dict[str, Record] = {}
        waiting = []
        for trial in trials:
            record = settled(trial, self.results)
            if record is None:
                waiting.append(trial)
            else:
                records[trial.hash] = record
                self.observe(Done(trial, record, cached=True))
        # Trials that another invocation is at come last, so that the two share the work.
        for wait in (False, True):
            work = _Work(self.results, self.store, self.baselines, wait)
            postponed = []
            for end in self.executor.run(waiting, work, self.observe):
                if isinstance(end, Postponed):
                    postponed.append(end.trial)
                    continue
                record = self._lost(end) if isinstance(end, Lost) else end.record
                records[end.trial.hash] = record
                self.observe(Done(end.trial, record))
            waiting = postponed
        return records

    def _lost(self, end: Lost) -> Record:
        self.observe(Notice(f"{label(end.trial)}: {end.reason.strip().splitlines()[-1]}"))
        return record_loss(end.trial, self.results, end.reason)


def _over_seeds(cell: Cell, trial: TrialConfig) -> list[TrialConfig]:
    return [trial.model_copy(update={"seed": seed}) for seed in cell.seeds]


def _best(grid: Sequence[TrialConfig], records: Mapping[str, Record]) -> TrialConfig | None:
    """The trial that validates best, the first of equals; None where none finished."""
    merits = {
        place: merit(metrics)
        for place, trial in enumerate(grid)
        if (metrics := records[trial.hash].metrics) is not None
    }
    return grid[max(merits, key=lambda place: merits[place])] if merits else None


def _select(cell: Cell, chosen: Sequence[TrialConfig], records: Mapping[str, Record]) -> Selection:
    grid: dict[str, float | None] = {}
    for trial in cell.grid:
        metrics = records[trial.hash].metrics
        grid[f"{trial.learning_rate:g}"] = metrics["validation_accuracy"] if metrics else None
    return Selection(
        config=chosen[0],
        grid=grid,
        learning_rate=chosen[0].learning_rate,
        trials={str(trial.seed): records[trial.hash].hash for trial in chosen},
    )


def _speed(
    outcome: CellResult, results: Path, store: Store, observe: Observer
) -> SpeedRecord | None:
    if not any(record.outcome == "finished" for record in outcome.records):
        return None
    try:
        return measure(outcome.records[0].config, results, store)
    except SpeedFailed as error:
        observe(Notice(f"speed of {outcome.cell.task} {outcome.cell.model}: {error}"))
        return None
