"""The GPU's measurements, tried out on the CPU at sizes of no interest."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from flexbench import bench_gpu
from flexbench.errors import UserError


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"TOKENS": 16, "DIM": 16, "STATE": 2, "D_MODEL": 16, "N_LAYERS": 1, "SECONDS": 0.0}
    counts = {"WARM_UP": 1, "FEWEST": 1, "TURN": 1, "LONGEST_LOOP": 8}
    for name, value in (sizes | counts).items():
        monkeypatch.setattr(bench_gpu, name, value)
    short = {
        name: ((8, 200) if name == "step" else (8, 32), prepare)
        for name, (_, prepare) in bench_gpu.MEASUREMENTS.items()
    }
    monkeypatch.setattr(bench_gpu, "MEASUREMENTS", short)


def test_every_measurement_is_made_and_written(tmp_path, capsys):
    bench_gpu.main("cpu", [], tmp_path / "bench.json")
    facts = json.loads((tmp_path / "bench.json").read_text())
    assert facts["failed"] == []
    made = [(m["name"], m["shape"].split(", dim")[0]) for m in facts["measurements"]]
    scan, shapes = "selective_scan, forward", ("batch 2, length 8", "batch 1, length 32")
    for name in (scan, f"{scan} + backward", "hzip_fuse, forward + backward"):
        assert [shape for other, shape in made if other == name] == list(shapes)
    first, second = facts["measurements"][:2]
    assert set(first["milliseconds"]) == {"ours", "reference"}
    assert set(second["milliseconds"]) == {"ours"}  # too long for a loop over steps
    assert first["floor"] > 0
    steps = facts["measurements"][-1]
    third = "flexblock, a third"
    families = {"ours", "bimamba", "hzip-lean", third, f"{third} by its router"}
    assert set(steps["milliseconds"]) == families
    assert steps["floor"] is None
    text = (tmp_path / "bench.md").read_text()
    assert capsys.readouterr().out == text
    assert text.startswith(facts["machine"])
    assert "ours / floor" in text
    assert "| mamba " in text


def test_a_floor_is_the_larger_of_bytes_and_exponentials_pass_by_pass():
    rates = bench_gpu.Rates(bytes=1e12, exponentials=1e12)
    passes = (bench_gpu.Pass(4e9, 1e9), bench_gpu.Pass(1e9, 2e9))
    assert rates.floor(passes) == pytest.approx(6.0)
    assert rates.floor(()) is None
    assert bench_gpu.Rates(1e12, None).floor(passes) == pytest.approx(5.0)


def test_an_unknown_measurement_is_refused():
    with pytest.raises(UserError, match="did you mean 'scan'"):
        bench_gpu.main("cpu", ["scam"], None)


def test_the_claims_are_read_off_what_was_measured(capsys):
    script = Path(__file__).resolve().parents[1] / "scripts/measure-gpu"
    claims = runpy.run_path(str(script))["claims"]
    scan, step = "selective_scan, forward + backward", "training step of mamba"
    short, long = "batch 8, length 2048", "batch 1, length 16384"
    times = {"ours": 2.0, "official": 3.0}
    steps = {"ours": 10.0, "bimamba": 12.0, "hzip-lean": 18.0, "flexblock, a third": 4.0}
    facts = [
        {"name": scan, "shape": f"{short}, dim 2048", "milliseconds": times, "floor": 1.0},
        {"name": step, "shape": f"{short}, d_model 9", "milliseconds": steps, "floor": None},
    ]
    found = claims({"measurements": facts})
    assert [(measured, sense, wanted) for _, measured, sense, wanted in found] == [
        (1.5, ">=", 1.3),
        (2.0, "<=", 3.0),
        (1.5, "<=", 1.25),
    ]
    said = capsys.readouterr().out
    assert f"scan, {long}: not measured" in said
    assert f"training steps, {long}: not measured" in said
    assert len(claims({"measurements": facts[:1]})) == 2
    facts += [{**fact, "shape": fact["shape"].replace(short, long)} for fact in facts]
    assert len(claims({"measurements": facts})) == 7
