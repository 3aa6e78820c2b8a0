"""Plots of a suite or an ablation, a panel a task: as PNG files, and panel by panel for the page.

Drawn without pyplot and without the user's matplotlibrc, so that the same records give the same
bytes. Markers and line styles say again, for print, what colours say.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from PIL import Image

from flexbench.records import write_atomic
from flexbench.report.results import Row
from flexbench.report.statistics import Summary
from flexbench.report.views import OF_MODEL, Entry, Panel, View

CHANCE: dict[str, Any] = {"color": "#777777", "linewidth": 1.0, "linestyle": (0, (1, 2))}
TRIVIAL: dict[str, Any] = {"color": "#777777", "linewidth": 1.6, "linestyle": "-"}
FAINT = "#aaaaaa"
DPI = 120
INKS = 64
WIDTH, HEIGHT = 3.3, 2.5  # of a panel, inches
COLUMNS = 3
LINE = 24
"""Characters in a line of a row's label."""
NEAR = 0.025
"""Width of a digit, of the width of a panel's axes."""

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "white",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Plot:
    """A way of drawing panels.

    Attributes:
        name: of its files, behind the view's stem.
        title: what it shows, with units.
        wanted: whether there is anything to draw of an entry.
        draw: draws a panel; returns the handles of its legend.
        tall: an entry a line, so that the height follows from their number.
    """

    name: str
    title: str
    wanted: Callable[[Entry], bool]
    draw: Callable[[Axes, Panel], list[Any]]
    tall: bool = False

    def panels(self, view: View) -> list[Panel]:
        """Those with anything to draw, cut down to it."""
        chosen = [
            Panel(each.task, each.subtitle, tuple(filter(self.wanted, each.entries)))
            for each in view.panels
        ]
        return [panel for panel in chosen if panel.entries]


# -- what is measured -------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """A number of a row: its label with the unit, and what it is multiplied with to be shown."""

    label: str
    scale: float
    of: Callable[[Row], Summary | None]


def _speed(row: Row) -> Summary | None:
    return Summary(row.speed.tokens_per_second, None, 1, None) if row.speed else None


def _memory(row: Row) -> Summary | None:
    return Summary(row.speed.peak_memory, None, 1, None) if row.speed else None


MEASURES = {
    "accuracy": Measure("test accuracy (%)", 100, lambda row: row.summary),
    "tokens_per_second": Measure("training speed (tokens/s)", 1, _speed),
    "peak_memory": Measure("peak memory (MB)", 1e-6, _memory),
}
UNITS = {"flops_per_token": "FLOPs per token, forward", "state_size": "state (floats)"}


def measure(name: str) -> Measure:
    """What an ablation calls `name`: one of `MEASURES`, else a metric, diagnostic or model fact."""
    if name in MEASURES:
        return MEASURES[name]
    words = name.replace("_", " ").replace("@", " at ")
    share = name.endswith(("_share", "_ratio")) or name.startswith("test_accuracy@")
    label = f"{words} (%)" if share else UNITS.get(name, words)
    return Measure(label, 100 if share else 1, lambda row: row.over_seeds(name))


LEVELS = {
    f"level_{level}_share": (f"level {level}", mpl.colormaps["cividis"](min(1.0, level / 7)))
    for level in range(24)
}
"""A block of level n has 2 ** n times the smallest length."""

TYPES = {
    "full_share": ("full", "#0072B2"),
    "reduced_share": ("reduced", "#56B4E9"),
    "identity_share": ("identity", "#d9d9d9"),
}


# -- the plots --------------------------------------------------------------------------------


def dots(what: Measure, axis: Axes, panel: Panel) -> list[Any]:
    """A line an entry: mean, 95 % interval, every seed."""
    for y, entry in enumerate(panel.entries):
        summary = what.of(entry.row)
        assert summary is not None
        _point(axis, summary, what.scale, entry.look, y=y)
        seeds = [100 * value for value in entry.row.accuracies.values()]
        if what is MEASURES["accuracy"] and len(seeds) > 1:
            above = [y - 0.25] * len(seeds)
            axis.scatter(seeds, above, s=6, color=entry.look["color"], gid=entry.look["gid"])
    _rows(axis, panel)
    axis.set_xlabel(what.label)
    axis.margins(x=0.08)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    if what.scale == 1:
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    return _bars(axis, panel, across=True) if what is MEASURES["accuracy"] else []


def curve(what: Measure, x: str, log: bool, axis: Axes, panel: Panel) -> list[Any]:
    """A measure by the factor `x`, a line a series; a level line where an entry has no such factor.

    What is not a number stands at equal distances, in the order of the declaration.
    """
    given = [entry.x for entry in panel.entries if entry.x is not None]
    numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in given)
    names = list(dict.fromkeys(map(str, given)))
    places = sorted(set(given)) if numeric else list(range(len(names)))
    if log and numeric and all(place > 0 for place in places):
        axis.set_xscale("log", base=2)
    axis.xaxis.set_minor_locator(NullLocator())
    texts = [f"{place:g}" for place in places] if numeric else names
    crowded = len("".join(texts)) > 28
    texts = texts if crowded else staggered(axis, places, texts)
    axis.set_xticks(places, texts, rotation=45 if crowded else 0)
    axis.set(xlabel=x, ylabel=what.label)
    if what.scale == 1:
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    handles = []
    for series in dict.fromkeys(entry.series for entry in panel.entries):
        entries = [entry for entry in panel.entries if entry.series == series]
        look = entries[0].look
        knots = []
        for entry in entries:
            summary = what.of(entry.row)
            assert summary is not None
            if entry.x is None:
                axis.axhline(what.scale * summary.mean, color=look["color"], linestyle="--")
                continue
            place = entry.x if numeric else names.index(str(entry.x))
            _point(axis, summary, what.scale, look, x=place)
            knots.append((place, what.scale * summary.mean))
        if knots:
            axis.plot(*zip(*sorted(knots), strict=True), **look | {"marker": ""}, linewidth=1.4)
        handles.append(_handle(series or "the factor alone", look))
    return handles + (_bars(axis, panel) if what is MEASURES["accuracy"] else [])


def frontier(cost: Measure, axis: Axes, panel: Panel, *, cheap: bool) -> list[Any]:
    """Accuracy by what it costs; a faint line joins the entries that no other beats in both.

    Args:
        cheap: whether less of `cost` is better (FLOPs) or more is (tokens a second).
    """
    found = []
    for entry in panel.entries:
        price = cost.of(entry.row)
        assert price is not None
        assert entry.row.summary is not None
        _point(axis, entry.row.summary, 100, entry.look, x=price.mean)
        found.append((price.mean if cheap else -price.mean, -entry.row.summary.mean))
    best, edge = math.inf, list[tuple[float, float]]()
    for burden, loss in sorted(found):
        if loss < best:
            best = loss
            edge.append((abs(burden), -100 * loss))
    axis.plot(*zip(*edge, strict=True), color=FAINT, linewidth=1.0, zorder=1)
    axis.set_xscale("log")
    prices = [abs(burden) for burden, _ in found]
    axis.set_xlim(min(prices) / 1.5, max(prices) * 1.5)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axis.set(xlabel=cost.label, ylabel="test accuracy (%)")
    return _entries(panel, lines=False) + _bars(axis, panel)


def effect(axis: Axes, panel: Panel) -> list[Any]:
    """Each entry minus the baseline: paired t interval, bootstrap under it; filled if decided."""
    for y, entry in enumerate(panel.entries):
        assert entry.pair is not None
        found = entry.pair.comparison
        colour = entry.look["color"]
        decided = entry.pair.verdict != "undecided"
        if found.interval:
            low, high = (100 * end for end in found.interval)
            axis.plot([low, high], [y, y], color=colour, linewidth=2.0, marker="|", markersize=8)
        if found.bootstrap:
            low, high = (100 * end for end in found.bootstrap)
            axis.plot([low, high], [y + 0.27] * 2, color=colour, linewidth=1.0)
        axis.plot(
            100 * found.difference,
            y,
            **entry.look | {"linestyle": "none"},
            markersize=6.5,
            markerfacecolor=colour if decided else "white",
            zorder=3,
        )
    axis.axvline(0, color="#444444", linewidth=1.0, zorder=1)
    _rows(axis, panel)
    axis.margins(x=0.08)
    low, high = axis.get_xlim()
    axis.set_xlim(max(low, -104), min(high, 104))
    (baseline,) = {e.pair.baseline.config.model for e in panel.entries if e.pair} or {""}
    axis.set_xlabel(f"accuracy minus {baseline}'s (points)")
    filled: dict[str, Any] = {"marker": "o", "linestyle": "none", "color": "#444444"}
    return [
        Line2D([], [], label="win or loss", **filled),
        Line2D([], [], label="undecided", markerfacecolor="white", **filled),
        Line2D([], [], label="95 % t, paired", color="#444444", linewidth=2.0, marker="|"),
        Line2D([], [], label="95 % bootstrap", color="#444444", linewidth=1.0),
    ]


def history(key: str, label: str, axis: Axes, panel: Panel) -> list[Any]:
    """A share by training step: every seed thin, their mean bold."""
    for entry in panel.entries:
        style = entry.look
        faint = {"color": style["color"], "gid": style["gid"]}
        curves = entry.row.curves(key)
        for curve in curves if len(curves) > 1 else []:
            values = [100 * value for value in curve.values()]
            axis.plot(list(curve), values, **faint, linewidth=0.5, alpha=0.5)
        steps = sorted(set.intersection(*map(set, curves)))
        mean = [100 * sum(curve[step] for curve in curves) / len(curves) for step in steps]
        white: dict[str, Any] = {
            "markersize": 4,
            "markeredgecolor": "white",
            "markeredgewidth": 0.5,
        }
        every = max(1, len(steps) // 5)
        axis.plot(steps, mean, **style, **white, linewidth=1.5, markevery=every)
    axis.margins(x=0.04)
    axis.set_xlim(left=0)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda step, _: _tick(step)))
    axis.set(xlabel="training step", ylabel=label)
    bars = _bars(axis, panel) if key == "validation_accuracy" else []
    return _entries(panel, lines=True) + bars


def lengths(axis: Axes, panel: Panel) -> list[Any]:
    """Accuracy on sequences of other lengths than those of the training."""
    ticks: set[int] = set()
    for entry in panel.entries:
        found = {int(n): s for n, s in entry.row.further.items() if n.isdigit() and int(n)}
        ticks |= found.keys()
        for length, summary in found.items():
            _point(axis, summary, 100, entry.look, x=length)
        means = [100 * summary.mean for summary in found.values()]
        axis.plot(list(found), means, **entry.look | {"marker": ""}, linewidth=1.4)
    axis.set_xscale("log", base=2)
    every = math.ceil(len(ticks) / 5)
    axis.set_xticks(sorted(ticks)[::every], [f"{n:,}" for n in sorted(ticks)[::every]])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set(xlabel="length of test sequences (steps)", ylabel="test accuracy (%)")
    return _entries(panel, lines=True) + _bars(axis, panel)


def shares(parts: dict[str, tuple[str, Any]], axis: Axes, panel: Panel) -> list[Any]:
    """Diagnostics that add up to one, stacked; `parts` has a label and a colour for each."""
    known = [key for key in parts if any(_knows(measure(key), each) for each in panel.entries)]
    for y, entry in enumerate(panel.entries):
        finished = [trial for trial in entry.row.trials if trial.outcome == "finished"]
        start = 0.0
        for key in known:
            found = [100 * trial.diagnostics.get(key, 0.0) for trial in finished]
            share, colour = sum(found) / len(found), parts[key][1]
            axis.barh(y, share, left=start, color=colour, height=0.7, edgecolor="white")
            if share >= 10:
                ink = "white" if sum(to_rgb(colour)) < 1.5 else "black"
                where: dict[str, Any] = {"ha": "center", "va": "center"}
                axis.text(start + share / 2, y, f"{share:.0f}", color=ink, fontsize=8, **where)
            start += share
    _rows(axis, panel)
    axis.set_xlim(0, 100)
    axis.set_xlabel("share of all steps (%), on the test set")
    return [Patch(color=parts[key][1], label=parts[key][0]) for key in known]


def plots(view: View) -> list[Plot]:
    """The plots that a view may have; `Plot.panels` says whether there is anything in one."""
    cost = {"speed": MEASURES["tokens_per_second"], "flops": measure("flops_per_token")}
    record = view.ablation.record if view.ablation else None
    chosen = []
    for name in record.y if record else ["accuracy"]:
        what = measure(name)
        title = f"{what.label}; bars: 95 % t interval of the mean"
        stem = re.sub(r"\W+", "-", name)
        if record and record.x:
            draw: Any = partial(curve, what, record.x, record.log_x)
        else:
            draw = partial(dots, what)
            title += "; dots: seeds" if name == "accuracy" else ""
        known = partial(_knows, what)
        chosen.append(Plot(stem, title, known, draw, tall=not (record and record.x)))
    chosen += [
        Plot(
            f"accuracy-{name}",
            f"test accuracy (%) by {what.label}; bars: 95 % t interval; line: the best trade-offs",
            partial(_knows_both, what),
            partial(frontier, what, cheap=name == "flops"),
        )
        for name, what in cost.items()
    ]
    return [
        *chosen,
        Plot(
            "effect",
            "accuracy minus the baseline's, in points, paired over seeds",
            lambda entry: entry.pair is not None,
            effect,
            tall=True,
        ),
        Plot(
            "learning",
            "validation accuracy (%) by training step; thin: seeds; bold: their mean",
            lambda entry: bool(entry.row.curves("validation_accuracy")),
            partial(history, "validation_accuracy", "validation accuracy (%)"),
        ),
        Plot(
            "lengths",
            "test accuracy (%) by length; bars: 95 % t interval of the mean",
            lambda entry: sum(name.isdigit() for name in entry.row.further) > 1,
            lengths,
        ),
        Plot(
            "computed",
            "computed of all real steps (%) by training step; thin: seeds; bold: their mean",
            lambda entry: bool(entry.row.curves("computed_token_ratio")),
            partial(history, "computed_token_ratio", "computed steps (%)"),
        ),
        Plot(
            "levels",
            "share of steps in blocks of each level (2^level times l0 steps), a mean over seeds",
            lambda entry: any(_knows(measure(key), entry) for key in LEVELS),
            partial(shares, LEVELS),
            tall=True,
        ),
        Plot(
            "types",
            "share of steps in blocks of each type, a mean over seeds",
            lambda entry: any(_knows(measure(key), entry) for key in TYPES),
            partial(shares, TYPES),
            tall=True,
        ),
    ]


def _knows(what: Measure, entry: Entry) -> bool:
    return what.of(entry.row) is not None


def _knows_both(what: Measure, entry: Entry) -> bool:
    return entry.row.summary is not None and what.of(entry.row) is not None


# -- parts ------------------------------------------------------------------------------------


def _point(
    axis: Axes,
    summary: Summary,
    scale: float,
    look: dict[str, Any],
    *,
    x: Any = None,
    y: Any = None,
) -> None:
    """A mean and its interval, across where `y` is given and upright where `x` is."""
    mean = scale * summary.mean
    half = mean - scale * summary.interval[0] if summary.interval else None
    drawn = axis.errorbar(
        mean if x is None else x,
        mean if y is None else y,
        xerr=half if x is None else None,
        yerr=half if y is None else None,
        **look | {"linestyle": "none"},
        markersize=6,
        capsize=3,
        elinewidth=1.4,
        zorder=3,
    )
    for part in drawn.get_children():
        part.set_gid(look["gid"])


def _label(entry: Entry) -> str:
    text = f"{entry.label} (n\u00a0=\u00a0{len(entry.row.accuracies)})"
    return textwrap.fill(text, LINE, break_on_hyphens=False)


def _rows(axis: Axes, panel: Panel) -> None:
    """An entry a line, the first on top, each with its number of seeds."""
    axis.set_yticks(range(len(panel.entries)), [_label(entry) for entry in panel.entries])
    axis.set_ylim(len(panel.entries) - 0.4, -0.6)
    axis.grid(visible=False, axis="y")


def staggered(axis: Axes, places: Sequence[float], texts: Sequence[str]) -> list[str]:
    """Ticks' labels, one that would run into its left neighbour's a line lower."""
    at = axis.get_xaxis().get_transform().transform(np.asarray(places, dtype=np.float64))
    lowered: list[str] = []
    for place, text in enumerate(texts):
        room = (at[place] - at[place - 1]) / (at[-1] - at[0]) if place else 1.0
        near = room < NEAR * max(map(len, texts[place - 1 : place + 1] or [text]))
        lowered.append(f"\n{text}" if near and not lowered[-1].startswith("\n") else text)
    return lowered


def _tick(value: float) -> str:
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.4g}{unit}"
    return f"{value:.4g}"


def _bars(axis: Axes, panel: Panel, *, across: bool = False) -> list[Any]:
    """Draw what an accuracy is to be judged against; return the legend's handles.

    Accuracies run upright, or `across`. No accuracy is outside 0 to 100: an interval may be, and
    is cut.
    """
    row = panel.entries[0].row
    line = axis.axvline if across else axis.axhline
    handles = []
    if row.best_trivial:
        line(100 * row.best_trivial[1], **TRIVIAL, zorder=1)
        handles.append(Line2D([], [], label="best trivial predictor", **TRIVIAL))
    if row.facts:
        line(100 * row.facts.chance, **CHANCE, zorder=1)
        handles.append(Line2D([], [], label="chance", **CHANCE))
    low, high = axis.get_xlim() if across else axis.get_ylim()
    (axis.set_xlim if across else axis.set_ylim)(max(low, -4), min(high, 104))
    return handles


def _entries(panel: Panel, *, lines: bool) -> list[Any]:
    return [
        _handle(entry.label, entry.look if lines else entry.look | {"linestyle": "none"})
        for entry in panel.entries
    ]


def _handle(label: str, look: dict[str, Any]) -> Line2D:
    return Line2D([], [], label=textwrap.fill(label, 2 * LINE, break_on_hyphens=False), **look)


# -- figures ----------------------------------------------------------------------------------


def figure(
    plot: Plot, panels: Sequence[Panel], title: str = "", *, among: Sequence[Panel] = ()
) -> tuple[Figure, list[Any]]:
    """The panels, side by side, under a title; and the handles of their legend, which it lacks.

    `among`: the panels that these are to be as wide as.
    """
    width, height, columns = WIDTH, HEIGHT, COLUMNS
    if plot.tall:
        labels = [_label(each) for panel in among or panels for each in panel.entries]
        deepest = max(label.count("\n") for label in labels)
        height = 0.8 + (0.28 + 0.14 * deepest) * max(len(panel.entries) for panel in panels)
        if deepest:
            width, columns = (1.2 if among else 1.5) * WIDTH, COLUMNS - 1
    columns = min(columns, len(panels))
    lines = math.ceil(len(panels) / columns)
    made = Figure((width * columns, height * lines), dpi=DPI, layout="constrained")
    axes = made.subplots(lines, columns, squeeze=False).flatten()
    handles: dict[str, Any] = {}
    for panel, axis in zip(panels, axes, strict=False):
        for handle in plot.draw(axis, panel):
            handles.setdefault(str(handle.get_label()), handle)
        axis.set_title(panel.task, loc="left")
    for spare in axes[len(panels) :]:
        spare.remove()
    if title:
        fitting = int(made.get_figwidth() * 14)
        text = "\n".join(textwrap.fill(line, fitting) for line in title.splitlines())
        made.suptitle(text, x=0.01, ha="left", fontsize=9.5)
        made.set_figheight(made.get_figheight() + 0.17 * text.count("\n"))
    return made, list(handles.values())


def legend(
    made: Figure, handles: Sequence[Any], where: Literal["upper left", "outside lower left"]
) -> int:
    """Put a legend into a figure; returns how many lines it takes."""
    widest = max(len(line) for handle in handles for line in handle.get_label().splitlines())
    beside = max(1, min(len(handles), int(made.get_figwidth() / (0.066 * widest + 0.5))))
    made.legend(handles=handles, loc=where, ncols=beside)
    deepest = max(handle.get_label().count("\n") for handle in handles)
    return math.ceil(len(handles) / beside) * (1 + deepest)


@contextmanager
def _style(salt: str) -> Iterator[None]:
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE | {"svg.hashsalt": salt})
        yield


def write_plots(view: View, folder: Path) -> list[Path]:
    """Write `<view>-<plot>.png` for every plot that there are data for."""
    paths = []
    for plot in plots(view):
        panels = plot.panels(view)
        if not panels:
            continue
        said = [f"{each.task}: {each.subtitle}" for each in panels if each.subtitle]
        title = f"{view.title}: {plot.title}; {seeds(panels)}"
        with _style(""):
            made, handles = figure(plot, panels, "\n".join([title, *said]))
            if handles:
                lines = legend(made, handles, "outside lower left")
                made.set_figheight(made.get_figheight() + 0.19 * lines)
            canvas = FigureCanvasAgg(made)
            canvas.draw()
            drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
        image = io.BytesIO()
        few = drawn.quantize(INKS, dither=Image.Dither.NONE)  # a third of the bytes
        few.save(image, "png", optimize=True, dpi=(DPI, DPI))
        path = folder / f"{view.stem}-{plot.name}.png"
        write_atomic(path, image.getvalue())
        paths.append(path)
    return paths


def seeds(panels: Sequence[Panel]) -> str:
    counts = sorted({len(entry.row.accuracies) for panel in panels for entry in panel.entries})
    if counts == [1]:
        return "n = 1 seed"
    return f"n = {' to '.join(map(str, dict.fromkeys([counts[0], counts[-1]])))} seeds"


def svgs(plot: Plot, panels: Sequence[Panel], salt: str) -> tuple[list[str], str]:
    """Every panel by itself and the legend of all, "" where there is none, as SVG for a page.

    They have a box but no size of their own. Text stays text, in the page's fonts; the marks of a
    model carry its name as `data-model`.
    """
    drawn = []
    handles: dict[str, Any] = {}
    for panel in panels:
        with _style(f"{salt}/{panel.task}"):
            made, own = figure(plot, [panel], among=panels)
            drawn.append(_svg(made))
        for handle in own:
            handles.setdefault(handle.get_label(), handle)
    if not handles:
        return drawn, ""
    with _style(salt):
        made = Figure((WIDTH, 1.0))
        made.set_figheight(0.1 + 0.19 * legend(made, list(handles.values()), "upper left"))
        return drawn, _svg(made)


def _svg(made: Figure) -> str:
    """A figure's SVG, a third as long: no background, bare groups or fonts, tenths of points."""
    made.patch.set_visible(False)
    text = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    FigureCanvasSVG(made).print_svg(text, metadata=nothing)
    drawn = text.getvalue()
    box = re.search(r'viewBox="[^"]*"', drawn)
    assert box is not None
    inner = drawn[drawn.index(">", box.end()) + 1 :]
    inner = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", inner, flags=re.DOTALL)
    kept: list[bool] = []  # of every open group

    def lean(tag: re.Match[str]) -> str:
        words = tag[0]
        if words == "</g>":
            return words if kept.pop() else ""
        words = re.sub(r" id=\"(?!m[0-9a-f]{10}|p[0-9a-f]{10}|model:)[^\"]*\"", "", words)
        words = words.replace(f' id="{OF_MODEL}', ' data-model="')
        words = re.sub(r"-?\d+\.\d+", lambda number: f"{round(float(number[0]), 1):g}", words)
        words = re.sub(r" transform=\"rotate\(-?0 [^\"]*\"|font-family: [^;\"]*;? ?", "", words)
        words = re.sub(r"(?<=;) (?=\w)|(?<=:) |\s+(?=\"[ />])", "", words)
        if words.startswith("<path"):
            words = re.sub(r"\s*([MLCQz])\s+", r"\1", words)
        if words.startswith("<g"):
            kept.append(words != "<g>")
            return words if kept[-1] else ""
        return words

    return f"<svg {box[0]}>" + re.sub(r">\s+<", "><", re.sub(r"<[^>]*>", lean, inner))
