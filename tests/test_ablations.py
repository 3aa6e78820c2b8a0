"""Ablations: what is declared is planned as `run` would plan it, trained once, and written down."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flexbench import ablations
from flexbench.ablations import read
from flexbench.cli import main
from flexbench.config import PRESETS
from flexbench.errors import UserError
from flexbench.harness import Done, SweepResult, plan, plan_ablation, run, run_ablation, sweep
from flexbench.harness.executor import Inline
from flexbench.records import AblationRecord, Record, scan
from flexbench.tasks.store import Store

OWN = """
question: Is a wider mixer better?
model: toys:Mixer
settings:
  training.steps: 4
  training.evaluations: 1
changes:
  wide: {toys:Mixer.d_inner: 16}
  seer: {model: toys:Seer}
tasks: [toy/toy]
"""

BLOCKS = """
question: How long should a leaf be?
model: flexblock
settings: {toy.length: 64, training.steps: 4, training.evaluations: 1}
grid: {flexblock.l0: [8, 16]}
tasks: [toy/toy]
plot: {x: flexblock.l0, log: true, y: [accuracy, tokens_per_second]}
"""


def declare(tmp_path: Path, text: str, name: str = "mine") -> str:
    path = tmp_path / f"{name}.yaml"
    path.write_text(text)
    return str(path)


def ablate(
    results: Path, which: str, events: list[Any] | None = None, **options: Any
) -> tuple[AblationRecord, SweepResult]:
    return run_ablation(
        plan_ablation(which, **options),
        results=results,
        store=Store(),
        executor=Inline(),
        observe=(events if events is not None else []).append,
        measure_speed=False,
    )


def trained(events: list[Any]) -> list[str]:
    return [event.trial.hash for event in events if isinstance(event, Done) and not event.cached]


# -- the declarations that come with flexbench -------------------------------------------------


@pytest.mark.parametrize("name", ablations.names())
def test_what_is_declared_is_planned_at_every_preset(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Widths are solved by building models, which at `paper` are large.
    monkeypatch.setattr(sweep, "backbone_parameters", lambda mixer, stack: 0)
    monkeypatch.setattr(sweep, "match_width", lambda mixer, stack, target: mixer)
    _, declared = read(name)
    assert declared.question.endswith("?")
    for preset in PRESETS:
        planned = plan_ablation(name, preset=preset, device="cpu")
        for task in declared.tasks[preset]:
            own = [each for each in planned.variants if each.task == task]
            assert own[0].label == ""
            assert own[0].factors.keys() >= own[1].factors.keys() - {"model"}
            assert len({each.label for each in own}) == len(own) >= 2
            assert all(each.cell.status == "planned" for each in own)
            if declared.plot.x:
                values = [each.factors[declared.plot.x] for each in own]
                assert len(set(values)) == len(values)


@pytest.mark.parametrize("name", ["l0", "merge", "remerge"])
def test_blocks_are_compared_where_they_can_matter(name: str) -> None:
    for variant in plan_ablation(name, device="cpu").variants:
        options = variant.cell.grid[0].model_options
        assert options["rev"] == "learned"
        assert options["target_ratio"] < 1


def test_a_baseline_is_shared_by_ablations_and_by_run() -> None:
    cells = [plan_ablation(name, device="cpu").variants[0].cell for name in ("l0", "merge")]
    (run_cell,) = plan(
        "probes",
        tasks=["needles"],
        models=["flexblock"],
        device="cpu",
        overrides=["flexblock.target_ratio=0.25"],
    ).cells
    assert cells[0] == cells[1] == run_cell


# -- running -----------------------------------------------------------------------------------


def test_an_ablation_is_trained_once_and_written_down(toys: ModuleType, tmp_path: Path) -> None:
    which = declare(tmp_path, OWN)
    events: list[Any] = []
    record, result = ablate(tmp_path, which, events, seeds=2)
    assert len(trained(events)) == len(set(trained(events))) == 6
    assert [len(cell.records) for cell in result.cells] == [2, 2, 2]
    assert list(scan(tmp_path, AblationRecord, [])) == [record]
    assert record.path(tmp_path) == tmp_path / "ablations" / "mine" / "quick.json"
    assert (record.name, record.model, record.y) == ("mine", "toys:Mixer", ["accuracy"])
    assert [point.variant for point in record.points] == ["", "wide", "seer"]
    assert record.points[1].factors == {"toys:Mixer.d_inner": 16}
    assert record.points[0].factors["model"] == "toys:Mixer"
    cells = {each.config.cell for each in scan(tmp_path, Record, [])}
    assert {point.cell for point in record.points} == cells
    before = record.path(tmp_path).read_bytes()

    events.clear()
    ablate(tmp_path, which, events, seeds=3)
    assert len(trained(events)) == 3  # the new seed alone
    assert record.path(tmp_path).read_bytes() == before


@pytest.mark.parametrize("first", ["run", "ablate"])
def test_run_and_ablate_share_trials(toys: ModuleType, tmp_path: Path, first: str) -> None:
    which = declare(tmp_path, OWN)
    overrides = ["training.steps=4", "training.evaluations=1"]
    events: list[Any] = []

    def run_it() -> None:
        chosen = plan("toy", models=["toys:Mixer", "toys:Seer"], overrides=overrides)
        run(
            chosen,
            results=tmp_path,
            store=Store(),
            executor=Inline(),
            observe=events.append,
            measure_speed=False,
        )

    steps = [run_it, lambda: ablate(tmp_path, which, events)]
    for step in steps if first == "run" else reversed(steps):
        step()
    assert len(trained(events)) == 3
    assert sum(isinstance(event, Done) for event in events) == 5


def test_a_variant_of_too_few_leaves_is_skipped(toys: ModuleType, tmp_path: Path) -> None:
    which = declare(tmp_path, BLOCKS.replace("[8, 16]", "[4, 8, 16]"))
    record, result = ablate(tmp_path, which)
    by_label = {point.variant: point for point in record.points}
    assert by_label["l0=16"].cell is None
    assert by_label["l0=16"].reason == "skipped: too short: 4 blocks a sequence, 8 are wanted"
    assert by_label["l0=8"].cell
    assert by_label["l0=8"].reason == ""
    # The baseline's l0 is the preset's, of which there is one leaf.
    assert by_label[""].factors == {"flexblock.l0": 64}
    assert by_label[""].reason == "skipped: too short: 1 blocks a sequence, 8 are wanted"
    assert [cell.cell.status for cell in result.cells] == [
        "skipped",
        "planned",
        "planned",
        "skipped",
    ]


def test_a_task_without_data_says_so(toys: ModuleType, tmp_path: Path) -> None:
    settings = "settings:\n  toy.available: false"
    record, _ = ablate(tmp_path, declare(tmp_path, OWN.replace("settings:", settings)))
    assert all(point.cell is None for point in record.points)
    assert record.points[0].reason.startswith("no data: 'toy' cannot be had")


def test_the_command(toys: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results"
    options = ["--results", str(results), "--workers", "0", "--device", "cpu"]
    which = declare(tmp_path, OWN + "seeds: {quick: 2}\n")
    assert main(["ablate", which, *options]) == 0
    text = capsys.readouterr().out
    assert "Is a wider mixer better?" in text
    assert [line.split()[1] for line in text.splitlines() if line.startswith("toy/toy")] == [
        "toys:Mixer",
        "wide",
        "seer",
    ]
    assert len(list(scan(results, Record, []))) == 6


# -- the user's own ----------------------------------------------------------------------------


def test_settings_of_other_tasks_and_models_are_left_to_them(
    toys: ModuleType, tmp_path: Path
) -> None:
    text = OWN.replace("[toy/toy]", "{quick: {toy/toy: {training.steps: 6}, probes/needles: {}}}")
    text = text.replace("settings:", "settings:\n  toy.length: 12\n  toys:Mixer.d_inner: 6")
    planned = plan_ablation(declare(tmp_path, text))
    trials = {(each.task, each.label): each.cell.grid[0] for each in planned.variants}
    assert trials["toy/toy", ""].task_options["length"] == 12
    assert trials["toy/toy", ""].training.steps == 6
    assert trials["probes/needles", ""].training.steps == 4
    assert trials["probes/needles", ""].task_options["length"] == 512
    assert trials["probes/needles", ""].model_options["d_inner"] == 6
    assert trials["toy/toy", "seer"].model_options["d_inner"] != 6


def test_off_is_text(toys: ModuleType, tmp_path: Path) -> None:
    text = OWN.replace("toys:Mixer", "flexblock").replace(
        "{flexblock.d_inner: 16}", "{flexblock.rev: off}"
    )
    planned = plan_ablation(declare(tmp_path, text))
    assert planned.variants[1].cell.grid[0].model_options["rev"] == "off"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("question:", "qestion:", "unknown key 'mine.qestion'; did you mean 'question'?"),
        ("tasks: [toy/toy]", "", "'mine.tasks' is missing"),
        ("model: toys:Mixer", "model: mamab", "unknown model 'mamab'; did you mean 'mamba'?"),
        ("toy/toy", "toy/tyo", "unknown task 'toy/tyo'; did you mean 'toy/toy'?"),
        ("[toy/toy]", "{quik: [toy/toy]}", "unknown preset 'quik'; did you mean 'quick'?"),
        ("[toy/toy]", "{small: [toy/toy]}", "'mine' declares no tasks at preset 'quick'"),
        ("training.steps", "training.stps", "unknown key 'training.stps'; did you mean 'steps'?"),
        ("Mixer.d_inner: 16", "Mixer.d_inner: wide", "bad value"),
        ("d_inner: 16", "d_inner: 76", "variant 'wide' of 'mine' changes nothing on toy/toy"),
        ("{model: toys:Seer}", "{toys:Mixer.d_inner: 16}", "'seer' of 'mine' is the same as"),
        ("changes:", "grid: {training.steps: [4]}\nchanges:", "changes or a grid"),
        ("tasks:", "plot: {y: [acuracy]}\ntasks:", "mine.plot.y"),
        ("tasks:", "plot: {x: modle}\ntasks:", "sets the plot's x, 'modle'; did you mean 'model'?"),
        ("question: Is", "question: [Is", "is not YAML"),
        (OWN, "- a list", "is no declaration"),
    ],
)  # fmt: skip
def test_a_bad_declaration_is_one_sentence(
    toys: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    old: str,
    new: str,
    words: str,
) -> None:
    which = declare(tmp_path, OWN.replace(old, new))
    assert main(["ablate", which, "--results", str(tmp_path / "results")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert words in said.err
    assert not (tmp_path / "results").exists()


def test_names_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown ablation 'rve'; did you mean 'rev'"):
        read("rve")
    with pytest.raises(UserError, match="cannot read nowhere"):
        read("nowhere.yaml")
    with pytest.raises(UserError, match=r"'rev' is a declared ablation; give .* another name"):
        read(declare(tmp_path, OWN, "rev"))
    assert read(str(ablations.FOLDER / "rev.yaml")) == read("rev")
