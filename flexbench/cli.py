"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexbench.errors import DataUnavailable, UserError, did_you_mean

if TYPE_CHECKING:
    from flexbench.harness import Plan, SweepResult
    from flexbench.report import Report
    from flexbench.tasks.base import Task
    from flexbench.tasks.store import Store

INTERRUPTED = 130
REFUSED = 2

KINDS = ("suites", "tasks", "models", "ablations")


def _examples(*commands: str) -> str:
    return "\n\n".join(["Examples:", *(f"  flexbench {command}" for command in commands)])


app = typer.Typer(
    name="flexbench",
    help="A lab bench for Mamba variants: matched budgets, several seeds, measured speed.",
    epilog=_examples("run --suite lra", "ls tasks"),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data = typer.Typer(help="Fetch, check or find the data sets.", no_args_is_help=True)
app.add_typer(data, name="data", rich_help_panel="Inspect")

WHAT, HOW, WHERE = "What", "How", "Where"

Suite = Annotated[
    str, typer.Option("--suite", metavar="SUITE", help="Which suite.", rich_help_panel=WHAT)
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        metavar="A,B",
        help="Only these tasks of it. (default: all)",
        rich_help_panel=WHAT,
    ),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--models",
        metavar="A,B",
        help="Registered models, or your own as package.module:Class. "
        "(default: mamba,bimamba,alternating,flexblock,hzip)",
        rich_help_panel=WHAT,
    ),
]
Seeds = Annotated[
    int | None,
    typer.Option(
        "--seeds",
        metavar="N",
        help="How many seeds, from 0. (default: 1 at quick, 3 at small, 5 at paper)",
        rich_help_panel=HOW,
    ),
]
PresetName = Annotated[
    str,
    typer.Option(
        "--preset",
        metavar="quick|small|paper",
        help="Minutes on two cores, hours on a CPU, or the published protocol.",
        rich_help_panel=HOW,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device", metavar="auto|cpu|cuda", help="Where to compute.", rich_help_panel=HOW
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override training.*, stack.*, task.*, model.*, or a task's or model's own option by "
        "its name. May be repeated.",
        rich_help_panel=HOW,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        metavar="N",
        help="Trials at once; 0: in this process. (default: one a core, one on a GPU)",
        rich_help_panel=HOW,
    ),
]
Results = Annotated[
    Path,
    typer.Option(
        "--results", metavar="DIR", help="Records, tables and plots.", rich_help_panel=WHERE
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        metavar="DIR",
        help="Local copies of data sets, used before any download.",
        rich_help_panel=WHERE,
    ),
]
Offline = Annotated[
    bool, typer.Option("--offline", help="Fetch nothing over the network.", rich_help_panel=WHERE)
]


@app.command(
    rich_help_panel="Bench",
    epilog=_examples(
        "run --suite lra",
        "run --suite lra --tasks listops,image --seeds 3",
        "run --suite lra --models mamba,my.module:Mixer --set training.steps=500",
    ),
)
def run(
    suite: Suite,
    tasks: Tasks = None,
    models: Models = None,
    seeds: Seeds = None,
    preset: PresetName = "quick",
    device: Device = "auto",
    settings: Settings = None,
    workers: Workers = None,
    results: Results = Path("results"),
    data_dir: DataDir = None,
    offline: Offline = False,
) -> int:
    """Train and compare models on a suite, then print the table.

    What is on record already is not trained again; an interrupted run goes on where it stopped.
    """
    from flexbench import harness, report
    from flexbench.progress import ProgressBars

    store = _store(data_dir, offline)
    _check_workers(workers)
    plan = _plan(suite, tasks, models, seeds, preset, device, settings)
    executor = harness.make_executor(workers, device=plan.device)
    with ProgressBars() as observe:
        result = harness.run(plan, results=results, store=store, executor=executor, observe=observe)
    found = report.read(results)
    asked = {trial.cell for cell in plan.cells for trial in cell.grid}
    _print(found.table(suite, preset, asked))
    _draw(found)
    return _verdict(result)


@app.command(
    rich_help_panel="Bench", epilog=_examples("ablate rev", "ablate my-own.yaml --preset small")
)
def ablate(
    which: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="One of `flexbench ls ablations`, or a declaration of your own."
        ),
    ],
    seeds: Seeds = None,
    preset: PresetName = "quick",
    device: Device = "auto",
    workers: Workers = None,
    results: Results = Path("results"),
    data_dir: DataDir = None,
    offline: Offline = False,
) -> int:
    """Vary one design choice, then print what that changed.

    What is on record already is not trained again, whatever trained it; an interrupted ablation
    goes on where it stopped.
    """
    from flexbench import harness, report
    from flexbench.progress import ProgressBars

    store = _store(data_dir, offline)
    _check_workers(workers)
    planned = harness.plan_ablation(which, preset=preset, seeds=seeds, device=device)
    executor = harness.make_executor(workers, device=planned.device)
    with ProgressBars() as observe:
        record, result = harness.run_ablation(
            planned, results=results, store=store, executor=executor, observe=observe
        )
    found = report.read(results)
    _print(found.ablations[record.name, record.preset])
    _draw(found)
    return _verdict(result)


@app.command(rich_help_panel="Bench", epilog=_examples("validate --suite lra --models mamba"))
def validate(
    suite: Suite,
    tasks: Tasks = None,
    models: Models = None,
    seeds: Seeds = None,
    preset: PresetName = "quick",
    device: Device = "auto",
    settings: Settings = None,
    workers: Workers = None,
    results: Results = Path("results"),
    data_dir: DataDir = None,
    offline: Offline = False,
) -> int:
    """Check what `run` with the same arguments would train, without training it.

    For every task and model: data at hand, finite loss, gradients in every parameter, causality
    as declared, parameters within 2 % of the baseline's. Exit code 1 if a check fails.
    """
    from flexbench.validate import check_plan

    store = _store(data_dir, offline)
    _check_workers(workers)
    findings = check_plan(_plan(suite, tasks, models, seeds, preset, device, settings), store)
    _print(findings.table())
    return 0 if findings.passed else 1


@app.command(rich_help_panel="Bench")
def bench(
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="A,B", help="Only these measurements.")
    ] = None,
    device: Device = "auto",
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Write the measurements as JSON too."),
    ] = None,
) -> None:
    """Time the kernels and a training step against other implementations."""
    from flexbench.bench import main as measure

    measure(device, _names(only) or [], output)


@app.command("report", rich_help_panel="Inspect")
def report_command(results: Results = Path("results")) -> None:
    """Make tables and plots again from the records on disk."""
    from flexbench import report

    found = report.read(results)
    suites = [found.table(suite.suite, suite.preset) for suite, _ in found.suites]
    _print("\n\n".join([*suites, *found.ablations.values()]))
    _draw(found)


@app.command("ls", rich_help_panel="Inspect", epilog=_examples("ls", "ls tasks"))
def list_command(
    kind: Annotated[
        str, typer.Argument(metavar="suites|tasks|models|ablations", help="(default: all)")
    ] = "",
) -> None:
    """List what there is to run."""
    from flexbench import listing

    if kind and kind not in KINDS:
        raise UserError(f"unknown kind '{kind}'{did_you_mean(kind, KINDS)}")
    if kind:
        _print(getattr(listing, kind)())
    else:
        _print("\n\n".join(f"{each}\n{getattr(listing, each)()}" for each in KINDS))


@app.command(
    "inspect",
    rich_help_panel="Inspect",
    epilog=_examples("inspect --task listops --model flexblock"),
)
def inspect_command(
    task: Annotated[str, typer.Option("--task", metavar="TASK", help="Which task.")],
    run: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="RUN",
            help="A model, of which the newest finished run is taken, or a run's directory.",
        ),
    ],
    samples: Annotated[
        int, typer.Option("--samples", metavar="N", help="How many test samples.")
    ] = 4,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="The PNG. (default: in DIR/inspect)"),
    ] = None,
    results: Results = Path("results"),
    data_dir: DataDir = None,
    offline: Offline = False,
) -> None:
    """Draw what a trained model does with test samples: guide maps, gates, answers."""
    from flexbench.inspection import inspect

    store = _store(data_dir, offline)
    _print(str(inspect(task, run, results, store, samples=samples, output=output)))


Chosen = Annotated[
    list[str] | None, typer.Argument(metavar="TASK", help="Which tasks. (default: all)")
]


@data.command(epilog=_examples("data fetch", "data fetch text image --data-dir ~/lra"))
def fetch(
    tasks: Chosen = None,
    preset: PresetName = "quick",
    data_dir: DataDir = None,
    offline: Offline = False,
    force: Annotated[
        bool, typer.Option("--force", help="Fetch and prepare again what is there.")
    ] = False,
) -> int:
    """Fetch or generate the data of tasks into the cache, and check their SHA-256.

    Without names, of all that the preset runs.
    """
    store = _store(data_dir, offline, force)
    code = 0
    for name, task in _tasks(tasks).items():
        options = _options(task, preset)
        if not tasks and preset not in task.presets:
            continue
        try:
            task.parse(options).prepare(store)
        except DataUnavailable as error:
            _complain(str(error))
            code = REFUSED
        else:
            _print(f"{name}: ready")
    return code


@data.command()
def verify(tasks: Chosen = None) -> int:
    """Read what the cache holds and compare it with its SHA-256. Exit code 1 if any differs."""
    from tabulate import tabulate

    store = _store(None, offline=True)
    rows = []
    for name, task in _tasks(tasks).items():
        found = [row for resource in task.resources for row in store.downloads(resource)]
        found += store.prepared(name)
        rows += [
            [name, row.state, f"{row.size / 1e6:,.1f} MB", row.source, row.path] for row in found
        ]
    _print(tabulate(rows, ["task", "state", "size", "source", "where"], colalign=("left",) * 5))
    return 1 if any(row[1] == "corrupt" for row in rows) else 0


@data.command()
def path() -> None:
    """Print where the cache is. FLEXBENCH_CACHE moves it."""
    _print(str(_store(None, offline=True).cache))


def _plan(
    suite: str,
    tasks: Sequence[str] | None,
    models: Sequence[str] | None,
    seeds: int | None,
    preset: str,
    device: str,
    settings: Sequence[str] | None,
) -> Plan:
    from flexbench import harness

    return harness.plan(
        suite,
        tasks=_names(tasks),
        models=_names(models),
        seeds=seeds,
        preset=preset,
        device=device,
        overrides=settings or (),
    )


def _check_workers(workers: int | None) -> None:
    if workers is not None and workers < 0:
        raise UserError(f"--workers must be 0 or more (got {workers})")


def _store(data_dir: Path | None, offline: bool, force: bool = False) -> Store:
    from flexbench.tasks.store import Store

    if data_dir is not None and not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir} is no directory")
    return Store(data_dir=data_dir, offline=offline, force=force)


def _names(values: Sequence[str] | None) -> list[str] | None:
    """`["a,b", "c"]` as `["a", "b", "c"]`; None where nothing was asked for."""
    if not values:
        return None
    names = [name.strip() for value in values for name in value.split(",")]
    if not all(names):
        raise UserError(f"an empty name in '{','.join(values)}'")
    return names


def _tasks(names: Sequence[str] | None) -> dict[str, type[Task]]:
    from flexbench.tasks.base import registry

    return {name: registry.get(name) for name in _names(names) or registry.names()}


def _options(task: type[Task], preset: str) -> dict[str, Any]:
    from flexbench.config import PRESETS

    if preset not in PRESETS:
        raise UserError(f"unknown preset '{preset}'{did_you_mean(preset, PRESETS)}")
    return task.presets[preset].options if preset in task.presets else {}


def _verdict(result: SweepResult) -> int:
    """1 where a trial failed or nothing could be run; a divergence is a result."""
    records = [record for cell in result.cells for record in cell.records]
    if not records:
        _complain("nothing was run; the table says why")
        return 1
    failed = sum(record.outcome == "failed" for record in records)
    if failed:
        _complain(f"{failed} of {len(records)} trials failed; record.json has the traceback")
    return 1 if failed else 0


def _draw(report: Report) -> None:
    """Write what is derived, after the table: it takes a while where there are many records."""
    for line in report.skipped:
        _complain(f"left out: {line}")
    sys.stdout.flush()
    files = report.write()
    where = report.results
    _print(f"\n{len(files)} tables and plots in {where}; all of it: {where}/index.html")


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _complain(text: str) -> None:
    sys.stderr.write(f"flexbench: {text}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Whatever a user can mend is one sentence on stderr and code 2; Ctrl-C is code 130.
    """
    command = typer.main.get_command(app)
    try:
        code = command.main(
            list(sys.argv[1:] if arguments is None else arguments),
            prog_name="flexbench",
            standalone_mode=False,
        )
        sys.stdout.flush()
    except UserError as error:
        _complain(str(error))
        return REFUSED
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has left; give Python's own last flush nowhere to fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        where = f" {error.filename}" if error.filename else ""
        _complain(f"cannot write{where}: {error.strerror}; free some space or choose another place")
        return REFUSED
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer raises for wrong usage
            raise
        _complain(_usage(error))
        return REFUSED
    if code == INTERRUPTED:
        _complain("interrupted; run the same command to go on")
    return int(code or 0)


def _usage(error: Any) -> str:
    """A usage error of typer's as one sentence of ours."""
    context = getattr(error, "ctx", None)
    if context is None:
        return str(error.format_message())
    words = str(error.format_message()).splitlines()[0]
    option = getattr(error, "option_name", None)
    if words.startswith("No such option") and option:
        known = [name for each in context.command.params for name in each.opts]
        return f"unknown option '{option}' of '{context.command_path}'{did_you_mean(option, known)}"
    if words.startswith("No such command"):
        name = words.split("'")[1]
        return f"unknown command '{name}'{did_you_mean(name, context.command.commands)}"
    sentence = f"{words[:1].lower()}{words[1:]}".rstrip(".")
    return f"{sentence}; see '{context.command_path} --help'"
