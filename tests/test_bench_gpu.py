"""The GPU's measurements, tried out on the CPU at sizes of no interest."""

from __future__ import annotations

import json

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
    assert set(steps["milliseconds"]) == {"ours", "bimamba", "hzip-lean", "flexblock, a third"}
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
