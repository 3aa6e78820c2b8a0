"""The report from made-up records: what is shown, what is kept apart, and that it is repeatable."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread

from flexbench import report
from flexbench.config import Preset, StackConfig, TrainingConfig
from flexbench.errors import UserError
from flexbench.records import (
    AblationPoint,
    AblationRecord,
    Absence,
    Record,
    Selection,
    SpeedRecord,
    TaskRecord,
    TrialConfig,
    write_json,
)
from flexbench.report import plots, views
from flexbench.report.ablations import ablations
from flexbench.report.pairs import pairs
from flexbench.report.results import SuiteResults, collect
from flexbench.report.tables import frame, markdown, megabytes, quantity, terminal
from flexbench.tasks import base

EXAMPLES = 400
STACK = StackConfig()
TRAINING = TrainingConfig(steps=800)


class Listing(base.Task):
    """A registered task without data, to stand for one."""

    suite: ClassVar[str] = "toy"
    summary: ClassVar[str] = "a toy"
    version: ClassVar[int] = 2
    chance: ClassVar[float] = 0.1
    published: ClassVar[dict[str, float]] = {"mamba": 38.02, "S5": 62.15}
    published_source: ClassVar[str] = "arXiv 0000.00000 table 3"
    presets: ClassVar[dict[str, Preset]] = {
        "quick": Preset(options={"length": 100}, stack=STACK, training=TRAINING)
    }
    length: int = 50

    def prepare(self, store: Any) -> None: ...
    def load(self, store: Any) -> Any: ...
    def trivial_predictors(self, data: Any) -> dict[str, float]:
        return {}


class LeftOut(Listing):
    omitted: ClassVar[dict[str, str]] = {"quick": "not learnt within its budget"}


@pytest.fixture(autouse=True, scope="module")
def _toy_suite() -> Iterator[None]:
    base.registry.names()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(base.registry._entries, "listing", Listing)
        monkeypatch.setitem(base.registry._entries, "maze", LeftOut)
        yield


@pytest.fixture(scope="module")
def drawn(_toy_suite: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on a bit of everything, to be looked at and not changed."""
    results = tmp_path_factory.mktemp("drawn")
    populate(results)
    sweep(results)
    trial(results, 0.5, model="my.own:Mixer")
    trial(results, 0.5, suite="other", task="else", preset="small")
    report.read(results).write()
    return results


def config(model: str = "mamba", seed: int = 0, **changes: Any) -> TrialConfig:
    values: dict[str, Any] = {
        "suite": "toy",
        "task": "listing",
        "task_version": 2,
        "task_options": {"length": 100},
        "model": model,
        "model_version": 1,
        "model_options": {},
        "stack": STACK,
        "training": TRAINING,
        "learning_rate": 0.003,
        "preset": "quick",
        "seed": seed,
    }
    return TrialConfig(**(values | changes))


def trial(
    results: Path,
    accuracy: float | None = 0.5,
    *,
    outcome: str = "finished",
    metrics: dict[str, float] | None = None,
    diagnostics: Mapping[str, float] = MappingProxyType({"computed_token_ratio": 1.0}),
    **changes: Any,
) -> Record:
    """Write one trial as the harness would; `accuracy` None: no metrics."""
    settings = config(**changes)
    folder = settings.directory(results)
    if outcome == "finished" and accuracy is not None:
        right = np.zeros(EXAMPLES, dtype=np.bool_)
        right[: round(accuracy * EXAMPLES)] = True
        right = np.random.default_rng(settings.seed).permutation(right)
        metrics = {
            "test_accuracy": float(right.mean()),
            "test_loss": 1.0,
            "test_examples": EXAMPLES,
            "validation_accuracy": float(right.mean()),
            "validation_loss": 1.0,
            "best_step": 800,
            **(metrics or {}),
        }
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "correct.npy", np.packbits(right), allow_pickle=False)
        steps = range(100, 801, 100)
        lines = [
            json.dumps(
                {
                    "step": step,
                    "validation_accuracy": accuracy * (1 - 2 ** (-step / 150)),
                    **diagnostics,
                }
            )
            for step in steps
        ]
        (folder / "history.jsonl").write_text("\n".join(lines) + "\n")
    record = Record(
        hash=settings.hash,
        config=settings,
        outcome=outcome,  # type: ignore[arg-type]
        metrics=metrics,
        model_facts={
            "parameters": 65_210,
            "backbone_parameters": 60_000,
            "baseline_parameters": 60_100,
            "matched": True,
            "state_size": 2048,
            "flops_per_token": 131_072.0,
        }
        if metrics
        else {},
        diagnostics=diagnostics if metrics else {},
        data_source={"kind": "regenerated", "detail": "seed 0"},
        error=None if outcome == "finished" else "Traceback …\nRuntimeError: it broke",
    )
    write_json(folder / "record.json", record)
    return record


def facts(results: Path, task: str = "listing", trivial: float = 0.3, **changes: Any) -> None:
    values: dict[str, Any] = {
        "suite": "toy",
        "task": task,
        "task_version": 2,
        "task_options": {"length": 100},
        "preset": "quick",
        "metric": "accuracy",
        "chance": 0.1,
        "trivial": {"majority": 0.12, "majority given the root operator": trivial},
        "asked": 1,
        "data_source": {"kind": "regenerated", "detail": "published generator, seed 0"},
        "license": "Apache-2.0",
    }
    record = TaskRecord(**(values | changes))
    write_json(record.path(results), record)


def speed(results: Path, rate: float, waited: float | None = None, **changes: Any) -> None:
    plain = config(**changes).model_dump(mode="json")
    apart = ("training", "seed", "learning_rate", "preset", "threads")
    key = {name: value for name, value in plain.items() if name not in apart}
    key |= {"batch_size": TRAINING.batch_size, "threads": 2}
    record = SpeedRecord(
        key=key,
        tokens_per_second=rate,
        step_seconds=0.08,
        peak_memory=212_400_000,
        repeats=5,
        waited=waited,
        machine="Some CPU, 2 cores",
    )
    write_json(record.path(results), record)


def only(results: Path) -> SuiteResults:
    (suite,), _ = collect(results)
    return suite


def bytes_of(results: Path) -> dict[str, bytes]:
    """Everything that is not a raw record."""
    names = [*(results / "tables").iterdir(), *(results / "plots").iterdir()]
    names += [results / "index.html", results / "derived.txt"]
    return {str(path.relative_to(results)): path.read_bytes() for path in names}


def sweep(
    results: Path, *, x: str | None = "flexblock.l0", y: tuple[str, ...] = ("accuracy",)
) -> None:
    """An ablation of three sizes by two seeds, and a point that was skipped."""
    points = []
    for place, l0 in enumerate((16, 64, 256)):
        changes: dict[str, Any] = {"model": "flexblock", "model_options": {"l0": l0}}
        for seed in range(2):
            record = trial(results, 0.5 + 0.1 * place + 0.01 * seed, seed=seed, **changes)
        points.append(
            AblationPoint(
                task="toy/listing",
                variant="" if l0 == 64 else f"l0={l0}",
                factors={"flexblock.l0": l0},
                cell=record.config.cell,
            )
        )
    reason = "skipped: too short: 4 blocks a sequence, 8 are wanted"
    points.append(
        AblationPoint(
            task="toy/listing", variant="l0=512", factors={"flexblock.l0": 512}, reason=reason
        )
    )
    record = AblationRecord(
        name="l0",
        question="How small must the smallest block be?",
        preset="quick",
        model="flexblock",
        x=x,
        log_x=True,
        y=list(y),
        points=tuple(points),
        declaration={},
    )
    write_json(record.path(results), record)


def populate(results: Path) -> None:
    """Three models, two tasks, three seeds, with everything that can go wrong."""
    accuracies = {"mamba": 0.43, "bimamba": 0.62, "alternating": 0.28}
    for task, shift in {"listing": 0.0, "pairing": 0.15}.items():
        facts(results, task)
        for place, (model, accuracy) in enumerate(accuracies.items()):
            speed(results, 41_000.0 / (place + 1), task=task, model=model)
            for seed in range(3):
                value = accuracy + shift + 0.01 * (seed - 1) * (place + 1)
                trial(results, value, task=task, model=model, seed=seed)


def line_of(results: Path, **wanted: Any) -> dict[str, Any]:
    """The one line of the CSV's table that has these values."""
    lines = frame(only(results)).to_dict("records")
    (line,) = [
        each for each in lines if all(each.get(key) == value for key, value in wanted.items())
    ]
    return line


def shown(results: Path) -> str:
    suite = only(results)
    return terminal(suite, pairs(suite))


# -- what a row says --------------------------------------------------------------------------


def test_mean_and_interval_over_seeds(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((0.40, 0.45, 0.50)):
        trial(tmp_path, accuracy, seed=seed)
    line = line_of(tmp_path, model="mamba")
    assert line["accuracy"] == pytest.approx(45.0)
    assert line["sd"] == pytest.approx(5.0)
    assert line["seeds"] == 3
    assert line["interval_high"] - line["accuracy"] == pytest.approx(12.4207, abs=1e-3)


def test_one_seed_has_a_blank_interval(tmp_path: Path) -> None:
    trial(tmp_path, 0.4)
    assert line_of(tmp_path, model="mamba")["interval_low"] is None
    (row,) = [line for line in shown(tmp_path).splitlines() if line.startswith("  mamba")]
    assert row.split()[:3] == ["mamba", "40.0", "–"]


def test_every_promised_column_is_there(tmp_path: Path) -> None:
    facts(tmp_path)
    trial(tmp_path, 0.5)
    speed(tmp_path, 41_000.0)
    line = line_of(tmp_path, model="mamba")
    assert line["chance"] == 10.0
    assert (line["best_trivial"], line["best_trivial_name"]) == (
        30.0,
        "majority given the root operator",
    )
    assert line["published"] == 38.02
    assert (line["parameters"], line["state_size"]) == (65_210, 2048)
    assert line["flops_per_token"] == 131_072
    assert (line["tokens_per_second"], line["peak_memory"]) == (41_000.0, 212_400_000)
    assert line["computed_token_ratio"] == 1.0
    assert line["data"] == "regenerated"


@pytest.mark.parametrize(
    ("accuracies", "said"),
    [
        ([0.29], "no"),
        ([0.30], "no"),
        ([0.31], "unclear"),  # 124 of 400: Wilson from 26.7
        ([0.40], "yes"),  # 160 of 400: Wilson from 35.3
        ([0.32, 0.40], "unclear"),  # 36 ± 50.8
        ([0.39, 0.40, 0.41], "yes"),
    ],
)
def test_mark_against_the_best_trivial_predictor(
    tmp_path: Path, accuracies: list[float], said: str
) -> None:
    facts(tmp_path, trivial=0.30)
    for seed, accuracy in enumerate(accuracies):
        trial(tmp_path, accuracy, seed=seed)
    assert line_of(tmp_path, model="mamba")["beats_trivial"] == said
    assert ("✗" in shown(tmp_path)) == (said == "no")


def test_quick_says_that_it_is_not_comparable_and_paper_does_not(tmp_path: Path) -> None:
    trial(tmp_path / "a", 0.5)
    trial(tmp_path / "b", 0.5, preset="paper")
    assert "not comparable with published figures" in shown(tmp_path / "a")
    assert "not comparable" not in shown(tmp_path / "b")


def test_published_figures_stand_apart(tmp_path: Path) -> None:
    trial(tmp_path, 0.5)
    page = markdown(only(tmp_path))
    ours, _, theirs = page.partition("## Published")
    assert "62.1" not in ours
    assert "62.1" in theirs
    assert "arXiv 0000.00000 table 3" in theirs


# -- nothing is dropped -----------------------------------------------------------------------


def test_every_outcome_is_a_row(tmp_path: Path) -> None:
    facts(tmp_path)
    trial(tmp_path, 0.5)
    trial(tmp_path, model="bimamba", outcome="diverged")
    trial(tmp_path, model="alternating", outcome="failed")
    trial(tmp_path, model="my.own:Mixer", outcome="out of memory")
    text = shown(tmp_path)
    assert "seed 0 diverged" in text
    assert "seed 0 failed (RuntimeError: it broke)" in text
    assert "seed 0 out of memory" in text
    assert line_of(tmp_path, model="bimamba")["outcome"] == "1 of 1 diverged"


def test_survivors_are_counted(tmp_path: Path) -> None:
    trial(tmp_path, 0.5)
    trial(tmp_path, 0.6, seed=1)
    trial(tmp_path, seed=2, outcome="diverged")
    line = line_of(tmp_path, model="mamba")
    assert (line["seeds"], line["accuracy"], line["outcome"]) == (2, 55.0, "1 of 3 diverged")
    assert "2 of 3" in shown(tmp_path)


def test_absences_are_rows_until_there_is_a_trial(tmp_path: Path) -> None:
    absence = Absence(
        suite="toy",
        task="letters",
        model="mamba",
        preset="quick",
        status="no data",
        reason="run `python -m flexbench data fetch letters`",
    )
    write_json(absence.path(tmp_path), absence)
    assert "letters: no data: run `python -m flexbench data fetch letters`" in shown(tmp_path)
    trial(tmp_path, 0.5, task="letters")
    assert "no data" not in shown(tmp_path)


def test_omitted_and_unasked_tasks_are_named(tmp_path: Path) -> None:
    trial(tmp_path, 0.5, task="other")
    text = shown(tmp_path)
    assert "maze: left out of quick: not learnt within its budget" in text
    assert "listing: not run" in text


def test_an_unmatched_model_is_marked(tmp_path: Path) -> None:
    record = trial(tmp_path, 0.5, model="bimamba")
    unmatched = record.model_copy(update={"model_facts": {**record.model_facts, "matched": False}})
    write_json(record.config.directory(tmp_path) / "record.json", unmatched)
    assert "65.2k≠" in shown(tmp_path)


# -- nothing is pooled that differs -----------------------------------------------------------


def test_older_versions_stand_apart(tmp_path: Path) -> None:
    trial(tmp_path, 0.5)
    trial(tmp_path, 0.9, task_version=1, seed=1)
    suite = only(tmp_path)
    assert [row.summary.n for row in suite.rows if row.summary] == [1]
    assert [row.config.task_version for row in suite.older] == [1]
    assert "Older versions" in markdown(suite)
    assert line_of(tmp_path, older=True)["accuracy"] == 90.0


def test_overrides_are_rows_of_their_own(tmp_path: Path) -> None:
    trial(tmp_path, 0.5)
    trial(tmp_path, 0.2, training=TrainingConfig(steps=50), seed=1)
    trial(tmp_path, 0.3, task_options={"length": 70})
    assert line_of(tmp_path, variant="")["accuracy"] == 50.0
    assert line_of(tmp_path, variant="training.steps=50")["accuracy"] == 20.0
    assert line_of(tmp_path, variant="task.length=70")["accuracy"] == 30.0


def test_what_no_preset_explains_is_told_apart(tmp_path: Path) -> None:
    trial(tmp_path, 0.5, threads=1)
    trial(tmp_path, 0.4, threads=2)
    assert line_of(tmp_path, variant="threads=1")["seeds"] == 1
    assert line_of(tmp_path, variant="threads=2")["seeds"] == 1


def test_the_selected_learning_rate_is_shown(tmp_path: Path) -> None:
    trial(tmp_path, 0.6, learning_rate=0.01)
    chosen = trial(tmp_path, 0.5, learning_rate=0.001)
    assert line_of(tmp_path, model="mamba")["learning_rate"] == 0.01  # best on validation
    selection = Selection(
        config=chosen.config,
        grid={"0.001": 0.5, "0.01": 0.6},
        learning_rate=0.001,
        trials={"0": chosen.hash},
    )
    write_json(selection.path(tmp_path), selection)
    line = line_of(tmp_path, model="mamba")
    assert (line["learning_rate"], line["accuracy"], line["seeds"]) == (0.001, 50.0, 1)


def test_a_rate_that_diverged_is_noted(tmp_path: Path) -> None:
    trial(tmp_path, 0.5, learning_rate=0.001)
    trial(tmp_path, outcome="diverged", learning_rate=0.1)
    line = line_of(tmp_path, model="mamba")
    assert line["outcome"] == "finished"
    assert line["notes"] == "learning rate 0.1 at seed 0 diverged"


def test_further_scores_are_noted(tmp_path: Path) -> None:
    facts(tmp_path, metric="mcc")
    for seed, score in enumerate((0.5, 0.6)):
        further = {"test_mcc": score / 2, "test_accuracy@1024": score, "test_accuracy@64": 1.0}
        trial(tmp_path, 0.5, seed=seed, metrics=further)
    note = "accuracy at 64 100.0, 1024 55.0; mcc 27.5"
    assert line_of(tmp_path, model="mamba")["notes"] == note
    assert "accuracy at 64 100.0, 1024 55.0" in shown(tmp_path)


def test_a_solved_width_is_no_variant(tmp_path: Path) -> None:
    """Two rows that differ in what was set are told apart by that, not by the width it led to."""
    for threads, width in ((1, 51), (2, 63)):
        trial(tmp_path, 0.5, threads=threads, model_options={"d_inner": width, "d_state": 16})
    assert {row.variant for row in only(tmp_path).rows} == {("threads=1",), ("threads=2",)}


def test_a_width_set_by_hand_is_told_from_the_solved_one(tmp_path: Path) -> None:
    trial(tmp_path, 0.5, model_options={"d_inner": 51})
    wide = trial(tmp_path, 0.6, model_options={"d_inner": 63})
    facts = {**wide.model_facts, "matched": False}
    unmatched = wide.model_copy(update={"model_facts": facts})
    write_json(wide.config.directory(tmp_path) / "record.json", unmatched)
    told = {row.config.model_options["d_inner"]: row.variant for row in only(tmp_path).rows}
    assert told == {51: (), 63: ("model.d_inner=63",)}


# -- what cannot be read ----------------------------------------------------------------------


def test_half_written_and_foreign_files_are_named_and_skipped(tmp_path: Path) -> None:
    trial(tmp_path, 0.5)
    before = frame(only(tmp_path)).to_csv()
    for name, text in {"half": '{"hash": "ab', "foreign": '{"hello": 1}', "list": "[]"}.items():
        path = tmp_path / "runs" / "toy" / name / "record.json"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    (tmp_path / "speed").mkdir()
    (tmp_path / "speed" / "bad.json").write_text("")
    _, skipped = collect(tmp_path)
    assert len(skipped) == 4
    assert frame(only(tmp_path)).to_csv() == before


def keys(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The paths to all that a plain JSON value holds."""
    if isinstance(value, dict):
        inner = [(key, each) for key, each in value.items()]
    else:
        inner = list(enumerate(value)) if isinstance(value, list) else []
    return [path, *(deep for key, each in inner for deep in keys(each, (*path, key)))]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_change_to_a_record_is_fatal(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder)
        trial(results, 0.5)
        record = trial(results, 0.6, model="bimamba")
        path = record.config.directory(results) / "record.json"
        plain = json.loads(path.read_text())
        *above, last = data.draw(st.sampled_from(keys(plain)[1:]))
        place = plain
        for key in above:
            place = place[key]
        changed = st.sampled_from([None, -1, 1e999, math.nan, "", "../..", [], {}, True, "delete"])
        if (value := data.draw(changed)) == "delete":
            del place[last]
        else:
            place[last] = value
        if data.draw(st.booleans()):  # as if it had been written like that, hash and all
            with contextlib.suppress(ValueError, KeyError, TypeError):
                plain["hash"] = TrialConfig.model_validate(plain["config"]).hash
        path.write_text(json.dumps(plain))
        suites, _ = collect(results)
        for suite in suites:
            text = markdown(suite, pairs(suite))
            assert "nan" not in text
            terminal(suite, pairs(suite))
            frame(suite)


@pytest.mark.parametrize(
    "metrics", [{}, {"test_accuracy": math.nan}, {"test_accuracy": 7.0}, {"test_loss": math.inf}]
)
def test_a_record_that_contradicts_itself_is_named(
    tmp_path: Path, metrics: dict[str, float]
) -> None:
    trial(tmp_path, 0.5)
    record = trial(tmp_path, 0.6, model="bimamba")
    plain = {**record.model_dump(mode="json"), "metrics": metrics and record.metrics}
    plain["metrics"] = {**(plain["metrics"] or {}), **metrics}
    path = record.config.directory(tmp_path) / "record.json"
    path.write_text(json.dumps(plain))
    (line,) = report.read(tmp_path).skipped
    assert str(path.parent) in line


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", ".hidden", ""])
def test_no_name_in_a_record_leads_a_file_elsewhere(tmp_path: Path, name: str) -> None:
    results = tmp_path / "results"
    trial(results, 0.5)
    sweep(results)
    path = results / "ablations" / "l0" / "quick.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "name": name}))
    foreign = trial(results, 0.5, preset="small")
    strange = foreign.config.model_copy(update={"suite": name})
    text = foreign.model_copy(update={"config": strange, "hash": strange.hash})
    write_json(foreign.config.directory(results) / "record.json", text)
    found = report.read(results)
    assert len(found.skipped) == 2
    files = found.write()
    assert [each.name for each in tmp_path.iterdir()] == ["results"]
    derived = {each.relative_to(results).as_posix() for each in files}
    assert derived == {name for name in bytes_of(results) if name != "derived.txt"}


def test_a_record_copied_elsewhere_is_not_counted_twice(tmp_path: Path) -> None:
    record = trial(tmp_path, 0.5)
    foreign = record.model_copy(update={"hash": "0" * 12})
    write_json(tmp_path / "runs" / "toy" / "copy" / "record.json", foreign)
    suites, skipped = collect(tmp_path)
    assert len(suites[0].rows) == 1
    assert len(skipped) == 1


@pytest.mark.parametrize("damage", ["pickle", "short", "empty", "another trial's"])
def test_damaged_answers_cost_only_the_bootstrap(tmp_path: Path, damage: str) -> None:
    record = trial(tmp_path, 0.5)
    trial(tmp_path, 0.6, model="bimamba")
    path = record.config.directory(tmp_path) / "correct.npy"
    if damage == "pickle":
        np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif damage == "short":
        np.save(path, np.zeros(3, np.uint8))
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        np.save(path, np.zeros(EXAMPLES // 8, np.uint8))
    (suite,), skipped = collect(tmp_path)
    assert len(skipped) == 1
    assert str(path) in skipped[0]
    (pair,) = pairs(suite)
    assert pair.comparison.bootstrap is None
    assert pair.comparison.difference == pytest.approx(0.1)


@pytest.mark.parametrize(("waited", "noted"), [(None, False), (0.02, False), (0.39, True)])
def test_a_disturbed_measurement_is_noted(
    tmp_path: Path, waited: float | None, noted: bool
) -> None:
    trial(tmp_path, 0.5)
    speed(tmp_path, 9e4, waited=waited)
    said = "while others had the cores 39 % of the time"
    assert (said in markdown(only(tmp_path), [])) == noted


# -- comparisons ------------------------------------------------------------------------------


def test_pairs_use_shared_seeds_only(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((0.40, 0.41, 0.42)):
        trial(tmp_path, accuracy, seed=seed)
    for seed, accuracy in ((1, 0.51), (2, 0.52), (7, 0.99)):
        trial(tmp_path, accuracy, model="bimamba", seed=seed)
    (pair,) = pairs(only(tmp_path))
    assert pair.comparison.n == 2
    assert pair.comparison.difference == pytest.approx(0.10)


def test_pairs_never_mix_conditions(tmp_path: Path) -> None:
    trial(tmp_path, 0.5)
    trial(tmp_path, 0.9, model="bimamba", training=TrainingConfig(steps=50))
    assert pairs(only(tmp_path)) == []
    trial(tmp_path, 0.3, training=TrainingConfig(steps=50))
    (pair,) = pairs(only(tmp_path))
    assert pair.comparison.difference == pytest.approx(0.6)


def test_one_seed_is_bootstrapped_over_examples_and_undecided(tmp_path: Path) -> None:
    trial(tmp_path, 0.3)
    trial(tmp_path, 0.9, model="bimamba")
    facts(tmp_path)
    (pair,) = pairs(only(tmp_path))
    assert pair.verdict == "undecided"
    assert pair.comparison.bootstrap is not None
    assert 0.4 < pair.comparison.bootstrap[0] < 0.6 < pair.comparison.bootstrap[1] < 0.8


def test_the_bootstrap_draws_sequences_and_none_where_they_are_not_known(tmp_path: Path) -> None:
    trial(tmp_path, 0.3)
    trial(tmp_path, 0.9, model="bimamba")
    intervals = {}
    for asked in (1, 20, (EXAMPLES - 1, 1), None, 7):
        facts(tmp_path, asked=asked)
        (pair,) = pairs(only(tmp_path))
        intervals[asked] = pair.comparison.bootstrap
    assert intervals[None] is intervals[7] is None
    known = {intervals[asked] for asked in (1, 20, (EXAMPLES - 1, 1))}
    assert len(known) == 3
    assert all(found and found[0] < 0.6 < found[1] for found in known)
    facts(tmp_path, asked=(1, -1))
    assert "asks nothing" in collect(tmp_path)[1][0]


def test_a_sequence_counts_once_against_the_trivial_predictors(tmp_path: Path) -> None:
    trial(tmp_path, 0.5)
    found = {}
    for asked in (1, 20):
        facts(tmp_path, trivial=0.43, asked=asked)
        found[asked] = only(tmp_path).rows[0].beats_trivial
    assert found == {1: "yes", 20: "unclear"}


def test_holm_counts_every_comparison_of_the_table(tmp_path: Path) -> None:
    populate(tmp_path)
    found = pairs(only(tmp_path))
    assert len(found) == 4
    smallest = min(found, key=lambda pair: pair.comparison.p or 1.0)
    assert smallest.adjusted_p == pytest.approx(4 * (smallest.comparison.p or 0.0))


# -- files ------------------------------------------------------------------------------------


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        populate(tmp_path / name)
        report.read(tmp_path / name).write()
    first = bytes_of(tmp_path / "a")
    assert first == bytes_of(tmp_path / "b")
    assert sorted(first) == [
        "derived.txt",
        "index.html",
        "plots/toy-quick-accuracy-flops.png",
        "plots/toy-quick-accuracy-speed.png",
        "plots/toy-quick-accuracy.png",
        "plots/toy-quick-computed.png",
        "plots/toy-quick-effect.png",
        "plots/toy-quick-learning.png",
        "tables/toy-quick-vs-mamba.csv",
        "tables/toy-quick.csv",
        "tables/toy-quick.md",
    ]


def test_what_is_derived_can_be_deleted(tmp_path: Path) -> None:
    trial(tmp_path, 0.5)
    sweep(tmp_path)
    report.read(tmp_path).write()
    first = bytes_of(tmp_path)
    for name in first:
        (tmp_path / name).unlink()
    report.read(tmp_path).write()
    assert bytes_of(tmp_path) == first


def test_what_no_record_stands_behind_is_removed_and_nothing_else(tmp_path: Path) -> None:
    trial(tmp_path, 0.5)
    sweep(tmp_path)
    report.read(tmp_path).write()
    (tmp_path / "tables" / "notes.md").write_text("my own")
    (tmp_path / "plots" / "mine.png").write_text("my own")
    (tmp_path / "keep.txt").write_text("my own")
    with (tmp_path / "derived.txt").open("a") as manifest:
        manifest.write("keep.txt\n../escape.txt\ntables/../keep.txt\nruns\n")
    assert (tmp_path / "plots" / "ablation-l0-quick-effect.png").exists()
    (tmp_path / "ablations" / "l0" / "quick.json").unlink()
    report.read(tmp_path).write()
    assert not list((tmp_path / "plots").glob("ablation-*"))
    assert not list((tmp_path / "tables").glob("ablation-*"))
    assert "ablation" not in (tmp_path / "derived.txt").read_text()
    for name in ("tables/notes.md", "plots/mine.png", "keep.txt", "plots/toy-quick-accuracy.png"):
        assert (tmp_path / name).exists()


def test_plots_show_something(drawn: Path) -> None:
    for path in (drawn / "plots").glob("toy-*"):
        image = imread(path)
        assert image.shape[0] > 150
        assert image.shape[1] > 500
        blue = np.array([0x00, 0x72, 0xB2]) / 255  # bimamba's
        assert np.abs(image[..., :3] - blue).max(-1).min() < 0.05


def test_the_csv_reads_back(drawn: Path) -> None:
    table = pd.read_csv(drawn / "tables" / "toy-quick.csv")
    assert set(table["task"]) == {"listing", "pairing", "maze"}
    assert (table["accuracy"].dropna() > 1).all()  # percent
    assert table["seeds"].tolist().count(3) == 6
    assert table["seeds"].tolist().count(2) == 3


def test_the_terminal_table_fits(tmp_path: Path) -> None:
    populate(tmp_path)
    trial(tmp_path, 0.5, model="some.rather.long.package.name:AndALongMixer")
    trial(tmp_path, model="bimamba", outcome="failed", seed=5)
    widths = [len(line) for line in shown(tmp_path).splitlines()]
    assert max(widths) <= 120


def test_no_records_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no records"):
        report.read(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "–"),
        (0, "0"),
        (950, "950"),
        (999.6, "1.00k"),
        (65_210, "65.2k"),
        (131_072, "131k"),
        (999_900, "1.00M"),
        (1_310_000, "1.31M"),
        (2.5e10, "25.0G"),
    ],
)
def test_quantities(count: float | None, text: str) -> None:
    assert quantity(count) == text


def test_megabytes() -> None:
    assert megabytes(212_400_000) == "212 MB"


def test_every_share_of_blocks_counts_all_seeds(tmp_path: Path) -> None:
    """A level that only one of two seeds reached has half of that seed's share."""
    for seed, shares in enumerate(
        ({"level_0_share": 1.0}, {"level_0_share": 0.2, "level_1_share": 0.8})
    ):
        trial(tmp_path, 0.5, model="flexblock", seed=seed, diagnostics=shares)
    suite = only(tmp_path)
    view = views.of_suite(suite, [], views.Looks(suite.rows))
    (levels,) = [plot for plot in plots.plots(view) if plot.name == "levels"]
    figure, _ = plots.figure(levels, levels.panels(view))
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert widths == pytest.approx([60.0, 40.0])


def test_variants_share_the_panel_of_their_task(tmp_path: Path) -> None:
    trial(tmp_path, 0.5)
    for length in (70, 80, 90):
        trial(tmp_path, 0.3, model="bimamba", training=TrainingConfig(steps=length))
    suite = only(tmp_path)
    view = views.of_suite(suite, [], views.Looks(suite.rows))
    (panel,) = view.panels
    labels = [entry.label for entry in panel.entries]
    assert labels[0] == "mamba"
    assert sorted(labels[1:]) == [f"bimamba training.steps={steps}" for steps in (70, 80, 90)]
    assert len({(entry.look["color"], entry.look["marker"]) for entry in panel.entries}) == 4


def test_a_model_looks_the_same_everywhere(tmp_path: Path) -> None:
    for task, models in {"listing": ("mamba", "hzip"), "pairing": ("hzip", "bimamba")}.items():
        for model in models:
            trial(tmp_path, 0.5, task=task, model=model)
    suite = only(tmp_path)
    view = views.of_suite(suite, [], views.Looks(suite.rows))
    looks = {
        (entry.row.config.model, entry.look["color"], entry.look["marker"])
        for panel in view.panels
        for entry in panel.entries
    }
    assert len(looks) == 3


# -- ablations --------------------------------------------------------------------------------


def test_an_ablation_compares_its_variants_with_its_own_baseline(tmp_path: Path) -> None:
    trial(tmp_path, 0.9)
    sweep(tmp_path)
    suites, _ = collect(tmp_path)
    (ablation,) = ablations(tmp_path, suites, [])
    differences = {
        ablation.variants[cell].name: pair.comparison.difference
        for cell, pair in ablation.pairs.items()
    }
    assert differences == {"l0=16": pytest.approx(-0.1), "l0=256": pytest.approx(0.1)}
    compared = {pair.row.config.model_options["l0"] for pair in pairs(suites[0])}
    assert compared == {64}  # variants are not compared with mamba as well


def test_an_ablation_says_what_was_not_run(tmp_path: Path) -> None:
    sweep(tmp_path)
    trial(tmp_path, 0.5, seed=7, model="flexblock", model_options={"l0": 16})
    found = report.read(tmp_path)
    found.write()
    page = (tmp_path / "tables" / "ablation-l0-quick.md").read_text()
    assert "How small must the smallest block be?" in page
    assert "skipped: too short: 4 blocks a sequence, 8 are wanted" in page
    lines = found.ablations["l0", "quick"].splitlines()
    (skipped,) = [line for line in lines if "l0=512" in line]
    assert "skipped: too short" in skipped
    (smaller,) = [line for line in lines if "l0=16" in line]
    assert {"−10.0", "51.0", "(baseline)"} & set(smaller.split()) == {"−10.0"}
    assert smaller.split()[4] == "3"  # its own seeds, of which the baseline shares two
    table = pd.read_csv(tmp_path / "tables" / "ablation-l0-quick.csv").set_index("variant")
    assert table.loc["l0=16", "difference"] == pytest.approx(-10.0)
    assert table.loc["l0=256", "accuracy"] == pytest.approx(70.5)


def test_a_suite_s_table_leaves_variants_to_their_ablation_unless_asked_for(
    tmp_path: Path,
) -> None:
    trial(tmp_path, 0.5)
    sweep(tmp_path)
    found = report.read(tmp_path)
    text = found.table("toy", "quick")
    assert "flexblock" in text  # its baseline is a row like any other
    assert "l0=16" not in text
    assert "2 variants that ablations compare" in text
    asked = {row.cell for suite, _ in found.suites for row in suite.rows}
    text = found.table("toy", "quick", asked)
    assert "l0=16" in text
    assert "variants that" not in text


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([-1, 0.5, 0.8, 0.9, 1.5], ["-1", "0.5", "0.8", "\n0.9", "1.5"]),
        ([0, 1, 2], ["0", "1", "2"]),
        ([3], ["3"]),
    ],
)
def test_labels_of_ticks_do_not_run_into_each_other(
    places: list[float], expected: list[str]
) -> None:
    axis = Figure().subplots()
    axis.set_xlim(min(places), max(places) + 1)
    assert plots.staggered(axis, places, [f"{place:g}" for place in places]) == expected


@pytest.mark.parametrize("x", [None, "flexblock.l0"])
def test_every_measure_of_an_ablation_is_plotted(tmp_path: Path, x: str | None) -> None:
    measures = ("accuracy", "tokens_per_second", "computed_token_ratio", "test_loss", "unheard-of")
    sweep(tmp_path, x=x, y=measures)
    report.read(tmp_path).write()
    drawn = {path.stem for path in (tmp_path / "plots").glob("ablation-*.png")}
    assert drawn >= {f"ablation-l0-quick-{name}" for name in ("accuracy", "computed_token_ratio")}
    assert "ablation-l0-quick-unheard-of" not in drawn  # nobody knows it; no speed was measured


def test_a_curve_has_the_points_in_order(tmp_path: Path) -> None:
    sweep(tmp_path)
    suites, _ = collect(tmp_path)
    (ablation,) = ablations(tmp_path, suites, [])
    view = views.of_ablation(ablation, views.Looks(suites[0].rows))
    curve = plots.plots(view)[0]
    figure, _ = plots.figure(curve, curve.panels(view))
    axis = figure.axes[0]
    (line,) = [line for line in axis.lines if len(line.get_xdata()) == 3]
    assert list(line.get_xdata()) == [16, 64, 256]
    assert list(line.get_ydata()) == pytest.approx([50.5, 60.5, 70.5])
    assert axis.get_xscale() == "log"


# -- the page ---------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Collects what a page refers to, its identities and its tables' rows."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.identities: list[str] = []
        self.rows: list[dict[str, str | None]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links += [
            value or "" for name, value in attrs if name in ("href", "src", "xlink:href")
        ]
        self.identities += [found["id"] or ""] if "id" in found else []
        if tag == "tr" and "data-model" in found:
            self.rows.append(found)
        if tag not in ("meta", "br", "use", "path") and not (
            self.get_starttag_text() or ""
        ).endswith("/>"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()


def read_page(results: Path) -> tuple[str, Reader]:
    text = (results / "index.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    return text, reader


def test_the_page_needs_nothing_else_and_every_link_leads_to_a_record(drawn: Path) -> None:
    text, page = read_page(drawn)
    records = [link for link in page.links if not link.startswith("#")]
    assert len(records) > 18
    for link in records:
        assert ":" not in link
        assert json.loads((drawn / link).read_text())
    anchors = {link[1:] for link in page.links if link.startswith("#")}
    assert anchors <= set(page.identities)
    assert len(page.identities) == len(set(page.identities))
    assert "url(http" not in text
    assert "@import" not in text
    assert page.open == []


def test_the_page_shows_names_and_errors_as_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    trial(tmp_path, 0.5)
    record = trial(tmp_path, model="bimamba", outcome="failed")
    broken = record.model_copy(update={"error": f'RuntimeError: {evil} "quoted"'})
    write_json(record.config.directory(tmp_path) / "record.json", broken)
    report.read(tmp_path).write()
    text, _ = read_page(tmp_path)
    assert evil not in text
    assert "&lt;script&gt;alert(1)" in text


def test_the_page_filters_by_suite_preset_and_model(drawn: Path) -> None:
    text, page = read_page(drawn)
    assert {row["data-suite"] for row in page.rows} == {"toy", "other"}
    assert {"mamba", "bimamba", "alternating"} <= {row["data-model"] for row in page.rows}
    for option in ("toy", "other", "quick", "small", "bimamba"):
        assert f"<option>{option}</option>" in text
    assert 'data-model="bimamba"' in text[text.index("<svg") :]  # plots are dimmed by model too


def test_published_figures_are_marked_on_the_page(tmp_path: Path) -> None:
    trial(tmp_path, 0.5)
    report.read(tmp_path).write()
    text, _ = read_page(tmp_path)
    ours, _, theirs = text.partition("Published figures</h3>")
    assert "62.1" not in ours
    assert "62.1" in theirs
    assert '<td class="published">38.0</td>' in ours


def test_a_suite_s_share_of_the_results_is_small(tmp_path: Path) -> None:
    """A dozen of them, all at three seeds, are under 9 MiB."""
    shares = {f"level_{level}_share": 1 / 6 for level in range(6)} | {"computed_token_ratio": 0.4}
    for task in range(6):
        for place, model in enumerate(views.FAMILIES):
            speed(tmp_path, 9e4 / (place + 1), task=f"task-{task}", model=model)
            for seed in range(3):
                trial(
                    tmp_path,
                    0.3 + 0.1 * place + 0.02 * seed,
                    task=f"task-{task}",
                    model=model,
                    seed=seed,
                    metrics={f"test_accuracy@{64 << n}": 0.9 for n in range(0 if task else 9)},
                    diagnostics=shares if model == "flexblock" else {},
                )
    report.read(tmp_path).write()
    assert sum(map(len, bytes_of(tmp_path).values())) < 9 * 2**20 / 12
