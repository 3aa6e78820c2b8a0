"""One HTML page of everything: tables that sort, plots, filters, a link to every record.

Nothing is fetched: styles, script and plots are in the page, which opens from a disk with no server
and is whole without JavaScript.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from urllib.parse import quote

from flexbench.config import PRESETS
from flexbench.report import tables
from flexbench.report.ablations import AblationResults
from flexbench.report.pairs import Pair
from flexbench.report.plots import Plot, plots, seeds, svgs
from flexbench.report.results import Row, SuiteResults
from flexbench.report.views import Panel, View

HERE = Path(__file__).parent

READING = (
    "Accuracies are means over seeds, on a test set that was read once, in percent. ± is half the "
    "95 % Student t interval of the mean over seeds; one seed has none.",
    "No: not above the best trivial predictor, so nothing worth a claim was learnt. Unclear: above "
    "it, but within the noise.",
    "A win or a loss needs a paired t interval clear of zero and p below 0.05 after Holm's "
    "correction for all comparisons of its table. Undecided is not equal.",
    "Published figures are other people's, for the paper protocol; they enter no statistic here. "
    "Quick and small are smaller problems and must not be compared with them.",
    "Accuracies, seeds, speeds, trivial predictors and rates link to the record they come from.",
)


@dataclass(frozen=True)
class Cell:
    """What a table shows, what it sorts by, and the record behind it.

    Attributes:
        text: shown; escaped where it is written.
        value: sorted by; None: by the text.
        links: (path under the results directory, text) instead of `text`.
    """

    text: str
    value: float | str | None = None
    links: tuple[tuple[Path, str], ...] = ()


@dataclass(frozen=True)
class Line:
    """A row of a table; the first cell names it, with `detail` under it in small print."""

    model: str
    suite: str
    variant: bool
    detail: str
    cells: dict[str, Cell]


TEXTS = ("task", "data", "outcome", "beats trivial", "verdict", "model")


def page(
    suites: Iterable[tuple[SuiteResults, list[Pair], View]],
    ablations: Iterable[tuple[AblationResults, View]],
) -> str:
    """The page, from the views that the files of plots are drawn from."""
    sections = [_suite(*each) for each in suites] + [_ablation(*each) for each in ablations]
    lines = [(section, line) for section in sections for line in section.lines]
    presets = {section.preset for section in sections}
    choices = {
        "suite": sorted({line.suite for _, line in lines}),
        "preset": sorted(
            presets,
            key=lambda name: (
                name not in PRESETS,
                PRESETS.index(name) if name in PRESETS else 0,
                name,
            ),
        ),
        "model": sorted({line.model for _, line in lines if line.model}),
    }
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            "<title>flexbench: results</title>",
            f"<style>{(HERE / 'page.css').read_text(encoding='utf-8')}</style></head><body>",
            '<a class="skip" href="#results">Skip to the results</a>',
            "<header><h1>flexbench: results</h1>",
            "<p>Made from the records beside this page by <code>flexbench report</code>.</p>",
            "<details><summary>How to read the figures</summary><ul>",
            *(f"<li>{escape(text)}</li>" for text in READING),
            "</ul></details>",
            _navigation(sections),
            "</header>",
            _form(choices),
            '<main id="results">',
            *(section.html for section in sections),
            "</main>",
            f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>",
            "</body></html>\n",
        ]
    )


@dataclass(frozen=True)
class Section:
    stem: str
    title: str
    preset: str
    lines: tuple[Line, ...]
    html: str


def _form(choices: dict[str, list[str]]) -> str:
    """Shown by the script, since it does nothing without."""
    fields = [
        f'<label>{name}<select name="{name}"><option value="">all</option>'
        + "".join(f"<option>{escape(option)}</option>" for option in options)
        + "</select></label>"
        for name, options in choices.items()
    ]
    own = '<option value="">all</option><option value="own">as the preset has it</option>'
    fields.append(f'<label>configuration<select name="variants">{own}</select></label>')
    body = "".join(fields)
    body += '<button type="reset">Show all</button><output></output>'
    return f'<form hidden aria-label="Filters">{body}</form>'


def _navigation(sections: Iterable[Section]) -> str:
    links = (f'<li><a href="#{each.stem}">{escape(each.title)}</a></li>' for each in sections)
    return f'<nav aria-label="Contents"><ul>{"".join(links)}</ul></nav>'


# -- sections ---------------------------------------------------------------------------------


def _suite(suite: SuiteResults, pairs: Sequence[Pair], view: View) -> Section:
    lines = [_line(row) for task in suite.tasks for row in suite.of_task(task)]
    lines += [_line(row, older=True) for row in suite.older]
    parts = [
        _table(f"{view.stem}:rows", tables.caption(suite), lines),
        *(f"<p>{escape(text[0].upper() + text[1:])}.</p>" for text in tables.machines(suite.rows)),
        _list(
            "Not run",
            (
                f"{task}{model and f', {model}'}: {why}"
                for (task, model), why in suite.absences.items()
            ),
        ),
        _notes(suite.rows),
        _comparisons(view.stem, pairs),
        _published(suite),
    ]
    return _section(view, [suite.suite], suite.preset, lines, parts)


def _ablation(ablation: AblationResults, view: View) -> Section:
    lines = []
    for point in ablation.points:
        if point.row:
            line = _line(point.row)
            cells = {"variant": Cell(point.name), "task": line.cells["task"], **line.cells}
            lines.append(Line(line.model, line.suite, False, "", cells))
    parts = [
        f"<p>{escape(ablation.record.question)}</p>",
        _table(f"{view.stem}:rows", f"{view.title}: test accuracy in percent", lines),
        _list("Not run", (f"{p.task}, {p.name}: {p.reason}" for p in ablation.points if not p.row)),
        _notes(ablation.rows),
        _comparisons(view.stem, [*ablation.pairs.values()], ablation),
    ]
    return _section(view, ablation.suites, ablation.preset, lines, parts)


def _section(
    view: View, suites: Sequence[str], preset: str, lines: Sequence[Line], parts: Sequence[str]
) -> Section:
    html = "\n".join(
        [
            f'<section id="{view.stem}" data-suites="{escape(" ".join(suites))}" '
            f'data-preset="{escape(preset)}"><h2>{escape(view.title)}</h2>',
            *filter(None, parts),
            *_plots(view),
            "</section>",
        ]
    )
    return Section(view.stem, view.title, preset, tuple(lines), html)


def _plots(view: View) -> Iterable[str]:
    for plot in plots(view):
        panels = plot.panels(view)
        if not panels:
            continue
        drawings, legend = svgs(plot, panels, f"{view.stem}/{plot.name}")
        drawn = "".join(map(partial(_panel, plot), panels, drawings))
        said = f"{plot.title[0].upper()}{plot.title[1:]}; {seeds(panels)}."
        key = f'<div class="legend">{_named(legend, "legend")}</div>' if legend else ""
        yield (
            f'<figure class="plot"><figcaption>{escape(said)}</figcaption>'
            f'<div class="panels">{drawn}</div>{key}</figure>'
        )


def _panel(plot: Plot, panel: Panel, drawing: str) -> str:
    named = _named(drawing, f"{panel.task}: {plot.title}; the numbers are in the table")
    said = f"<figcaption>{escape(panel.subtitle)}</figcaption>" if panel.subtitle else ""
    return f'<figure class="panel">{named}{said}</figure>'


def _named(drawing: str, label: str) -> str:
    """The drawing with a name for those who cannot see it."""
    return drawing.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)


# -- tables -----------------------------------------------------------------------------------


def _line(row: Row, *, older: bool = False) -> Line:
    shown, numbers = tables.row_cells(row), tables.row_numbers(row)
    record = {
        trial.config.seed: trial.config.directory(Path()) / "record.json" for trial in row.trials
    }
    first = min(record)
    facts = row.facts.path(Path()) if row.facts else None
    speed = row.speed.path(Path()) if row.speed else None
    selection = row.selection.path(Path()) if row.selection else None
    sources = {
        "accuracy": record[first],
        "chance": facts,
        "best trivial": facts,
        "tokens/s": speed,
        "memory": speed,
        "rate": selection,
    }
    half = (
        None if numbers["interval_high"] is None else numbers["interval_high"] - numbers["accuracy"]
    )
    values = {
        "accuracy": numbers["accuracy"],
        "± 95 %": half,
        "sd": numbers["sd"],
        "chance": numbers["chance"],
        "best trivial": numbers["best_trivial"],
        "params": numbers["parameters"],
        "state": numbers["state_size"],
        "FLOP/token": numbers["flops_per_token"],
        "tokens/s": numbers["tokens_per_second"],
        "memory": numbers["peak_memory"],
        "computed": numbers["computed_token_ratio"],
        "rate": numbers["learning_rate"],
    }
    shown["rate"] = f"{row.config.learning_rate:g}"
    shown["outcome"] += "; older version" if older else ""
    cells = {}
    for title, text in shown.items():
        source = sources.get(title)
        value = values.get(title)
        links = ((source, text),) if source and text != tables.DASH else ()
        cells[title] = Cell(text, "" if title in values and value is None else value, links)
    cells["model"] = Cell(row.config.model)
    cells["seeds"] = Cell(
        shown["seeds"],
        len(row.accuracies),
        tuple(
            (path, f"{seed}" if place else f"seed {seed}")
            for place, (seed, path) in enumerate(record.items())
        ),
    )
    detail = ", ".join(row.variant)
    order = ["model", "task", *(title for title in cells if title not in ("model", "task"))]
    return Line(
        row.config.model,
        row.config.suite,
        bool(row.variant),
        detail,
        {title: cells[title] for title in order},
    )


def _comparisons(stem: str, pairs: Sequence[Pair], ablation: AblationResults | None = None) -> str:
    if not pairs:
        return ""
    lines = []
    for pair in pairs:
        shown = tables.pair_cells(pair)
        found = pair.comparison
        values = {
            "difference": 100 * found.difference,
            "p (Holm)": pair.adjusted_p,
            "seeds": found.n,
        }
        cells = {title: Cell(text, _value(values.get(title))) for title, text in shown.items()}
        name = ablation.variants[pair.row.cell].name if ablation else pair.row.config.model
        order = {
            "variant" if ablation else "model": Cell(name),
            "task": cells.pop("task"),
            **{k: v for k, v in cells.items() if k != "model"},
        }
        detail = "" if ablation else ", ".join(pair.row.variant)
        lines.append(
            Line(
                pair.row.config.model,
                pair.row.config.suite,
                bool(pair.row.variant) and not ablation,
                detail,
                order,
            )
        )
    baseline = "the baseline" if ablation else pairs[0].baseline.config.model
    title = f"Against {baseline}, in points, on the seeds that both ran"
    said = f"{tables.pairs_note(pairs)} {tables.BOOTSTRAPPED}"
    return f"<h3>{escape(title)}</h3>" + _table(f"{stem}:pairs", said, lines)


def _value(number: float | None) -> float | str | None:
    return None if number is None else round(number, 6)


def _table(identity: str, caption: str, lines: Sequence[Line]) -> str:
    titles = list(dict.fromkeys(title for line in lines for title in line.cells))
    shown = [f'<th scope="col"{_class(title)}>{escape(_titled(title))}</th>' for title in titles]
    rows = []
    for line in lines:
        cells = [_cell(title, line.cells.get(title), line) for title in titles]
        kind = ' data-variant="1"' if line.variant else ""
        rows.append(
            f'<tr data-model="{escape(line.model)}" data-suite="{escape(line.suite)}"{kind}>'
            f"{''.join(cells)}</tr>"
        )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">'
        f'<table class="sortable" id="{identity}">'
        f"<caption><span>{escape(caption)}</span></caption>"
        f"<thead><tr>{''.join(shown)}</tr></thead>\n"
        f"<tbody>{chr(10).join(rows)}</tbody></table></div>"
    )


def _class(title: str) -> str:
    if title == "published":
        return ' class="published"'
    if title == "task":
        return ' class="text task"'
    return ' class="text"' if title in (*TEXTS, "variant") else ""


def _titled(title: str) -> str:
    return "published, not ours" if title == "published" else title


def _cell(title: str, cell: Cell | None, line: Line) -> str:
    cell = cell or Cell(tables.DASH)
    inner = escape(cell.text)
    if cell.links:
        inner = " ".join(
            f'<a href="{quote(path.as_posix())}">{escape(text)}</a>' for path, text in cell.links
        )
    value = "" if cell.value is None else f' data-v="{escape(str(cell.value))}"'
    if title == next(iter(line.cells)):
        detail = f"<small>{escape(line.detail)}</small>" if line.detail else ""
        return f'<th scope="row"{value}>{inner}{detail}</th>'
    return f"<td{_class(title)}{value}>{inner}</td>"


def _notes(rows: Iterable[Row]) -> str:
    notes = (f"{row.config.task}, {tables.row_name(row)}: {n}" for row in rows for n in row.notes)
    return _list("Notes", notes)


def _list(title: str, texts: Iterable[str]) -> str:
    items = [f"<li>{escape(text)}</li>" for text in dict.fromkeys(texts)]
    summary = f"<summary>{title}: {len(items)}</summary>"
    return f"<details>{summary}<ul>{''.join(items)}</ul></details>" if items else ""


def _published(suite: SuiteResults) -> str:
    """Figures of others, in a table by themselves."""
    figures, words = tables.published(suite)
    if not figures:
        return ""
    titles = list(dict.fromkeys(title for line in figures for title in line))
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    body = "".join(
        "<tr>"
        + "".join(f"<td>{escape(line.get(title, tables.DASH))}</td>" for title in titles)
        + "</tr>"
        for line in figures
    )
    return (
        f'<h3>Published figures</h3><p class="published">{escape(words)}</p>'
        '<div class="scroll" role="region" tabindex="0" aria-label="Published figures">'
        f'<table class="published"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
