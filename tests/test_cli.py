"""The command line: what it accepts, what it refuses and how it says so."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flexbench import __main__ as entry
from flexbench import harness
from flexbench.cli import main
from flexbench.config import StackConfig, TrainingConfig
from flexbench.errors import DataUnavailable, UserError
from flexbench.progress import ProgressBars
from flexbench.records import Record, TrialConfig
from flexbench.tasks.base import registry as tasks
from flexbench.tasks.store import Store

ROOT = Path(__file__).resolve().parents[1]
QUICKEST = [
    *("--set", "task.train=96", "--set", "task.validation=32", "--set", "task.test=32"),
    *("--set", "training.steps=2", "--set", "training.evaluations=1"),
    *("--set", "stack.d_model=8", "--set", "stack.n_layers=1"),
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXBENCH_CACHE", str(tmp_path / "cache"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The sentence with which the arguments are refused; checks its form."""
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("flexbench: ")
    assert said.err.count("\n") == 1
    return said.err


def start(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flexbench", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


# -- help and listings ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        *([], ["run"], ["ablate"], ["validate"], ["bench"], ["report"], ["ls"]),
        *(["data"], ["data", "fetch"], ["data", "verify"], ["data", "path"]),
    ],
)
def test_help_at_every_level(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--help"]) == 0
    assert "Usage: flexbench" in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from flexbench.cli import main; main(['run', '--help'])\n"
        "heavy = {'torch', 'numpy', 'pandas', 'matplotlib', 'scipy'} & sys.modules.keys()\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_listings_name_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls"]) == 0
    text = capsys.readouterr().out
    for name in (
        "lra",
        "listops",
        "text",
        "image",
        "mamba",
        "bimamba",
        "alternating",
        "hzip-gates",
    ):
        assert name in text
    assert main(["ls", "tasks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (listops,) = [line for line in lines if line.split()[0] == "listops"]
    assert "accuracy, chance 10 %" in listops
    (nucleotides,) = [line for line in lines if line.split()[0] == "nt-h3"]
    assert "mcc, accuracy by chance 50 %" in nucleotides
    assert "38.0 %" in listops


def test_data_path_is_the_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "path"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "cache")


# -- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rnu"], "unknown command 'rnu'; did you mean 'run'?"),
        (["data", "fetsch"], "did you mean 'fetch'?"),
        (
            ["run", "--sed", "3"],
            "unknown option '--sed' of 'flexbench run'; did you mean '--seeds'",
        ),
        (["run"], "missing option '--suite'"),
        (["ls", "task"], "unknown kind 'task'; did you mean 'tasks'?"),
        (["run", "--suite", "lar"], "unknown suite 'lar'; did you mean 'lra'?"),
        (["run", "--suite", "lra", "--tasks", "lisops"], "did you mean 'listops'?"),
        (["run", "--suite", "lra", "--tasks", "listops,"], "an empty name"),
        (["run", "--suite", "lra", "--models", "bimabma"], "did you mean 'bimamba'?"),
        (["run", "--suite", "lra", "--models", "no.such:Mixer"], "cannot import 'no.such'"),
        (["run", "--suite", "lra", "--preset", "qick"], "did you mean 'quick'?"),
        (["run", "--suite", "lra", "--device", "gpu"], "gpu"),
        (["run", "--suite", "lra", "--seeds", "-1"], "at least 1 (got -1)"),
        (["run", "--suite", "lra", "--seeds", "x"], "invalid value for '--seeds'"),
        (["run", "--suite", "lra", "--workers", "-2"], "0 or more (got -2)"),
        (["run", "--suite", "lra", "--set", "training.stps=3"], "did you mean"),
        (["run", "--suite", "lra", "--set", "training.steps=-3"], "training.steps"),
        (["run", "--suite", "lra", "--tasks", "listops", "--set", "task.max_length=-5"], "length"),
        (
            ["run", "--suite", "lra", "--data-dir", "/no/such"],
            "--data-dir /no/such is no directory",
        ),
        (["validate", "--suite", "lra", "--set", "model.d_stat=3"], "d_state"),
        (["data", "fetch", "lisops"], "did you mean 'listops'?"),
        (["data", "fetch", "--preset", "big"], "unknown preset 'big'"),
        (["report", "--results", "/no/such"], "no records in /no/such"),
    ],
)
def test_refusals_are_one_sentence(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(capsys, *arguments)


def test_a_results_directory_that_is_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    arguments = ["run", "--suite", "lra", "--tasks", "listops", "--workers", "0", *QUICKEST]
    assert main([*arguments, "--results", str(tmp_path / "file")]) == 2
    assert "cannot write" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_full_or_read_only_disk(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), "/some/file")

    monkeypatch.setattr(harness, "run", fail)
    said = refused(capsys, "run", "--suite", "lra", "--tasks", "listops")
    assert "cannot write /some/file" in said
    assert os.strerror(number) in said


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(harness, "run", fail)
    with pytest.raises(ZeroDivisionError):
        main(["run", "--suite", "lra", "--tasks", "listops"])


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(harness, "run", interrupt)
    assert main(["run", "--suite", "lra", "--tasks", "listops"]) == 130
    assert capsys.readouterr().err.endswith("interrupted; run the same command to go on\n")


def test_a_reader_that_leaves_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "flexbench", "data", "path"],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(writing)
    assert done.stderr == ""


# -- data -------------------------------------------------------------------------------------


def test_fetch_leaves_out_what_the_preset_does_unless_named(
    toys: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tasks, "_entries", {"toy": toys.Toy})
    for arguments, said in (([], ""), (["toy"], "toy: ready\n")):
        assert main(["data", "fetch", *arguments, "--preset", "paper"]) == 0
        assert capsys.readouterr().out == said


def test_fetch_goes_on_past_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unavailable(self: Any, store: Store) -> None:
        raise DataUnavailable("no data for 'image'; do this")

    monkeypatch.setattr(tasks.get("image"), "prepare", unavailable)
    monkeypatch.setattr(tasks.get("listops"), "prepare", lambda self, store: None)
    assert main(["data", "fetch", "image", "listops"]) == 2
    said = capsys.readouterr()
    assert said.out == "listops: ready\n"
    assert said.err == "flexbench: no data for 'image'; do this\n"


def test_verify_finds_what_was_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    from flexbench.tasks.store import DataSource

    def build(folder: Path) -> DataSource:
        np.save(folder / "x.npy", np.arange(4))
        return DataSource("regenerated")

    store = Store()
    store.prepare("listops", 1, {}, build)
    assert main(["data", "verify", "listops"]) == 0
    assert "good" in capsys.readouterr().out
    path = store.folder("listops", 1, {}) / "x.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert main(["data", "verify", "listops"]) == 1
    assert "corrupt" in capsys.readouterr().out


# -- running ----------------------------------------------------------------------------------


def test_run_trains_once_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flexbench.records.DISTURBED", 1.0)  # a busy machine would measure again
    arguments = ["run", "--suite", "lra", "--tasks", "listops", "--models", "mamba", *QUICKEST]
    arguments += ["--workers", "0", "--results", str(tmp_path / "results")]
    assert main(arguments) == 0
    said = capfd.readouterr()
    assert "listops mamba seed 0" in said.err
    assert "not comparable with published figures" in said.out
    (record,) = (tmp_path / "results").glob("runs/**/record.json")
    before = record.read_bytes()
    tables = {path: path.read_bytes() for path in (tmp_path / "results" / "tables").iterdir()}
    assert len(tables) == 2

    assert main(arguments) == 0
    assert "seed 0" not in capfd.readouterr().err
    assert record.read_bytes() == before
    assert main(["report", "--results", str(tmp_path / "results")]) == 0
    assert tables == {path: path.read_bytes() for path in tables}


def test_a_failed_trial_is_in_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "breaks.py").write_text(
        "from torch import nn\n"
        "class Mixer(nn.Module):\n"
        "    def __init__(self, d_model):\n"
        "        super().__init__()\n"
        "        self.map = nn.Linear(d_model, d_model)\n"
        "    def forward(self, x):\n"
        "        if self.training: raise RuntimeError('it broke')\n"
        "        return self.map(x)\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ["run", "--suite", "lra", "--tasks", "listops", "--models", "breaks:Mixer"]
    assert main([*arguments, *QUICKEST, "--workers", "0"]) == 1
    said = capsys.readouterr()
    assert "seed 0 failed (RuntimeError: it broke)" in said.out
    assert "1 of 1 trials failed" in said.err


MIXERS = """
from torch import nn

class Honest(nn.Module):
    causal = True
    def __init__(self, d_model, d_inner=None):
        super().__init__()
        self.up = nn.Linear(d_model, d_inner or d_model)
        self.down = nn.Linear(d_inner or d_model, d_model)
    def forward(self, x):
        return self.down(self.up(x))

class Peeking(Honest):
    def forward(self, x):
        return super().forward(x + x.flip(1))

class Idle(Honest):
    def __init__(self, d_model, d_inner=None):
        super().__init__(d_model, d_inner)
        self.unused = nn.Linear(1, 1, bias=False)

class Tiny(nn.Module):
    causal = True
    def __init__(self, d_model):
        super().__init__()
        self.map = nn.Linear(d_model, d_model)
    def forward(self, x):
        return self.map(x)
"""


@pytest.mark.parametrize(
    ("model", "code", "words"),
    [
        ("mamba", 0, ""),
        ("mixers_to_check:Honest", 0, ""),
        ("mixers_to_check:Peeking", 1, "causality: declares causal = True, but sees the future"),
        ("mixers_to_check:Idle", 1, "gradients: no gradient in backbone.layers.0.mixer.unused"),
        ("mixers_to_check:Tiny", 1, "% from the baseline's"),
    ],
)
def test_validate(
    model: str,
    code: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "mixers_to_check.py").write_text(MIXERS)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("mixers_to_check", None)
    settings = [*QUICKEST[:10], "--set", "stack.d_model=64", "--set", "stack.n_layers=1"]
    arguments = ["validate", "--suite", "lra", "--tasks", "listops", "--models", model, *settings]
    assert main(arguments) == code
    text = capsys.readouterr().out
    assert words in text
    assert ("FAILED" in text) == bool(code)


def test_validate_without_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unavailable(self: Any, store: Store) -> None:
        raise UserError("no data for 'listops'; do this")

    monkeypatch.setattr(tasks.get("listops"), "prepare", unavailable)
    assert main(["validate", "--suite", "lra", "--tasks", "listops", "--models", "mamba"]) == 1
    assert "listops, mamba: data: no data for 'listops'; do this" in capsys.readouterr().out


# -- progress ---------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def trial(seed: int) -> TrialConfig:
    return TrialConfig(
        suite="toy",
        task="listing",
        task_version=1,
        task_options={},
        model="mamba",
        model_version=1,
        model_options={},
        stack=StackConfig(),
        training=TrainingConfig(),
        learning_rate=0.003,
        preset="quick",
        seed=seed,
    )


def watch(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    with ProgressBars() as observe:
        observe(harness.Stage("trials", 3))
        for step in range(0, 101, 10):
            for seed in (0, 1):
                observe(harness.Progress(trial(seed), step, 100, 1.5, 0.25))
        for seed in (0, 1, 2):
            config = trial(seed)
            record = Record(
                hash=config.hash,
                config=config,
                outcome="diverged" if seed else "finished",
                metrics=None if seed else {"test_accuracy": 0.431},
                error="step 7: loss nan" if seed else None,
            )
            observe(harness.Done(config, record, cached=seed == 2))
        observe(harness.Notice("a notice"))
    return stream.getvalue()


def test_a_log_gets_one_line_a_finished_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watch(io.StringIO(), monkeypatch).splitlines() == [
        "listing mamba seed 0 lr 0.003: test accuracy 43.1 % after 0 s",
        "listing mamba seed 1 lr 0.003: diverged: step 7: loss nan",
        "a notice",
    ]


def test_a_terminal_gets_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    text = watch(Terminal(), monkeypatch)
    assert "listing mamba seed 1 lr 0.003: step 100 of 100" in text
    assert "loss 1.500, val 25.0 %" in text
    assert "left" in text


# -- the way in -------------------------------------------------------------------------------


def test_a_checkout_does_not_shadow_the_kernels_package() -> None:
    code = (
        "import importlib.util, os, runpy, sys\n"
        "sys.path[0] = os.getcwd()\n"  # as `python -m` does
        "sys.argv = ['flexbench', 'data', 'path']\n"
        "try: runpy.run_module('flexbench', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as leaving: assert not leaving.code, leaving.code\n"
        "found = importlib.util.find_spec('kernels')\n"
        "assert found is None or not str(found.origin).startswith(os.getcwd()), found\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_only_the_entry_that_python_added_is_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(Path(entry.__file__).resolve().parents[1])
    for before, after in {
        (root, "/a"): ["/a"],
        (root, "/a", root): ["/a", root],
        ("/a", root): ["/a", root],
    }.items():
        monkeypatch.setattr(sys, "path", list(before))
        entry.leave_checkout()
        assert sys.path == after


def test_a_checkout_that_is_not_installed_stays_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(Path(entry.__file__).resolve().parents[1])
    monkeypatch.setattr(sys, "path", [root, "/a"])
    monkeypatch.setattr(sys, "meta_path", [])
    entry.leave_checkout()
    assert sys.path == ["/a", root]


def test_the_module_and_its_exit_code(tmp_path: Path) -> None:
    done = start("run", "--suite", "lar", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "flexbench: unknown suite 'lar'; did you mean 'lra'?\n"
