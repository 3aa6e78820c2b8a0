"""What an ablation says, as a table for the terminal."""

from __future__ import annotations

from pathlib import Path

from tabulate import tabulate

from flexbench.records import AblationRecord
from flexbench.report.results import Row, collect
from flexbench.report.statistics import Comparison, compare, holm


def table(record: AblationRecord, results: Path) -> str:
    """Every variant beside its baseline: accuracy, and the difference on shared seeds."""
    cells = {row.config.cell: row for suite in collect(results)[0] for row in suite.rows}
    baselines = {
        point.task: cells.get(point.cell or "") for point in record.points if not point.variant
    }
    rows = [(point, cells.get(point.cell or "")) for point in record.points]
    compared = [
        _compare(row, baselines[point.task]) if point.variant else None for point, row in rows
    ]
    adjusted = holm([each.p if each else None for each in compared])
    lines = []
    for (point, row), comparison, p in zip(rows, compared, adjusted, strict=True):
        cells_of_line = [point.task, point.variant or "(baseline)"]
        if row is None or row.summary is None:
            lines.append(
                [*cells_of_line, point.reason or (row.outcome if row else "not on record")]
            )
            continue
        ratio = row.computed_token_ratio
        lines.append(
            [
                *cells_of_line,
                f"{100 * row.summary.mean:.1f}",
                _interval(row.summary.interval),
                str(row.summary.n),
                f"{100 * comparison.difference:+.1f}" if comparison else "",
                _interval(comparison.interval, "+") if comparison else "",
                f"{p:.2g}" if p is not None else "",
                comparison.verdict(p) if comparison else "",
                f"{100 * ratio:.0f} %" if ratio is not None else "",
                f"{row.speed.tokens_per_second:,.0f}" if row.speed else "",
            ]
        )
    titles = ["task", "variant", "accuracy", "95 % interval", "seeds", "difference"]
    titles += ["95 % interval", "p (Holm)", "verdict", "computed", "tokens/s"]
    head = f"{record.name}, {record.preset} preset: {record.question}"
    return f"{head}\n\n{tabulate(lines, titles, disable_numparse=True)}"


def _compare(row: Row | None, baseline: Row | None) -> Comparison | None:
    shared = sorted(row.accuracies.keys() & baseline.accuracies.keys()) if row and baseline else []
    if not row or not baseline or not shared:
        return None
    return compare(
        [row.accuracies[seed] for seed in shared], [baseline.accuracies[seed] for seed in shared]
    )


def _interval(interval: tuple[float, float] | None, sign: str = "") -> str:
    if interval is None:
        return "–"
    low, high = (f"{100 * end:{sign}.1f}" for end in interval)
    return f"{low} to {high}"
