"""Tables and plots from the records of a results directory: offline, and the same every time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flexbench.errors import UserError
from flexbench.report.pairs import pairs
from flexbench.report.results import collect
from flexbench.report.tables import terminal, write_tables

__all__ = ["Report", "write"]


@dataclass(frozen=True)
class Report:
    """What `write` made.

    Attributes:
        tables: a table for the terminal by (suite, preset).
        files: what was written.
        skipped: a line for each file that is not a record and was left out.
    """

    tables: dict[tuple[str, str], str]
    files: tuple[Path, ...]
    skipped: tuple[str, ...]


def write(results: Path) -> Report:
    """Make `tables/` and `plots/` under `results` again from the records there.

    Raises:
        UserError: there are no records, or the directory cannot be written.
    """
    from flexbench.report.plots import write_plots

    suites, skipped = collect(results)
    if not suites:
        raise UserError(f"no records in {results}; `flexbench run` makes some")
    tables, files = {}, []
    for suite in suites:
        compared = pairs(suite)
        tables[suite.suite, suite.preset] = terminal(suite, compared)
        files += write_tables(suite, compared, results / "tables")
        files += write_plots(suite, results / "plots")
    return Report(tables, tuple(files), tuple(skipped))
