"""Tables, plots and a page from the records on disk: offline, and the same every time."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from flexbench.errors import UserError
from flexbench.records import write_atomic
from flexbench.report.ablations import AblationResults, ablations
from flexbench.report.pairs import Pair, pairs
from flexbench.report.results import SuiteResults, collect
from flexbench.report.tables import ablation_terminal, terminal, write_ablation, write_tables

__all__ = ["Report", "read"]

MANIFEST = "derived.txt"
"""Names what `Report.write` made, so that the next one takes away what no record stands behind."""

T = TypeVar("T")


@dataclass(frozen=True)
class Report:
    """Every record under `results`, compared.

    Attributes:
        suites: each suite at each preset, and its comparisons with the baseline.
        swept: each ablation at each preset.
        skipped: a line for each file that is not a record and was left out.
    """

    results: Path
    suites: tuple[tuple[SuiteResults, list[Pair]], ...]
    swept: tuple[AblationResults, ...]
    skipped: tuple[str, ...]

    def table(self, suite: str, preset: str, asked: Set[str] = frozenset()) -> str:
        """A suite's table for the terminal, "" where nothing is on record.

        It leaves to the ablations what they compare, but for the cells that were `asked` for.
        """
        known = {(each.suite, each.preset): (each, found) for each, found in self.suites}
        chosen = known.get((suite, preset))
        return terminal(*chosen, asked) if chosen else ""

    @cached_property
    def ablations(self) -> dict[tuple[str, str], str]:
        """A table for the terminal by (ablation, preset)."""
        return {(each.name, each.preset): ablation_terminal(each) for each in self.swept}

    def write(self) -> tuple[Path, ...]:
        """Make `tables/`, `plots/` and `index.html` again, with a progress bar; returns the files.

        What an earlier report made and this one does not is removed.

        Raises:
            CannotWrite: the directory cannot be written.
        """
        from flexbench.report import views
        from flexbench.report.page import page
        from flexbench.report.plots import write_plots

        looks = views.Looks([row for suite, _ in self.suites for row in suite.rows])
        suites = [
            (suite, found, views.of_suite(suite, found, looks)) for suite, found in self.suites
        ]
        swept = [(each, views.of_ablation(each, looks)) for each in self.swept]
        tables, plots = self.results / "tables", self.results / "plots"
        files: list[Path] = []
        for suite, compared in self.suites:
            files += write_tables(suite, compared, tables)
        for ablation in self.swept:
            files += write_ablation(ablation, tables)
        drawn = [view for *_, view in suites] + [view for _, view in swept]
        for view in _watched(drawn, "plots"):
            files += write_plots(view, plots)
        files.append(self.results / "index.html")
        text = page(_watched(suites, "page, suites"), _watched(swept, "page, ablations"))
        write_atomic(files[-1], text.encode())
        _keep_only(self.results, [file.relative_to(self.results).as_posix() for file in files])
        return tuple(files)


def read(results: Path) -> Report:
    """Read the records under `results`; writes nothing.

    Raises:
        UserError: there are none.
    """
    suites, skipped = collect(results)
    swept = ablations(results, suites, skipped)
    if not suites and not swept:
        raise UserError(f"no records in {results}; `flexbench run` makes some")
    compared = tuple((suite, pairs(suite)) for suite in suites)
    return Report(results, compared, tuple(swept), tuple(skipped))


def _watched(items: Sequence[T], what: str) -> Iterable[T]:
    """With a progress bar where somebody looks."""
    return tqdm(items, what, leave=False, disable=not sys.stderr.isatty(), file=sys.stderr)


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
