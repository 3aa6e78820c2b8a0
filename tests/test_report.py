"""The report from made-up records: what is shown, what is kept apart, and that it is repeatable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from flexbench import report
from flexbench.config import Preset, StackConfig, TrainingConfig
from flexbench.errors import UserError
from flexbench.records import (
    Absence,
    Record,
    Selection,
    SpeedRecord,
    TaskRecord,
    TrialConfig,
    write_json,
)
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


@pytest.fixture(autouse=True)
def _toy_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    base.registry.names()
    monkeypatch.setitem(base.registry._entries, "listing", Listing)
    monkeypatch.setitem(base.registry._entries, "maze", LeftOut)


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
            json.dumps({"step": step, "validation_accuracy": accuracy * (1 - 2 ** (-step / 150))})
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
        diagnostics={"computed_token_ratio": 1.0} if metrics else {},
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
        "data_source": {"kind": "regenerated", "detail": "published generator, seed 0"},
        "license": "Apache-2.0",
    }
    record = TaskRecord(**(values | changes))
    write_json(record.path(results), record)


def speed(results: Path, rate: float, **changes: Any) -> None:
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
        machine="Some CPU, 2 cores",
    )
    write_json(record.path(results), record)


def only(results: Path) -> SuiteResults:
    (suite,), _ = collect(results)
    return suite


def bytes_of(results: Path) -> dict[str, bytes]:
    files = [*(results / "tables").iterdir(), *(results / "plots").iterdir()]
    return {str(path.relative_to(results)): path.read_bytes() for path in files}


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
    assert "letters  no data: run `python -m flexbench data fetch letters`" in shown(tmp_path)
    trial(tmp_path, 0.5, task="letters")
    assert "no data" not in shown(tmp_path)


def test_omitted_and_unasked_tasks_are_named(tmp_path: Path) -> None:
    trial(tmp_path, 0.5, task="other")
    text = shown(tmp_path)
    assert "maze  left out of quick: not learnt within its budget" in text
    assert "not run: listing" in text


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
    (pair,) = pairs(only(tmp_path))
    assert pair.verdict == "undecided"
    assert pair.comparison.bootstrap is not None
    assert 0.4 < pair.comparison.bootstrap[0] < 0.6 < pair.comparison.bootstrap[1] < 0.8


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
        report.write(tmp_path / name)
    first = bytes_of(tmp_path / "a")
    assert first == bytes_of(tmp_path / "b")
    report.write(tmp_path / "a")
    assert first == bytes_of(tmp_path / "a")
    assert sorted(first) == [
        "plots/toy-quick-accuracy.png",
        "plots/toy-quick-learning.png",
        "plots/toy-quick-speed.png",
        "tables/toy-quick-vs-mamba.csv",
        "tables/toy-quick.csv",
        "tables/toy-quick.md",
    ]


def test_plots_show_something(tmp_path: Path) -> None:
    populate(tmp_path)
    report.write(tmp_path)
    for path in (tmp_path / "plots").iterdir():
        image = imread(path)
        assert image.shape[0] > 300
        assert image.shape[1] > 600
        colours = {tuple(pixel) for pixel in image.reshape(-1, image.shape[2])}
        assert (0.0, float(np.float32(0x72 / 255)), float(np.float32(0xB2 / 255)), 1.0) in {
            tuple(float(part) for part in colour) for colour in colours
        }


def test_the_csv_reads_back(tmp_path: Path) -> None:
    populate(tmp_path)
    report.write(tmp_path)
    table = pd.read_csv(tmp_path / "tables" / "toy-quick.csv")
    assert set(table["task"]) == {"listing", "pairing", "maze"}
    assert (table["accuracy"].dropna() > 1).all()  # percent
    assert table["seeds"].tolist().count(3) == 6


def test_the_terminal_table_fits(tmp_path: Path) -> None:
    populate(tmp_path)
    trial(tmp_path, 0.5, model="some.rather.long.package.name:AndALongMixer")
    trial(tmp_path, model="bimamba", outcome="failed", seed=5)
    widths = [len(line) for line in shown(tmp_path).splitlines()]
    assert max(widths) <= 120


def test_no_records_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no records"):
        report.write(tmp_path / "nothing")


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
