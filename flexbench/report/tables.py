"""Rows as a table for the terminal, as Markdown and as CSV."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from flexbench.harness.sweep import BASELINE
from flexbench.records import SpeedRecord, write_atomic
from flexbench.report.ablations import AblationResults
from flexbench.report.pairs import Pair
from flexbench.report.results import Row, SuiteResults, find
from flexbench.report.statistics import Interval
from flexbench.tasks.base import registry as tasks

WIDTH = 120
NAME_WIDTH = 22
DASH = "–"
MARKS = {"yes": "", "unclear": "~", "no": "✗", "": ""}


def percent(share: float | None) -> str:
    """A share in [0, 1] as a figure in percent, without the sign."""
    return DASH if share is None else f"{100 * share:.1f}"


def quantity(count: float | None) -> str:
    """A count to three significant digits: 950, 65.2k, 1.31M."""
    if count is None:
        return DASH
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if float(f"{count:.3g}") >= factor:
            digits = f"{count / factor:.3g}"
            return f"{float(digits):.{max(0, 3 - len(str(int(float(digits)))))}f}{unit}"
    return f"{count:.0f}"


def megabytes(size: float | None) -> str:
    """Bytes as megabytes of a million bytes."""
    return DASH if size is None else f"{size / 1e6:,.0f} MB"


def points(difference: float) -> str:
    """A difference of two shares, in percentage points, with its sign."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def span(interval: Interval | None) -> str:
    """An interval of a difference, in percentage points."""
    return DASH if interval is None else f"{points(interval[0])} to {points(interval[1])}"


def _half_width(row: Row) -> float | None:
    summary = row.summary
    return summary.mean - summary.interval[0] if summary and summary.interval else None


def _seeds(row: Row) -> str:
    finished, total = len(row.accuracies), len(row.trials)
    return str(total) if finished == total else f"{finished} of {total}"


def _computed(row: Row) -> str:
    ratio = row.computed_token_ratio
    return DASH if ratio is None else f"{100 * ratio:.0f} %"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "accuracy": lambda row: percent(row.summary.mean if row.summary else None),
    "± 95 %": lambda row: percent(_half_width(row)),
    "": lambda row: MARKS[row.beats_trivial],
    "seeds": _seeds,
    "published": lambda row: DASH if row.published is None else f"{row.published:.1f}",
    "params": lambda row: quantity(row.fact("parameters")) + ("≠" if _unmatched(row) else ""),
    "state": lambda row: quantity(row.fact("state_size")),
    "FLOP/token": lambda row: quantity(row.fact("flops_per_token")),
    "tokens/s": lambda row: quantity(row.speed.tokens_per_second if row.speed else None),
    "memory": lambda row: megabytes(row.speed.peak_memory if row.speed else None),
    "computed": _computed,
}


PAIRED = ("difference", "95 % t interval", "p (Holm)", "verdict")
"""What the terminal's table of an ablation shows of a comparison."""

COMPARED = (
    "difference",
    "t_low",
    "t_high",
    "p",
    "p_holm",
    "verdict",
    "bootstrap_low",
    "bootstrap_high",
)
"""What a comparison adds to a line of an ablation's CSV."""


def _unmatched(row: Row) -> bool:
    return row.fact("matched") is not None and not row.fact("matched")


def caption(suite: SuiteResults) -> str:
    """What the table shows, and what it must not be compared with."""
    text = f"{suite.suite}, {suite.preset} preset: test accuracy in percent"
    if suite.preset != "paper":
        text += "; not comparable with published figures"
    return text


def terminal(suite: SuiteResults, pairs: Sequence[Pair] = (), asked: Set[str] = frozenset()) -> str:
    """A table for 120 columns: per task a line of facts, under it a line a model.

    Variants that an ablation compares are counted, not shown, unless their cells are `asked` for.
    """
    left = {row.cell for row in suite.rows if row.cell in suite.ablated and not row.cells & asked}
    suite = replace(suite, rows=tuple(row for row in suite.rows if row.cell not in left))
    body: list[str | Row] = []
    idle: dict[str, list[str]] = {}
    for task in suite.tasks:
        whys = {why for (name, _), why in suite.absences.items() if name == task}
        if len(whys) == 1 and not suite.of_task(task):
            idle.setdefault(whys.pop(), []).append(task)
        else:
            body += _task_lines(suite, task)
    body += [f"{', '.join(names)}: {why}" for why, names in idle.items()]
    table = _aligned(body)
    lines = [caption(suite), "", *table, "", *_legend("\n".join(table)), *machines(suite.rows)]
    if pairs:
        lines += ["", f"Against {BASELINE} on the same seeds, in points. Paired bootstrap: over"]
        lines += ["seeds and test examples, with one seed over the examples alone."]
    for variant in dict.fromkeys(pair.row.variant for pair in pairs):
        chosen = [pair_cells(pair) for pair in pairs if pair.row.variant == variant]
        lines += ["", *([f"with {', '.join(variant)}"] if variant else [])]
        lines += _tabulate(chosen, "simple", left=("task", "model")).splitlines()
    if left:
        lines += ["", f"{len(left)} variants that ablations compare: see `flexbench report`"]
    if suite.older:
        lines += ["", f"{len(suite.older)} more of older versions: see the Markdown table"]
    return "\n".join(part for line in lines for part in _wrap(line)).rstrip()


def _task_lines(suite: SuiteResults, task: str) -> list[str | Row]:
    rows = suite.of_task(task)
    absent = {model: why for (name, model), why in suite.absences.items() if name == task}
    facts = _facts(rows[0]) if rows else ""
    lines: list[str | Row] = [f"{task}  {facts}"]
    variant: tuple[str, ...] = ()
    for row in rows:
        if row.variant != variant:
            variant = row.variant
            lines.append(f"  with {', '.join(variant)}")
            if _facts(row) != facts:
                lines.append(f"    {_facts(row)}")
        lines.append(row)
        lines += [f"      {note}" for note in row.notes]
    return lines + [f"  {model:<{NAME_WIDTH - 2}}  {why}" for model, why in absent.items()]


def _aligned(body: Sequence[str | Row]) -> list[str]:
    """Text as it is; rows in columns under one header line."""
    cells = [[show(row) for show in COLUMNS.values()] for row in body if isinstance(row, Row)]
    if not cells:
        return [str(text) for text in body]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *cells, strict=True)]

    def line(values: Iterable[str]) -> str:
        return "  ".join(text.rjust(width) for text, width in zip(values, widths, strict=True))

    lines = [" " * (NAME_WIDTH + 2) + line(COLUMNS)]
    filled = iter(cells)
    for entry in body:
        if isinstance(entry, str):
            lines.append(entry)
            continue
        name = f"  {entry.config.model}"
        if len(name) > NAME_WIDTH:
            lines.append(name)
            name = ""
        lines.append(f"{name:<{NAME_WIDTH}}  {line(next(filled))}")
    return lines


def _facts(row: Row) -> str:
    """What a score of this row is to be judged against, and where the data came from."""
    parts = []
    if row.facts:
        parts.append(f"chance {percent(row.facts.chance)}")
    if row.best_trivial:
        name, score = row.best_trivial
        parts.append(f"best trivial {percent(score)} ({name})")
    kind = _source(row).get("kind")
    if kind:
        parts.append(f"{kind} data")
    return " · ".join(parts)


def _source(row: Row) -> Mapping[str, str]:
    return row.facts.data_source if row.facts else row.trials[0].data_source


def _legend(table: str) -> list[str]:
    """The marks that a table uses, explained."""
    meanings = {
        "±": "± 95 %: half the t interval of the mean over the seeds; – with one seed",
        "✗": "✗: not above the best trivial predictor",
        "~": "~: above it, but within the noise",
        "≠": f"≠: parameters not within 2 % of {BASELINE}'s",
    }
    return [text for mark, text in meanings.items() if mark in table]


def machines(rows: Sequence[Row]) -> list[str]:
    where = sorted({_measured_on(row.speed) for row in rows if row.speed})
    return [f"training speed and memory measured alone on {each}" for each in where]


def _measured_on(speed: SpeedRecord) -> str:
    threads = speed.key["threads"]
    return f"{speed.machine}, with {threads} thread{'s' if threads > 1 else ''}"


def pairs_note(pairs: Sequence[Pair]) -> str:
    """What the columns of a table of comparisons are."""
    family = sum(pair.adjusted_p is not None for pair in pairs)
    said = "One seed: no t interval and no p, so that nothing is decided."
    if family:
        said = (
            f"The t interval and p are over seeds, p after Holm's correction for {family} "
            "comparisons; a win or a loss needs an interval clear of zero and p < 0.05."
        )
    return f"Differences in points on shared seeds. {said}"


BOOTSTRAPPED = (
    "The paired bootstrap resamples seeds and test examples, with one seed the examples alone."
)


def pair_cells(pair: Pair) -> dict[str, str]:
    found = pair.comparison
    return {
        "task": pair.row.config.task,
        "model": pair.row.config.model,
        "difference": points(found.difference),
        "95 % t interval": span(found.interval),
        "seeds": str(found.n),
        "p (Holm)": DASH
        if pair.adjusted_p is None
        else f"{pair.adjusted_p:.3f}".replace("0.000", "< 0.001"),
        "verdict": pair.verdict,
        "paired bootstrap": span(found.bootstrap),
    }


def _tabulate(cells: Sequence[Mapping[str, str]], style: str, left: Sequence[str]) -> str:
    titles = list(dict.fromkeys(title for row in cells for title in row))
    aligned = ["left" if title in left else "right" for title in titles]
    body = [[row.get(title, "") for title in titles] for row in cells]
    return tabulate(body, titles, tablefmt=style, colalign=aligned, disable_numparse=True)


def _wrap(line: str) -> list[str]:
    if len(line) <= WIDTH:
        return [line]
    return textwrap.wrap(line, WIDTH, subsequent_indent="    ", break_on_hyphens=False)


def markdown(suite: SuiteResults, pairs: Sequence[Pair] = ()) -> str:
    """The whole of what is known of a suite at one preset, as a Markdown page."""
    parts = [
        f"# {suite.suite}, {suite.preset}",
        f"{caption(suite)[0].upper()}{caption(suite)[1:]}.",
    ]
    if suite.rows or suite.absences:
        parts.append(_rows_markdown(suite))
    notes = [
        f"- {row.config.task}, {row_name(row)}: {note}" for row in suite.rows for note in row.notes
    ]
    if notes:
        parts.append("\n".join(notes))
    parts += [f"{line[0].upper()}{line[1:]}." for line in machines(suite.rows)]
    if pairs:
        parts += [
            f"## Against {BASELINE}",
            f"{pairs_note(pairs)} {BOOTSTRAPPED}",
            _tabulate(
                [{**pair_cells(pair), "model": row_name(pair.row)} for pair in pairs],
                "pipe",
                left=("task", "model"),
            ),
        ]
    facts = _facts_markdown(suite)
    if facts:
        parts += ["## Tasks", facts]
    figures, words = published(suite)
    if figures:
        parts += ["## Published", words, _tabulate(figures, "pipe", left=("task",))]
    if suite.older:
        parts += [
            "## Older versions",
            "Records of an earlier version of the task or the model; not to be compared with the "
            "rows above.",
            _tabulate(
                [row_cells(row) for row in suite.older],
                "pipe",
                left=("task", "model", "data", "outcome"),
            ),
        ]
    return "\n\n".join(parts) + "\n"


def row_name(row: Row) -> str:
    return f"{row.config.model} ({', '.join(row.variant)})" if row.variant else row.config.model


def row_cells(row: Row) -> dict[str, str]:
    summary = row.summary
    return {
        "task": row.config.task,
        "model": row_name(row),
        "accuracy": percent(summary.mean if summary else None),
        "± 95 %": percent(_half_width(row)),
        "sd": percent(summary.sd if summary else None),
        "seeds": _seeds(row),
        "chance": percent(row.facts.chance if row.facts else None),
        "best trivial": percent(row.best_trivial[1] if row.best_trivial else None),
        "beats trivial": row.beats_trivial or DASH,
        **{
            title: COLUMNS[title](row)
            for title in list(COLUMNS)[list(COLUMNS).index("published") :]
        },
        "data": _source(row).get("kind", DASH),
        "outcome": row.outcome,
    }


def _rows_markdown(suite: SuiteResults) -> str:
    cells = []
    for task in suite.tasks:
        cells += [row_cells(row) for row in suite.of_task(task)]
        cells += [
            {"task": task, "model": model or DASH, "outcome": why}
            for (name, model), why in suite.absences.items()
            if name == task
        ]
    titles = [title for row in cells for title in row]
    blank = dict.fromkeys(titles, DASH)
    return _tabulate(
        [{**blank, **row} for row in cells], "pipe", left=("task", "model", "data", "outcome")
    )


def _facts_markdown(suite: SuiteResults) -> str:
    cells: dict[str, dict[str, str]] = {}
    for row in suite.rows:
        if row.facts is None:
            continue
        trivial = sorted(row.facts.trivial.items(), key=lambda item: (-item[1], item[0]))
        source = row.facts.data_source
        shown = {
            "task": row.config.task,
            "chance": percent(row.facts.chance),
            "trivial predictors": ", ".join(f"{name} {percent(score)}" for name, score in trivial),
            "data": source.get("kind", DASH),
            "source": source.get("detail", ""),
            "licence": row.facts.license,
        }
        cells.setdefault(str(shown), shown)
    left = ("task", "trivial predictors", "data", "source", "licence")
    return _tabulate(list(cells.values()), "pipe", left) if cells else ""


def published(suite: SuiteResults) -> tuple[list[dict[str, str]], str]:
    """Figures of others for the tasks of a suite, a line a task, and whose they are."""
    lines = []
    sources = []
    for name in suite.tasks:
        task = find(tasks, name)
        if task and task.published:
            lines.append({"task": name, **{k: f"{v:.1f}" for k, v in task.published.items()}})
            sources.append(task.published_source)
    said = "; ".join(dict.fromkeys(source for source in sources if source))
    words = f"Figures of others, for the paper protocol ({said}); none of them was measured here."
    return lines, words


def frame(suite: SuiteResults) -> pd.DataFrame:
    """One line a row or absence; accuracies in percent, sizes in bytes, older versions last."""
    lines = [row_numbers(row) for row in (*suite.rows, *suite.older)]
    lines += [
        {
            "suite": suite.suite,
            "preset": suite.preset,
            "task": task,
            "model": model,
            "outcome": why,
            "seeds": 0,
        }
        for (task, model), why in suite.absences.items()
    ]
    place = {task: i for i, task in enumerate(suite.tasks)}
    lines.sort(key=lambda line: (line.get("older", False), place.get(line["task"], len(place))))
    return pd.DataFrame(lines, dtype=object)  # so that counts stay whole beside gaps


def row_numbers(row: Row) -> dict[str, Any]:
    config, summary, trivial = row.config, row.summary, row.best_trivial
    low, high = (summary.interval if summary else None) or (None, None)
    return {
        "suite": config.suite,
        "preset": config.preset,
        "task": config.task,
        "model": config.model,
        "variant": ", ".join(row.variant),
        "outcome": row.outcome,
        "accuracy": _points(summary.mean if summary else None),
        "interval_low": _points(low),
        "interval_high": _points(high),
        "sd": _points(summary.sd if summary else None),
        "seeds": len(row.accuracies),
        "chance": _points(row.facts.chance if row.facts else None),
        "best_trivial": _points(trivial[1] if trivial else None),
        "best_trivial_name": trivial[0] if trivial else None,
        "beats_trivial": row.beats_trivial,
        "published": row.published,
        "parameters": _whole(row.fact("parameters")),
        "backbone_parameters": _whole(row.fact("backbone_parameters")),
        "baseline_parameters": _whole(row.fact("baseline_parameters")),
        "matched": row.fact("matched"),
        "state_size": _whole(row.fact("state_size")),
        "flops_per_token": _rounded(row.fact("flops_per_token")),
        "tokens_per_second": _rounded(row.speed.tokens_per_second if row.speed else None),
        "peak_memory": row.speed.peak_memory if row.speed else None,
        "machine": _measured_on(row.speed) if row.speed else None,
        "computed_token_ratio": _rounded(row.computed_token_ratio),
        "data": _source(row).get("kind"),
        "data_detail": _source(row).get("detail"),
        "learning_rate": config.learning_rate,
        "device": config.device,
        "task_version": config.task_version,
        "model_version": config.model_version,
        "older": row.older,
        "notes": "; ".join(row.notes),
    }


def pairs_frame(pairs: Sequence[Pair]) -> pd.DataFrame:
    """One line a comparison with the baseline; differences in percentage points."""
    return pd.DataFrame(
        {
            "task": pair.row.config.task,
            "model": pair.row.config.model,
            "variant": ", ".join(pair.row.variant),
            "baseline": pair.baseline.config.model,
            "seeds": pair.comparison.n,
            "difference": _points(pair.comparison.difference),
            "t_low": _points((pair.comparison.interval or (None, None))[0]),
            "t_high": _points((pair.comparison.interval or (None, None))[1]),
            "p": _rounded(pair.comparison.p),
            "p_holm": _rounded(pair.adjusted_p),
            "verdict": pair.verdict,
            "bootstrap_low": _points((pair.comparison.bootstrap or (None, None))[0]),
            "bootstrap_high": _points((pair.comparison.bootstrap or (None, None))[1]),
        }
        for pair in pairs
    )


def _whole(count: float | None) -> int | None:
    return None if count is None else int(count)


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _points(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 4)


def ablation_markdown(ablation: AblationResults) -> str:
    """An ablation at one preset: its question, its rows, every variant against the baseline."""
    record = ablation.record
    parts = [
        f"# ablation {ablation.name}, {ablation.preset}",
        record.question,
        f"Test accuracy in percent; the baseline is {record.model} as the ablation declares it.",
        _tabulate(
            _point_cells(ablation), "pipe", left=("task", "variant", "model", "data", "outcome")
        ),
        *(f"{line[0].upper()}{line[1:]}." for line in machines(ablation.rows)),
    ]
    notes = {
        f"- {point.task}, {point.name}: {note}": None
        for point in ablation.points
        for note in (point.row.notes if point.row else ())
    }
    if notes:
        parts.append("\n".join(notes))
    if ablation.pairs:
        said = f"{pairs_note([*ablation.pairs.values()])} {BOOTSTRAPPED}"
        parts += ["## Against the baseline", said]
        parts.append(_tabulate(_ablation_pairs(ablation), "pipe", left=("task", "variant")))
    return "\n\n".join(parts) + "\n"


def ablation_terminal(ablation: AblationResults) -> str:
    """The essence of `ablation_markdown`: every point beside its difference from the baseline."""
    kept = ("task", "variant", "accuracy", "± 95 %", "seeds", *PAIRED, "computed", "tokens/s")
    lines, unfinished = [], []
    for point, shown in zip(ablation.points, _point_cells(ablation), strict=True):
        task, pair = point.declared.task, ablation.pairs.get(point.row.cell) if point.row else None
        cells = {**(pair_cells(pair) if pair else {}), **shown, "task": task}
        if point.row:
            lines.append({title: cells.get(title, "") for title in kept})
        if shown["outcome"] != "finished":
            unfinished += _wrap(f"{task}, {point.name}: {shown['outcome']}")
    parts = [
        "\n".join(_wrap(f"{ablation.name}, {ablation.preset} preset: {ablation.record.question}")),
        _tabulate(lines, "simple", left=("task", "variant")) if lines else "",
        "\n".join(unfinished),
        "\n".join(_wrap(pairs_note([*ablation.pairs.values()]))) if ablation.pairs else "",
    ]
    return "\n\n".join(filter(None, parts))


def _point_cells(ablation: AblationResults) -> list[dict[str, str]]:
    lines = []
    for point in ablation.points:
        cells = row_cells(point.row) if point.row else {"outcome": point.reason}
        model = point.row.config.model if point.row else DASH
        lines.append({"task": point.task, "variant": point.name, **cells, "model": model})
    titles = list(dict.fromkeys(title for line in lines for title in line))
    return [{title: line.get(title, DASH) for title in titles} for line in lines]


def _ablation_pairs(ablation: AblationResults) -> list[dict[str, str]]:
    lines = []
    for cell, pair in ablation.pairs.items():
        cells = pair_cells(pair)
        del cells["model"]
        lines.append({"task": cells.pop("task"), "variant": ablation.variants[cell].name, **cells})
    return lines


def ablation_frame(ablation: AblationResults) -> pd.DataFrame:
    """One line a point, with its comparison to the baseline."""
    compared = dict(
        zip(ablation.pairs, pairs_frame([*ablation.pairs.values()]).to_dict("records"), strict=True)
    )
    lines = []
    for point in ablation.points:
        line: dict[str, Any] = {
            "ablation": ablation.name,
            "variant": point.declared.variant,
            "factors": json.dumps(point.declared.factors, sort_keys=True),
            "task": point.task,
            "preset": ablation.preset,
            "outcome": point.reason,
        }
        if point.row:
            line = {**line, **row_numbers(point.row), "variant": point.declared.variant}
            found = compared.get(point.row.cell, {})
            line |= {key: found.get(key) for key in COMPARED}
        lines.append(line)
    return pd.DataFrame(lines, dtype=object)


def write_ablation(ablation: AblationResults, folder: Path) -> list[Path]:
    """Write `ablation-<name>-<preset>.{csv,md}`."""
    stem = f"ablation-{ablation.name}-{ablation.preset}"
    csv = ablation_frame(ablation).to_csv(index=False, lineterminator="\n")
    for suffix, text in {"csv": csv, "md": ablation_markdown(ablation)}.items():
        write_atomic(folder / f"{stem}.{suffix}", text.encode())
    return [folder / f"{stem}.{suffix}" for suffix in ("csv", "md")]


def write_tables(suite: SuiteResults, pairs: Sequence[Pair], folder: Path) -> list[Path]:
    """Write `<suite>-<preset>.{csv,md}` and, where there are pairs, `…-vs-mamba.csv`."""
    stem = f"{suite.suite}-{suite.preset}"
    texts = {
        f"{stem}.csv": frame(suite).to_csv(index=False, lineterminator="\n"),
        f"{stem}.md": markdown(suite, pairs),
    }
    if pairs:
        texts[f"{stem}-vs-{BASELINE}.csv"] = pairs_frame(pairs).to_csv(
            index=False, lineterminator="\n"
        )
    for name, text in texts.items():
        write_atomic(folder / name, text.encode())
    return [folder / name for name in texts]
