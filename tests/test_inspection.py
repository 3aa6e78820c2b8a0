"""`flexbench inspect`: pictures of what a trained model does, or one sentence why not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from flexbench.cli import main
from flexbench.harness import make_executor, plan, run
from flexbench.inspection import find_run, look
from flexbench.models.flexblock import GuideMap
from flexbench.tasks.base import registry
from flexbench.tasks.store import Store

TINY = ["stack.d_model=8", "training.steps=2", "training.evaluations=1", "training.batch_size=4"]


def trained(results: Path, task: str, model: str, *settings: str, suite: str = "probes") -> None:
    options = [*TINY, f"{task}.validation=8", f"{task}.test=8", *settings]
    chosen = plan(suite, tasks=[task], models=[model], overrides=options, device="cpu")
    executor = make_executor(0, device="cpu")
    run(chosen, results=results, store=Store(), executor=executor, measure_speed=False)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLEXBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "results"


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_the_map_of_every_sample_is_found(results, scope):
    trained(results, "hindsight", "flexblock", f"flexblock.scope={scope}")
    record, directory = find_run("hindsight", "flexblock", results)
    data = registry.get("hindsight").parse(record.config.task_options).load(Store())
    seen = list(look(record, directory, data, 3))
    assert len(seen) == 3
    for sample in seen:
        maps = [value for _, value in sample.traces if isinstance(value, GuideMap)]
        assert len(maps) == (1 if scope == "model" else 2)
        assert all(guide.lengths.tolist() == [256] for guide in maps)
    again = data.test.batch(np.array([2]))
    assert (seen[2].batch.inputs == again.inputs).all()


def test_pictures_of_tokens_and_of_images(results, capsys):
    trained(results, "needles", "flexblock", "flexblock.target_ratio=0.5")
    assert main(["inspect", "--task", "needles", "--model", "flexblock", "--results", str(results),
                 "--samples", "2"]) == 0  # fmt: skip
    path = Path(capsys.readouterr().out.strip())
    assert path == results / "inspect" / "needles-flexblock.png"
    picture = imread(path)
    assert picture.shape[1] > 1000
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 20


def test_a_run_without_traces_still_shows_its_input(results, capsys):
    trained(results, "hindsight", "mamba")
    record = next(results.glob("runs/**/record.json"))
    output = results / "here.png"
    assert main(["inspect", "--task", "hindsight", "--model", str(record.parent), "--results",
                 str(results), "--output", str(output)]) == 0  # fmt: skip
    assert imread(output).any()


def test_what_is_not_there_is_one_sentence(results, capsys):
    def complaint(*arguments: str) -> str:
        assert main(["inspect", *arguments, "--results", str(results)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "no run of 'mamba'" in complaint("--task", "needles", "--model", "mamba")
    assert "unknown task" in complaint("--task", "needls", "--model", "mamba")
    trained(results, "hindsight", "mamba")
    assert "did you mean 'mamba'" in complaint("--task", "hindsight", "--model", "mambo")
    assert "at least 1" in complaint("--task", "hindsight", "--model", "mamba", "--samples", "0")
    directory = next(results.glob("runs/**/record.json")).parent
    assert "not of 'needles'" in complaint("--task", "needles", "--model", str(directory))
    (directory / "best.pt").write_bytes(b"PK")
    assert "does not fit" in complaint("--task", "hindsight", "--model", "mamba")
    (directory / "best.pt").unlink()
    assert "weights" in complaint("--task", "hindsight", "--model", "mamba")
    record = json.loads((directory / "record.json").read_text())
    (directory / "record.json").write_text(json.dumps({**record, "hash": 7}))
    assert "not a Record" in complaint("--task", "hindsight", "--model", str(directory))
