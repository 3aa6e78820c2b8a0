"""Plots of a suite: accuracies, accuracy against speed, learning curves.

Drawn without pyplot and without the user's matplotlibrc, so that the same records give the same
bytes. Colours are those of Okabe and Ito, told apart by every kind of colour vision; markers and
line styles say the same again for print.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from flexbench.records import write_atomic
from flexbench.report.results import Row, SuiteResults
from flexbench.report.tables import quantity

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
DASHES = ("-", "--", "-.", ":")
CHANCE: dict[str, Any] = {"color": "#777777", "linewidth": 1.0, "linestyle": (0, (1, 2))}
TRIVIAL: dict[str, Any] = {"color": "#777777", "linewidth": 1.6, "linestyle": "-"}
DPI = 160
PANEL = 3.1  # inches
COLUMNS = 3

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
    "figure.facecolor": "white",
    "svg.hashsalt": "flexbench",
}


Panels = dict[tuple[str, tuple[str, ...]], list[Row]]
"""What each panel shows, by task and variant."""


class Look:
    """One colour, marker and line style a model, the same in every plot of a suite."""

    def __init__(self, suite: SuiteResults) -> None:
        self.names = list(dict.fromkeys(row.config.model for row in suite.rows))

    def __getitem__(self, row: Row) -> dict[str, Any]:
        place = self.names.index(row.config.model)
        return {
            "color": COLOURS[place % len(COLOURS)],
            "marker": MARKERS[place % len(MARKERS)],
            "linestyle": DASHES[place % len(DASHES)],
        }

    def handles(self, rows: list[Row], *, lines: bool) -> list[Line2D]:
        shown = {row.config.model: self[row] for row in rows}
        return [
            Line2D([], [], label=name, **(look if lines else look | {"linestyle": ""}))
            for name, look in shown.items()
        ]


def write_plots(suite: SuiteResults, folder: Path) -> list[Path]:
    """Write `<suite>-<preset>-{accuracy,speed,learning}.png`, those that there are data for."""
    look = Look(suite)
    paths = []
    for name, draw in {"accuracy": accuracy, "speed": speed, "learning": learning}.items():
        with mpl.rc_context():
            mpl.rcdefaults()
            mpl.rcParams.update(STYLE)
            figure = draw(suite, look)
            if figure is None:
                continue
            image = io.BytesIO()
            FigureCanvasAgg(figure)
            figure.savefig(image, format="png", dpi=DPI, metadata={"Software": None})
        path = folder / f"{suite.suite}-{suite.preset}-{name}.png"
        write_atomic(path, image.getvalue())
        paths.append(path)
    return paths


def accuracy(suite: SuiteResults, look: Look) -> Figure | None:
    """Test accuracy by task and model: mean, 95 % interval, every seed."""
    shown = _choose(suite, lambda row: row.summary is not None)
    if not shown:
        return None
    figure, panels = _panels(suite, shown, "test accuracy (%)")
    for panel, axis in panels.items():
        rows = shown[panel]
        for x, row in enumerate(rows):
            _point(axis, x, row, look)
            seeds = [100 * value for value in row.accuracies.values()]
            if len(seeds) > 1:
                axis.scatter([x + 0.22] * len(seeds), seeds, s=7, color=look[row]["color"])
        names = [f"{row.config.model}\nn = {len(row.accuracies)}" for row in rows]
        crowded = max(map(len, names)) * len(rows) > 60
        axis.set_xticks(
            range(len(rows)),
            names,
            rotation=40 if crowded else 0,
            ha="right" if crowded else "center",
        )
        axis.set_xlim(-0.6, len(rows) - 0.4)
        axis.grid(visible=False, axis="x")
    several = any(len(row.accuracies) > 1 for rows in shown.values() for row in rows)
    meaning = (
        "bars: 95 % t interval of the mean; dots: seeds" if several else "one seed: no interval"
    )
    _finish(figure, suite, _bar_handles(), meaning)
    return figure


def speed(suite: SuiteResults, look: Look) -> Figure | None:
    """Test accuracy against measured training speed."""
    shown = _choose(suite, lambda row: row.summary is not None and row.speed is not None)
    if not shown:
        return None
    figure, panels = _panels(suite, shown, "test accuracy (%)", "training speed (tokens/s)")
    for panel, axis in panels.items():
        for row in shown[panel]:
            assert row.speed is not None
            _point(axis, row.speed.tokens_per_second, row, look)
        axis.set_xscale("log")
        _pad_log(axis, [row.speed.tokens_per_second for row in shown[panel] if row.speed])
    rows = [row for panel in shown.values() for row in panel]
    machines = sorted({row.speed.machine for row in rows if row.speed})
    handles = look.handles(rows, lines=False) + _bar_handles()
    _finish(figure, suite, handles, f"{_seeds(rows)}; speed alone on {', '.join(machines)}")
    return figure


def learning(suite: SuiteResults, look: Look) -> Figure | None:
    """Validation accuracy by training step: every seed thin, their mean bold."""
    shown = _choose(suite, lambda row: any(row.curves.values()))
    if not shown:
        return None
    figure, panels = _panels(suite, shown, "validation accuracy (%)", "training step")
    for panel, axis in panels.items():
        for row in shown[panel]:
            style = look[row]
            curves = [dict(curve) for curve in row.curves.values() if curve]
            for curve in curves if len(curves) > 1 else []:
                values = [100 * value for value in curve.values()]
                axis.plot(list(curve), values, color=style["color"], linewidth=0.6, alpha=0.5)
            steps = sorted(set.intersection(*map(set, curves)))
            mean = [100 * sum(curve[step] for curve in curves) / len(curves) for step in steps]
            axis.plot(
                steps,
                mean,
                **style,
                markersize=4,
                linewidth=1.5,
                markeredgecolor="white",
                markeredgewidth=0.5,
            )
        axis.margins(x=0.04)
        axis.set_xlim(left=0)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda step, _: quantity(step)))
    rows = [row for panel in shown.values() for row in panel]
    handles = look.handles(rows, lines=True) + _bar_handles()
    _finish(figure, suite, handles, f"thin: seeds; bold: their mean; {_seeds(rows)}")
    return figure


def _choose(suite: SuiteResults, wanted: Callable[[Row], bool]) -> Panels:
    """A panel a task with the preset's own rows, or one a variant where a task has none."""
    panels: Panels = {}
    for task in suite.tasks:
        rows = [row for row in suite.of_task(task) if wanted(row)]
        own = [row for row in rows if not row.variant]
        for row in own or rows:
            panels.setdefault((task, row.variant), []).append(row)
    return panels


def _panels(
    suite: SuiteResults, shown: Panels, y_label: str, x_label: str = ""
) -> tuple[Figure, dict[tuple[str, tuple[str, ...]], Axes]]:
    """The figure and its panels, with lines for chance and the best trivial predictor."""
    columns = min(COLUMNS, len(shown))
    lines = math.ceil(len(shown) / columns)
    size = (max(5.4, PANEL * columns), 2.5 * lines + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)  # type: ignore[union-attr, call-arg]
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for spare in axes[len(shown) :]:
        spare.remove()
    panels = dict(zip(shown, axes, strict=False))
    for place, (panel, axis) in enumerate(panels.items()):
        task, variant = panel
        axis.set_title("\n".join([task, *variant]), loc="left")
        if place % columns == 0:
            axis.set_ylabel(y_label)
        axis.set_xlabel(x_label)
        row = shown[panel][0]
        if row.facts:
            axis.axhline(100 * row.facts.chance, **CHANCE, zorder=1)
        if row.best_trivial:
            axis.axhline(100 * row.best_trivial[1], **TRIVIAL, zorder=1)
    return figure, panels


def _point(axis: Axes, x: float, row: Row, look: Look) -> None:
    assert row.summary is not None
    style = look[row] | {"linestyle": "none"}
    error = None
    if row.summary.interval:
        error = 100 * (row.summary.mean - row.summary.interval[0])
    axis.errorbar(
        x,
        100 * row.summary.mean,
        error,
        **style,
        markersize=6.5,
        capsize=3,
        elinewidth=1.4,
        zorder=3,
    )


def _pad_log(axis: Axes, values: list[float]) -> None:
    low, high = min(values), max(values)
    axis.set_xlim(low / 1.5, high * 1.5)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: quantity(value)))


def _bar_handles() -> list[Line2D]:
    return [
        Line2D([], [], label="best trivial predictor", **TRIVIAL),
        Line2D([], [], label="chance", **CHANCE),
    ]


def _seeds(rows: list[Row]) -> str:
    counts = sorted({len(row.accuracies) for row in rows})
    if counts == [1]:
        return "n = 1 seed"
    return f"n = {' to '.join(map(str, dict.fromkeys([counts[0], counts[-1]])))} seeds"


def _finish(figure: Figure, suite: SuiteResults, handles: list[Line2D], meaning: str) -> None:
    figure.suptitle(
        f"{suite.suite}, {suite.preset} preset  ({meaning})", x=0.01, ha="left", fontsize=9.5
    )
    widest = max(len(str(handle.get_label())) for handle in handles)
    fitting = int(figure.get_figwidth() / (0.065 * widest + 0.55))
    columns = max(1, min(fitting, len(handles)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
