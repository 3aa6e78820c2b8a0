"""The facts that a benchmark leaves on disk, and the only code that reads or writes them.

Layout under a results directory (`--results`, default `results`)::

    runs/<suite>/<task>/<model>/<preset>-seed<seed>-<hash>/   one trial
        config.json  history.jsonl  record.json  correct.npy  checkpoint.pt  best.pt  trial.lock
    tasks/<suite>/<task>/<digest>.json    trivial predictors and facts of a task at given options
    speed/<suite>/<task>/<model>/<digest>.json    one measurement of speed and memory
    selections/<suite>/<task>/<model>/<preset>-<digest>.json    which learning rate a cell uses
    absences/<suite>/<task>/<model>/<preset>.json    why a cell has no trial
    ablations/<name>/<preset>.json        which cells an ablation compares
    tables/  plots/                       derived: `flexbench report` makes them again

Every JSON file is written to a temporary name, synced and renamed, so a reader sees all or nothing.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from flexbench.config import M, StackConfig, StrictModel, TrainingConfig, digest
from flexbench.errors import UserError

SCHEMA = 1

UMASK = os.umask(0)
os.umask(UMASK)

DISTURBED = 0.1
"""A measurement of speed that waited longer, as a share of its time, is made again."""

Outcome = Literal["finished", "diverged", "out of memory", "failed"]


class TrialConfig(StrictModel):
    """Everything that decides a trial's numbers. Its hash names the run directory.

    `model_options` holds the solved inner width. `learning_rate` is one value of the grid; the grid
    itself, `training.learning_rates`, decides no number of the trial and is left out of the hash.
    `device` is "cpu" or "cuda"; the trial computes with `threads` threads (bits depend on it).
    """

    suite: str
    task: str
    task_version: int
    task_options: dict[str, Any]
    model: str
    model_version: int | str
    model_options: dict[str, Any]
    stack: StackConfig
    training: TrainingConfig
    learning_rate: float
    preset: str
    seed: int
    device: str = "cpu"
    threads: int = 1

    @property
    def hash(self) -> str:
        return digest(self.model_dump(mode="json", exclude={"training": {"learning_rates"}}))

    @property
    def cell(self) -> str:
        """Digest of all but the seed and the learning rate: the same for trials of one cell."""
        apart: dict[str, Any] = {
            "seed": True,
            "learning_rate": True,
            "training": {"learning_rates"},
        }
        return digest(self.model_dump(mode="json", exclude=apart))

    def directory(self, results: Path) -> Path:
        model = self.model.replace(":", "-")
        name = f"{self.preset}-seed{self.seed}-{self.hash}"
        return results / "runs" / self.suite / self.task / model / name


class Record(StrictModel):
    """One trial's outcome. Metrics are None unless it finished; accuracies are in [0, 1].

    Attributes:
        metrics: test_accuracy, test_mcc and test_f1 where the problem has them,
            test_accuracy@<name> for each further test set, test_loss, test_examples,
            validation_accuracy, validation_loss, best_step.
        model_facts: parameters, backbone_parameters, baseline_parameters (the matched target),
            matched (within 2 %), state_size, flops_per_token.
        diagnostics: what the model reports of itself, such as computed_token_ratio.
        data_source: kind and detail.
        environment: flexbench version, git commit (with "+dirty"), torch, python, machine, device.
        seconds: wall time in training, over all sittings; trials may share the machine.
        error: the traceback's text, unless finished.
    """

    schema_version: int = SCHEMA
    hash: str
    config: TrialConfig
    outcome: Outcome
    metrics: dict[str, float] | None = None
    model_facts: dict[str, float | bool | None] = {}
    diagnostics: dict[str, float] = {}
    data_source: dict[str, str] = {}
    environment: dict[str, str] = {}
    seconds: float = 0.0
    error: str | None = None


class Selection(StrictModel):
    """Which learning rate a task × model cell uses, chosen on validation at the first seed.

    Attributes:
        config: of a trial of the cell, seed and rate apart; `trials` differ from it only there.
        grid: for every rate tried, as text: the validation accuracy, None unless it finished.
        learning_rate: the chosen one.
        trials: for every seed, as text: the hash of its trial at that rate.
    """

    schema_version: int = SCHEMA
    config: TrialConfig
    grid: dict[str, float | None]
    learning_rate: float
    trials: dict[str, str]

    def path(self, results: Path) -> Path:
        config = self.config
        model = config.model.replace(":", "-")
        name = f"{config.preset}-{config.cell}.json"
        return results / "selections" / config.suite / config.task / model / name


class Absence(StrictModel):
    """Why a task × model cell was not trained at a preset; void once a trial of it is on record.

    `status` is "refused" (the model sees the future) or "no data"; `reason` says what to do.
    """

    schema_version: int = SCHEMA
    suite: str
    task: str
    model: str
    preset: str
    status: str
    reason: str

    def path(self, results: Path) -> Path:
        model = self.model.replace(":", "-")
        return results / "absences" / self.suite / self.task / model / f"{self.preset}.json"


class AblationPoint(StrictModel):
    """One cell of an ablation, or why there is none.

    Attributes:
        task: "suite/task".
        variant: the label; "" is the baseline.
        factors: what this variant sets, keyed as `--set` names it, such as {"flexblock.l0": 32};
            {"model": "alternating"} where it is another model. The baseline's: its own values of
            all that its variants set.
        cell: `TrialConfig.cell` of its trials; None where it is not run.
        reason: why not ("skipped: too short: 4 blocks a sequence, 8 are wanted").
    """

    task: str
    variant: str
    factors: dict[str, Any]
    cell: str | None = None
    reason: str = ""


class AblationRecord(StrictModel):
    """What an ablation compares at one preset, as it was declared and planned.

    Attributes:
        question: one sentence.
        model: the baseline's.
        x: the factor on the x axis, keyed as `--set` names it; None: one bar a variant.
        y: what is plotted: "accuracy", "tokens_per_second", "computed_token_ratio", ….
        declaration: as it was read.
    """

    schema_version: int = SCHEMA
    name: str
    question: str
    preset: str
    model: str
    x: str | None
    log_x: bool
    y: list[str]
    points: tuple[AblationPoint, ...]
    declaration: dict[str, Any]

    def path(self, results: Path) -> Path:
        return results / "ablations" / self.name / f"{self.preset}.json"


class TaskRecord(StrictModel):
    """Facts of a task at given options: what a score is to be judged against.

    Attributes:
        trivial: test accuracy of predictors that learn next to nothing, by name.
        asked: positions asked in each test example, in order: one number where all ask as many.
            None in records from before it was kept; the next run makes them again.
    """

    schema_version: int = SCHEMA
    suite: str
    task: str
    task_version: int
    task_options: dict[str, Any]
    preset: str
    metric: str
    chance: float
    trivial: dict[str, float]
    asked: int | tuple[int, ...] | None = None
    data_source: dict[str, str]
    license: str = ""

    def path(self, results: Path) -> Path:
        key = digest([self.task_version, self.task_options])
        return results / "tasks" / self.suite / self.task / f"{key}.json"


class SpeedRecord(StrictModel):
    """Speed and memory of a training step, measured alone on the machine.

    Attributes:
        key: task, model, their versions and options, stack, batch size, device, threads.
        tokens_per_second: real tokens through forward, backward and optimiser, median of `repeats`.
        peak_memory: bytes above the process's footprint before the model was built.
        waited: share of its time that it was ready to compute and something else had the core, in
            [0, 1]; None where the system does not tell, and in older records.
        machine: processor and cores; the threads used are in `key`.
    """

    schema_version: int = SCHEMA
    key: dict[str, Any]
    tokens_per_second: float
    step_seconds: float
    peak_memory: int
    repeats: int
    waited: float | None = None
    machine: str
    environment: dict[str, str] = {}

    @property
    def disturbed(self) -> bool:
        """Whether other programs made it so slow that it wants to be measured again."""
        return self.waited is not None and self.waited > DISTURBED

    def path(self, results: Path) -> Path:
        return speed_path(results, self.key, self.machine)


def speed_path(results: Path, key: dict[str, Any], machine: str) -> Path:
    """Where the measurement for `key` on `machine` lies, whether or not it has been made."""
    model = str(key["model"]).replace(":", "-")
    name = f"{digest([key, machine])}.json"
    return results / "speed" / str(key["suite"]) / str(key["task"]) / model / name


class CannotWrite(UserError):
    """No permission, a read-only directory or a full disk."""


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data` at once: a crash leaves the old file or the new one.

    Raises:
        CannotWrite: no permission, a read-only directory or a full disk; nothing is lost.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, 0o666 & ~UMASK)  # as any file is made, not for the owner alone
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise cannot_write(path, error) from error
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def cannot_write(path: Path, error: OSError) -> CannotWrite:
    """The error for a `path` that the system refuses to write."""
    return CannotWrite(
        f"cannot write {path}: {error.strerror or error}; "
        "free some space or choose another directory with --results"
    )


def check_writable(directory: Path) -> None:
    """Make the directory and a file in it, for a moment.

    Raises:
        CannotWrite: either is impossible.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise cannot_write(directory, error) from error


def write_json(path: Path, value: StrictModel | dict[str, Any]) -> None:
    """Write JSON atomically, keys sorted so that the same facts are the same bytes."""
    plain = value.model_dump(mode="json") if isinstance(value, StrictModel) else value
    text = json.dumps(plain, indent=1, sort_keys=True, allow_nan=False)
    write_atomic(path, f"{text}\n".encode())


def read_record(path: Path) -> Record | None:
    """The record at `path`, or None where there is none.

    Raises:
        ValueError: the file is half-written, foreign or of another schema; the message says which.
    """
    return _read(path, Record)


def read_task_record(path: Path) -> TaskRecord | None:
    """Like `read_record`, for `TaskRecord`."""
    return _read(path, TaskRecord)


def read_speed_record(path: Path) -> SpeedRecord | None:
    """Like `read_record`, for `SpeedRecord`."""
    return _read(path, SpeedRecord)


def _read(path: Path, kind: type[M]) -> M | None:
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    try:
        record = kind.model_validate_json(text)
        json.loads(text, parse_float=_finite, parse_constant=_finite)
        return record
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ValueError(f"{path} is not a {kind.__name__}: {where}: {first['msg']}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a {kind.__name__}: {error}") from None


def _finite(text: str) -> float:
    """No record of ours has another number: no JSON has."""
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is not a finite number")
    return float(text)


def scan(
    results: Path,
    kind: type[Any],
    skipped: list[str],
    fault: Callable[[Any], str] = lambda record: "",
) -> Iterator[Any]:
    """All records of one kind (Record, Selection, …) in path order.

    What cannot be read is named in `skipped` and passed over, and so is a record in which `fault`
    finds something wrong.
    """
    places: dict[Any, tuple[str, str]] = {
        Record: ("runs", "**/record.json"),
        Selection: ("selections", "**/*.json"),
        Absence: ("absences", "**/*.json"),
        TaskRecord: ("tasks", "**/*.json"),
        SpeedRecord: ("speed", "**/*.json"),
        AblationRecord: ("ablations", "*/*.json"),
    }
    folder, pattern = places[kind]
    for path in sorted((results / folder).glob(pattern)):
        if path.name.startswith("."):
            continue
        try:
            record = _read(path, kind)
        except ValueError as error:
            skipped.append(str(error))
            continue
        if record is None:
            continue
        if wrong := fault(record):
            skipped.append(f"{path}: {wrong}")
        else:
            yield record
