"""Records gathered into rows: one task, one model, one configuration, over its seeds."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
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
    AblationRecord,
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

WIDTH = "model.d_inner"
"""The setting that the harness solves to match parameters."""

PLAIN = re.compile(r"\w[\w.-]*")

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
        correct: for a finished seed, whether each asked position of the test set was answered
            correctly.
        histories: for a seed, the lines of its `history.jsonl`.
    """

    config: TrialConfig
    variant: tuple[str, ...]
    trials: tuple[Record, ...]
    other_rates: tuple[Record, ...] = ()
    older: bool = False
    facts: TaskRecord | None = None
    speed: SpeedRecord | None = None
    correct: Mapping[int, NDArray[np.bool_]] = field(default_factory=dict)
    selection: Selection | None = None
    histories: Mapping[int, list[dict[str, float]]] = field(default_factory=dict)

    @property
    def cell(self) -> str:
        return self.config.cell

    @cached_property
    def cells(self) -> frozenset[str]:
        """`cell`, and what it was when its trials were run: before options were added."""
        return frozenset((self.cell, *(trial.config.cell for trial in self.trials)))

    def curves(self, key: str) -> list[dict[int, float]]:
        """For every seed that knows `key` throughout, its value by step."""
        found = (
            {int(line["step"]): line[key] for line in lines if key in line}
            for lines in self.histories.values()
        )
        return [curve for curve in found if curve]

    def over_seeds(self, name: str) -> Summary | None:
        """Summary of a metric, a diagnostic or a model fact over the finished seeds."""
        finished = [trial for trial in self.trials if trial.outcome == "finished"]
        found = (
            {**trial.model_facts, **trial.diagnostics, **(trial.metrics or {})}.get(name)
            for trial in finished
        )
        values = [float(value) for value in found if value is not None]
        return summarise(values) if values else None

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
    def asked(self) -> NDArray[np.int64] | None:
        """Positions asked in each test example, in the order of `correct`; None where not known."""
        asked = self.facts.asked if self.facts else None
        if isinstance(asked, int):
            answers = next(iter(self.correct.values()), np.empty(0))
            return np.full(answers.size // asked, asked)
        return None if asked is None else np.asarray(asked)

    @cached_property
    def best_trivial(self) -> tuple[str, float] | None:
        """Name and test accuracy of the strongest trivial predictor."""
        trivial = self.facts.trivial if self.facts else {}
        return max(sorted(trivial.items()), key=lambda item: item[1]) if trivial else None

    @cached_property
    def beats_trivial(self) -> str:
        """ "yes", "unclear" (above it, but within the noise), "no", or "" where not known.

        The noise is the 95 % interval over seeds, or for one seed that of the finite test set, an
        example counted once however much it asks.
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
            examples = len(self.asked) if self.asked is not None else answers.size
            low = proportion_interval(int(answers.mean() * examples), examples)[0]
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
        if self.speed and self.speed.disturbed:
            share = f"{100 * (self.speed.waited or 0.0):.0f} %"
            lines.append(
                f"speed and memory measured while others had the cores {share} of the time"
            )
        at = [f"{name} {100 * score.mean:.1f}" for name, score in self.further.items()]
        if at:
            lines.append(f"accuracy at {', '.join(at)}")
        metric = self.facts.metric if self.facts else "accuracy"
        if metric != "accuracy" and (score := self.over_seeds(f"test_{metric}")):
            lines.append(f"{metric} {100 * score.mean:.1f}")
        return lines

    @cached_property
    def further(self) -> dict[str, Summary]:
        """Test accuracy over the finished seeds on each further test set, by its name."""
        prefix = "test_accuracy@"
        names = {name for trial in self.trials for name in trial.metrics or () if prefix in name}
        found = {
            name.removeprefix(prefix): self.over_seeds(name)
            for name in sorted(names, key=lambda name: (len(name), name))
        }
        return {name: summary for name, summary in found.items() if summary}

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
        ablated: cells of variants that an ablation compares with a baseline of its own.
    """

    suite: str
    preset: str
    rows: tuple[Row, ...]
    older: tuple[Row, ...]
    absences: Mapping[tuple[str, str], str]
    ablated: frozenset[str] = frozenset()

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
        for record in scan(results, TaskRecord, skipped, _fault_of_facts)
    }
    speeds = list(scan(results, SpeedRecord, skipped, _fault_of_speed))
    selections = {completed(each.config).cell: each for each in scan(results, Selection, skipped)}
    known: set[str] = set()

    def fault(record: Record) -> str:
        trial = completed(record.config).hash
        wrong = "there is another record of its trial" if trial in known else _fault(record)
        known.update([] if wrong else [trial])
        return wrong

    cells: dict[str, list[Record]] = defaultdict(list)
    for record in scan(results, Record, skipped, fault):
        cells[completed(record.config).cell].append(record)

    rows: dict[tuple[str, str], list[Row]] = defaultdict(list)
    absences: dict[tuple[str, str], dict[tuple[str, str], str]] = defaultdict(dict)
    for cell, records in cells.items():
        row = _row(records, selections.get(cell), results, facts, speeds, skipped)
        rows[row.config.suite, row.config.preset].append(row)
    for absence in scan(results, Absence, skipped, lambda each: unnamed(each.suite, each.preset)):
        detail = absence.reason.removeprefix(f"no data for '{absence.task}'").removeprefix("; ")
        reason = absence.status + (detail if detail.startswith(" (") else f": {detail}")
        absences[absence.suite, absence.preset][absence.task, absence.model] = reason
    ablated = {
        point.cell
        for record in scan(results, AblationRecord, [])  # `report.ablations` names the unreadable
        for point in record.points
        if point.cell and point.variant
    }
    found = sorted(rows.keys() | absences.keys(), key=lambda pair: (pair[0], _rank(pair[1])))
    return [_suite(*pair, rows[pair], absences[pair], ablated) for pair in found], skipped


def _suite(
    suite: str,
    preset: str,
    rows: list[Row],
    absences: Mapping[tuple[str, str], str],
    ablated: Set[str],
) -> SuiteResults:
    rows = sorted(_tell_apart(rows), key=_order)
    current = tuple(row for row in rows if not row.older)
    present = {(row.config.task, row.config.model) for row in current}
    missing = {pair: reason for pair, reason in sorted(absences.items()) if pair not in present}
    named = {task for task, _ in present} | {task for task, _ in missing}
    for name in suites().get(suite, []):
        if name not in named:
            reason = tasks.get(name).omitted.get(preset)
            missing[name, ""] = f"left out of {preset}: {reason}" if reason else NOT_RUN
    older = tuple(row for row in rows if row.older)
    apart = frozenset(row.cell for row in current if row.variant and row.cells & ablated)
    return SuiteResults(suite, preset, current, older, missing, apart)


def _row(
    records: list[Record],
    selection: Selection | None,
    results: Path,
    facts: Mapping[tuple[str, str, int, str], TaskRecord],
    speeds: Iterable[SpeedRecord],
    skipped: list[str],
) -> Row:
    records = sorted(records, key=lambda each: (each.config.seed, each.config.learning_rate))
    if selection and any(each.config.learning_rate == selection.learning_rate for each in records):
        rate = selection.learning_rate
    else:
        selection, rate = None, _best_rate(records)
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
        selection=selection,
        histories={
            seed: _read_history(folder / "history.jsonl") for seed, folder in folders.items()
        },
    )


def _fault(record: Record) -> str:
    """Why a well-formed record cannot be one of ours, or ""."""
    config, metrics = record.config, record.metrics or {}
    if record.hash != config.hash:
        return "the record's hash is not that of its config"
    if wrong := unnamed(config.suite, config.preset):
        return wrong
    shares = (metrics.get(name, -1.0) for name in ("test_accuracy", "validation_accuracy"))
    if record.outcome == "finished" and not all(0 <= share <= 1 for share in shares):
        return "finished, but without accuracies in [0, 1]"
    return ""


def _fault_of_facts(facts: TaskRecord) -> str:
    if not all(0 <= share <= 1 for share in (facts.chance, *facts.trivial.values())):
        return "an accuracy outside [0, 1]"
    asked = facts.asked if isinstance(facts.asked, tuple) else (facts.asked or 1,)
    return "" if min(asked, default=0) >= 0 < sum(asked) else "a test set that asks nothing"


def _fault_of_speed(speed: SpeedRecord) -> str:
    return "" if speed.tokens_per_second > 0 else "a speed that is none"


def unnamed(*names: str) -> str:
    """What is wrong with names that are to be part of a file's, or ""."""
    return "" if all(map(PLAIN.fullmatch, names)) else "a name that no file can have"


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


def _read_history(path: Path) -> list[dict[str, float]]:
    """A trial's validations by step; a line cut short by a crash ends them."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    history: dict[int, dict[str, float]] = {}
    for line in lines:
        try:
            entry = {str(key): float(value) for key, value in json.loads(line).items()}
            if not all(map(math.isfinite, entry.values())):
                break
            history[int(entry["step"])] = entry
        except (ValueError, KeyError, TypeError, AttributeError):
            break
    return [history[step] for step in sorted(history)]


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
        standard.pop(WIDTH, None)
    actual = _settings(config)
    return tuple(
        f"{key}={_plain(actual[key])}"
        for key in sorted(actual.keys() & standard.keys())
        if _canonical(actual[key]) != _canonical(standard[key])
    )


def _tell_apart(rows: list[Row]) -> list[Row]:
    """Add to the variants whatever else rows of one task, model and variant differ in.

    A width that was solved is not named unless nothing else tells two rows apart.
    """
    alike: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        alike[row.config.task, row.config.model, row.variant, row.older].append(row)
    told: dict[str, Row] = {}
    for group in alike.values():
        settings = [_settings(row.config) for row in group]
        differing = [
            key
            for key in sorted(set().union(*settings))
            if len({_canonical(each.get(key)) for each in settings}) > 1
        ]
        extras = [
            tuple(
                f"{key}={_plain(own[key])}"
                for key in differing
                if key in own and not (key == WIDTH and row.fact("matched"))
            )
            for row, own in zip(group, settings, strict=True)
        ]
        if len(set(extras)) < len(group):
            extras = [
                tuple(f"{key}={_plain(own[key])}" for key in differing if key in own)
                for own in settings
            ]
        for row, extra in zip(group, extras, strict=True):
            told[row.cell] = replace(row, variant=row.variant + extra)
    return [told[row.cell] for row in rows]


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
