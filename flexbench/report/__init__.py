"""Tables, plots and a page from the records on disk: offline, and the same every time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flexbench.errors import UserError
from flexbench.records import write_atomic
from flexbench.report.ablations import ablations
from flexbench.report.pairs import pairs
from flexbench.report.results import collect
from flexbench.report.tables import ablation_terminal, terminal, write_ablation, write_tables

__all__ = ["Report", "write"]

MANIFEST = "derived.txt"
"""Names what `write` made, so that the next one can take away what no record stands behind."""


@dataclass(frozen=True)
class Report:
    """What `write` made.

    Attributes:
        tables: a table for the terminal by (suite, preset).
        ablations: the same by (ablation, preset).
        files: what was written.
        skipped: a line for each file that is not a record and was left out.
    """

    tables: dict[tuple[str, str], str]
    ablations: dict[tuple[str, str], str]
    files: tuple[Path, ...]
    skipped: tuple[str, ...]


def write(results: Path) -> Report:
    """Make `tables/`, `plots/` and `index.html` under `results` again from the records there.

    What an earlier report made and this one does not is removed.

    Raises:
        UserError: there are no records, or the directory cannot be written.
    """
    from flexbench.report import views
    from flexbench.report.page import page
    from flexbench.report.plots import write_plots

    suites, skipped = collect(results)
    swept = ablations(results, suites, skipped)
    if not suites and not swept:
        raise UserError(f"no records in {results}; `flexbench run` makes some")
    looks = views.Looks([row for suite in suites for row in suite.rows])
    files: list[Path] = []
    shown_suites, shown_ablations = [], []
    for suite in suites:
        compared = pairs(suite)
        view = views.of_suite(suite, compared, looks)
        files += write_tables(suite, compared, results / "tables")
        files += write_plots(view, results / "plots")
        shown_suites.append((suite, compared, view))
    for ablation in swept:
        view = views.of_ablation(ablation, looks)
        files += write_ablation(ablation, results / "tables")
        files += write_plots(view, results / "plots")
        shown_ablations.append((ablation, view))
    files.append(results / "index.html")
    write_atomic(files[-1], page(shown_suites, shown_ablations).encode())
    _keep_only(results, [file.relative_to(results).as_posix() for file in files])
    return Report(
        {(suite.suite, suite.preset): terminal(suite, p) for suite, p, _ in shown_suites},
        {(each.name, each.preset): ablation_terminal(each) for each in swept},
        tuple(files),
        tuple(skipped),
    )


def _keep_only(results: Path, names: list[str]) -> None:
    """Remove what the manifest names and `names` does not, then write the manifest anew."""
    manifest = results / MANIFEST
    try:
        before = manifest.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        before = []
    for name in set(before) - set(names):
        path = results / name
        if path.parent in (results / "tables", results / "plots") and path.is_file():
            path.unlink()
    write_atomic(manifest, "".join(f"{name}\n" for name in sorted(names)).encode())
