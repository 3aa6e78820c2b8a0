"""Records gathered into rows: one task, one model, one configuration, over its seeds."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from flexbench.config import PRESETS, Preset, StrictModel, TrainingConfig
from flexbench.errors import UserError
from flexbench.harness.speed import speed_key
from flexbench.harness.sweep import BASELINE
from flexbench.harness.trial import completed
from flexbench.models.base import registry as models
from flexbench.records import (
    Absence,
    Record,
    Selection,
    SpeedRecord,
    TaskRecord,
    TrialConfig,
    scan,
)
from flexbench.registry import Registry
from flexbench.report.statistics import Summary, proportion_interval, summarise
from flexbench.tasks.base import registry as tasks
from flexbench.tasks.base import suites

NOT_RUN = "not run"
"""The reason of a task that nobody asked for yet."""

T = TypeVar("T", bound=type[Any])


@dataclass(frozen=True)
class Row:
    """Trials that differ in nothing but their seed, at the learning rate that was selected.

    Attributes:
        config: of the first seed.
        variant: what differs from the preset's own configuration, as `key=value`; empty for it.
        trials: one record a seed, by seed.
        other_rates: records at learning rates that were not selected.
        older: the task or the model has a newer version by now.
        correct: for a finished seed, whether each test example was answered correctly.
        curves: for a seed, (step, validation accuracy in [0, 1]).
    """

    config: TrialConfig
    variant: tuple[str, ...]
    trials: tuple[Record, ...]
    other_rates: tuple[Record, ...] = ()
    older: bool = False
    facts: TaskRecord | None = None
    speed: SpeedRecord | None = None
    correct: Mapping[int, NDArray[np.bool_]] = field(default_factory=dict)
    curves: Mapping[int, list[tuple[int, float]]] = field(default_factory=dict)

    @cached_property
    def accuracies(self) -> dict[int, float]:
        """Test accuracy in [0, 1] of each finished seed."""
        return {
            trial.config.seed: trial.metrics["test_accuracy"]
            for trial in self.trials
            if trial.outcome == "finished" and trial.metrics
        }

    @cached_property
    def summary(self) -> Summary | None:
        """Mean, deviation and interval over the finished seeds, None where none finished."""
        return summarise(list(self.accuracies.values())) if self.accuracies else None

    @cached_property
    def best_trivial(self) -> tuple[str, float] | None:
        """Name and test accuracy of the strongest trivial predictor."""
        trivial = self.facts.trivial if self.facts else {}
        return max(sorted(trivial.items()), key=lambda item: item[1]) if trivial else None

    @cached_property
    def beats_trivial(self) -> str:
        """ "yes", "unclear" (above it, but within the noise), "no", or "" where not known.

        The noise is the 95 % interval over seeds, or for one seed that of the finite test set.
        """
        if self.summary is None or self.best_trivial is None:
            return ""
        bar = self.best_trivial[1]
        if self.summary.mean <= bar:
            return "no"
        low = None
        if self.summary.interval:
            low = self.summary.interval[0]
        elif self.correct:
            (answers,) = self.correct.values()
            low = proportion_interval(int(answers.sum()), answers.size)[0]
        return "yes" if low is not None and low > bar else "unclear"

    @property
    def published(self) -> float | None:
        """The published figure of the model of this name on this task, in percent."""
        task = find(tasks, self.config.task)
        return task.published.get(self.config.model) if task else None

    @property
    def outcome(self) -> str:
        """ "finished", or how many of the seeds ended otherwise: "1 of 3 diverged"."""
        outcomes = [trial.outcome for trial in self.trials]
        if set(outcomes) == {"finished"}:
            return "finished"
        others = sorted({outcome for outcome in outcomes if outcome != "finished"})
        return ", ".join(f"{outcomes.count(each)} of {len(outcomes)} {each}" for each in others)

    @property
    def notes(self) -> list[str]:
        """What a mean over the finished seeds would hide, a line each."""
        lines = [
            f"seed {trial.config.seed} {trial.outcome}{_cause(trial)}"
            for trial in self.trials
            if trial.outcome != "finished"
        ]
        lines += [
            f"learning rate {trial.config.learning_rate:g} at seed {trial.config.seed} "
            f"{trial.outcome}{_cause(trial)}"
            for trial in self.other_rates
            if trial.outcome != "finished"
        ]
        at = [f"{name} {100 * score:.1f}" for name, score in self.further.items()]
        if at:
            lines.append(f"accuracy at {', '.join(at)}")
        metric = self.facts.metric if self.facts else "accuracy"
        if metric != "accuracy" and (score := self._mean(f"test_{metric}")) is not None:
            lines.append(f"{metric} {100 * score:.1f}")
        return lines

    @property
    def further(self) -> dict[str, float]:
        """Mean test accuracy over the finished seeds on each further test set, by its name."""
        prefix = "test_accuracy@"
        names = {name for trial in self.trials for name in trial.metrics or () if prefix in name}
        means = {
            name: self._mean(name) for name in sorted(names, key=lambda name: (len(name), name))
        }
        return {name.removeprefix(prefix): mean for name, mean in means.items() if mean is not None}

    def _mean(self, metric: str) -> float | None:
        """Over the finished seeds; None where none knows it."""
        found = (trial.metrics or {} for trial in self.trials)
        known = [metrics[metric] for metrics in found if metric in metrics]
        return sum(known) / len(known) if known else None

    def fact(self, name: str) -> float | None:
        """A model fact, the same for every seed."""
        values = (trial.model_facts.get(name) for trial in self.trials)
        return next((value for value in values if value is not None), None)

    @property
    def computed_token_ratio(self) -> float | None:
        """Computed to real tokens, a mean over the seeds; 1 where a model does not say."""
        finished = [trial for trial in self.trials if trial.outcome == "finished"]
        ratios = [trial.diagnostics.get("computed_token_ratio", 1.0) for trial in finished]
        return sum(ratios) / len(ratios) if ratios else None


def _cause(trial: Record) -> str:
    lines = (trial.error or "").strip().splitlines()
    return f" ({lines[-1].strip()})" if lines and trial.outcome == "failed" else ""


@dataclass(frozen=True)
class SuiteResults:
    """All that is known of a suite at one preset, in the order of the tables.

    Attributes:
        older: rows of an older task or model version; never pooled or compared.
        absences: (task, model) without a trial on record, each with the reason; the model is ""
            where nothing of the task is on record.
    """

    suite: str
    preset: str
    rows: tuple[Row, ...]
    older: tuple[Row, ...]
    absences: Mapping[tuple[str, str], str]

    @property
    def tasks(self) -> list[str]:
        """Every task with a row or an absence, as the suite orders them."""
        known = suites().get(self.suite, [])
        present = {row.config.task for row in self.rows} | {task for task, _ in self.absences}
        return [name for name in known if name in present] + sorted(present - set(known))

    def of_task(self, task: str) -> list[Row]:
        return [row for row in self.rows if row.config.task == task]

    def baseline_of(self, row: Row) -> Row | None:
        """The baseline under the same task options, stack, training, device and threads."""
        if row.config.model == BASELINE:
            return None
        wanted = _conditions(row.config)
        same = (
            other
            for other in self.of_task(row.config.task)
            if other.config.model == BASELINE and _conditions(other.config) == wanted
        )
        return min(same, key=lambda other: len(other.variant), default=None)


def collect(results: Path) -> tuple[list[SuiteResults], list[str]]:
    """Everything under a results directory, and a line for each file that could not be read."""
    skipped: list[str] = []
    facts = {
        (record.suite, record.task, record.task_version, _canonical(record.task_options)): record
        for record in scan(results, TaskRecord, skipped)
    }
    speeds = list(scan(results, SpeedRecord, skipped))
    rates = {
        completed(selection.config).cell: selection.learning_rate
        for selection in scan(results, Selection, skipped)
    }
    cells: dict[str, list[Record]] = defaultdict(list)
    for record in scan(results, Record, skipped):
        if record.hash == record.config.hash:
            cells[completed(record.config).cell].append(record)
        else:
            where = record.config.directory(results)
            skipped.append(f"{where}: the record's hash is not that of its config")

    rows: dict[tuple[str, str], list[Row]] = defaultdict(list)
    absences: dict[tuple[str, str], dict[tuple[str, str], str]] = defaultdict(dict)
    for cell, records in cells.items():
        row = _row(records, rates.get(cell), results, facts, speeds, skipped)
        rows[row.config.suite, row.config.preset].append(row)
    for absence in scan(results, Absence, skipped):
        detail = absence.reason.removeprefix(f"no data for '{absence.task}'").removeprefix("; ")
        reason = absence.status + (detail if detail.startswith(" (") else f": {detail}")
        absences[absence.suite, absence.preset][absence.task, absence.model] = reason
    found = sorted(rows.keys() | absences.keys(), key=lambda pair: (pair[0], _rank(pair[1])))
    return [_suite(*pair, rows[pair], absences[pair]) for pair in found], skipped


def _suite(
    suite: str, preset: str, rows: list[Row], absences: Mapping[tuple[str, str], str]
) -> SuiteResults:
    rows = _tell_apart(sorted(rows, key=_order))
    current = tuple(row for row in rows if not row.older)
    present = {(row.config.task, row.config.model) for row in current}
    missing = {pair: reason for pair, reason in sorted(absences.items()) if pair not in present}
    named = {task for task, _ in present} | {task for task, _ in missing}
    for name in suites().get(suite, []):
        if name not in named:
            reason = tasks.get(name).omitted.get(preset)
            missing[name, ""] = f"left out of {preset}: {reason}" if reason else NOT_RUN
    return SuiteResults(suite, preset, current, tuple(row for row in rows if row.older), missing)


def _row(
    records: list[Record],
    rate: float | None,
    results: Path,
    facts: Mapping[tuple[str, str, int, str], TaskRecord],
    speeds: Iterable[SpeedRecord],
    skipped: list[str],
) -> Row:
    records = sorted(records, key=lambda each: (each.config.seed, each.config.learning_rate))
    if not any(record.config.learning_rate == rate for record in records):
        rate = _best_rate(records)
    chosen = tuple(record for record in records if record.config.learning_rate == rate)
    config = completed(chosen[0].config)
    folders = {record.config.seed: record.config.directory(results) for record in chosen}
    answers = {
        record.config.seed: _read_correct(
            folders[record.config.seed] / "correct.npy", record.metrics, skipped
        )
        for record in chosen
        if record.outcome == "finished" and record.metrics
    }
    then = chosen[0].config
    keys = [
        (each.suite, each.task, each.task_version, _canonical(each.task_options))
        for each in (config, then)
    ]
    return Row(
        config=config,
        variant=_overrides(config),
        trials=chosen,
        other_rates=tuple(each for each in records if each.config.learning_rate != rate),
        older=_is_older(config),
        facts=next((facts[key] for key in keys if key in facts), None),
        speed=_speed(speeds, chosen[0]),
        correct={seed: array for seed, array in answers.items() if array is not None},
        curves={seed: _read_curve(folder / "history.jsonl") for seed, folder in folders.items()},
    )


def _best_rate(records: list[Record]) -> float:
    """Best validation accuracy at the first seed: what a sweep cut short would have chosen."""
    first = records[0].config.seed
    return max(
        (record for record in records if record.config.seed == first),
        key=lambda each: each.metrics["validation_accuracy"] if each.metrics else -1.0,
    ).config.learning_rate


def _read_correct(
    path: Path, metrics: Mapping[str, float], skipped: list[str]
) -> NDArray[np.bool_] | None:
    """The answers, one bit each on disk; None, and a line in `skipped`, if they are not whole."""
    try:
        packed = np.load(path, allow_pickle=False)
        answers = np.unpackbits(packed, count=int(metrics["test_examples"])).astype(np.bool_)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, EOFError) as error:
        skipped.append(f"{path} does not hold a trial's answers: {error}")
        return None
    if abs(answers.mean() - metrics["test_accuracy"]) > 1e-6:
        skipped.append(f"{path} holds the answers of another trial")
        return None
    return answers


def _read_curve(path: Path) -> list[tuple[int, float]]:
    """Validation accuracy by step; a line cut short by a crash ends the curve."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    curve: dict[int, float] = {}
    for line in lines:
        try:
            entry = json.loads(line)
            curve[int(entry["step"])] = float(entry["validation_accuracy"])
        except (ValueError, KeyError, TypeError):
            break
    return sorted(curve.items())


def _speed(speeds: Iterable[SpeedRecord], trial: Record) -> SpeedRecord | None:
    """The measurement of a trial's configuration, on the machine it ran on if there is one."""
    home = trial.environment.get("machine")
    return max(
        (
            speed
            for speed in speeds
            if speed.key == speed_key(trial.config, speed.key.get("threads", 0))
        ),
        key=lambda speed: (speed.machine == home, speed.key["threads"], speed.machine),
        default=None,
    )


def find(registry: Registry[T], name: str) -> T | None:
    """The class of that name, None where it is not registered (an external or removed one)."""
    try:
        return registry.get(name)
    except UserError:
        return None


def _is_older(config: TrialConfig) -> bool:
    task, model = find(tasks, config.task), find(models, config.model)
    return bool(
        (task and config.task_version != task.version)
        or (model and config.model_version != model.version)
    )


def _settings(config: TrialConfig) -> dict[str, Any]:
    """All that decides a row, flat, keyed as `--set` names it."""
    return {
        **_flat("task", config.task_options),
        **_flat("model", config.model_options),
        **_flat("stack", config.stack),
        **_training(config.training),
        "device": config.device,
        "threads": config.threads,
        "task version": config.task_version,
        "model version": config.model_version,
    }


def _overrides(config: TrialConfig) -> tuple[str, ...]:
    """What differs from the preset; nothing can be said of the options of unregistered names."""
    task, model = find(tasks, config.task), find(models, config.model)
    standard: dict[str, Any] = {}
    if task and config.preset in task.presets:
        preset = task.presets[config.preset]
        standard |= _flat("task", task.parse(preset.options))
        standard |= _flat("stack", preset.stack) | _training(preset.training)
    else:
        preset = Preset()
    if model:
        standard |= _flat("model", model.for_preset(preset))
        standard.pop("model.d_inner", None)  # solved to match parameters
    actual = _settings(config)
    return tuple(
        f"{key}={_plain(actual[key])}"
        for key in sorted(actual.keys() & standard.keys())
        if _canonical(actual[key]) != _canonical(standard[key])
    )


def _tell_apart(rows: list[Row]) -> list[Row]:
    """Add to the variants whatever else rows of one task, model and variant differ in."""
    alike: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        alike[row.config.task, row.config.model, row.variant, row.older].append(row)
    told = []
    for row in rows:
        group = alike[row.config.task, row.config.model, row.variant, row.older]
        settings = [_settings(each.config) for each in group]
        own = _settings(row.config)
        extra = tuple(
            f"{key}={_plain(own[key])}"
            for key in sorted(own)
            if any(_canonical(own[key]) != _canonical(each.get(key)) for each in settings)
        )
        told.append(replace(row, variant=row.variant + extra))
    return told


def _conditions(config: TrialConfig) -> str:
    model_apart = {"model", "model_version", "model_options", "learning_rate", "seed"}
    plain = config.model_dump(mode="json", exclude=model_apart | {"training"})
    return _canonical(plain | _training(config.training))


def _order(row: Row) -> tuple[Any, ...]:
    config = row.config
    return (config.task, len(row.variant), config.model != BASELINE, config.model, config.cell)


def _rank(preset: str) -> tuple[int, str]:
    return (PRESETS.index(preset) if preset in PRESETS else len(PRESETS), preset)


def _flat(prefix: str, values: StrictModel | Mapping[str, Any]) -> dict[str, Any]:
    plain = values.model_dump(mode="json") if isinstance(values, StrictModel) else values
    return {f"{prefix}.{key}": value for key, value in plain.items()}


def _training(training: TrainingConfig) -> dict[str, Any]:
    """Without the grid, which decides no number of a trial: only its rate does."""
    return _flat("training", training.model_copy(update={"learning_rates": ()}))


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else _canonical(value)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
