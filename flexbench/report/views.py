"""What a plot or a page shows of a suite or an ablation: a panel a task, an entry a row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flexbench.report.ablations import AblationResults
from flexbench.report.pairs import Pair
from flexbench.report.results import Row, SuiteResults

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Of Okabe and Ito: told apart by every kind of colour vision."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
DASHES = ("-", "--", "-.", ":")
FAMILIES = ("mamba", "bimamba", "alternating", "flexblock", "hzip")
OF_MODEL = "model:"
"""What an SVG's marks of a model are named, before its name."""

PALEST = 0.6
"""How far towards white the last variant of a family goes."""


@dataclass(frozen=True)
class Entry:
    """A row in a panel.

    Attributes:
        label: what tells it from the panel's other entries.
        look: colour, marker and line style, as matplotlib names them.
        x: its value of the ablation's factor on the x axis, None where it has none.
        series: what it changes beside that factor; entries that change the same are joined.
        pair: its comparison with the baseline, if there is one.
    """

    row: Row
    label: str
    look: dict[str, Any]
    x: Any
    series: str
    pair: Pair | None


@dataclass(frozen=True)
class Panel:
    """A task; `subtitle` says what all entries of a model share."""

    task: str
    subtitle: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class View:
    """A suite or an ablation at one preset, as it is drawn."""

    stem: str
    title: str
    panels: tuple[Panel, ...]
    ablation: AblationResults | None = None


class Looks:
    """A colour and a marker a model family, the same in every plot of a report.

    A family is a model's name up to its first hyphen. Its variants are paler by turns, with other
    markers and line styles.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        others = sorted({_family(row.config.model) for row in rows} - set(FAMILIES))
        self._families = (*FAMILIES, *others)

    def of(self, labelled: Iterable[tuple[str, Row]]) -> dict[str, dict[str, Any]]:
        """The look of each label of a view."""
        models = {label: row.config.model for label, row in labelled}
        families = [_family(model) for model in models.values()]
        looks = {}
        for place, (label, model) in enumerate(models.items()):
            family = families[place]
            own = self._families.index(family)
            turn, count = families[:place].count(family), families.count(family)
            looks[label] = {
                "gid": f"{OF_MODEL}{model}",
                "color": _paler(COLOURS[own % len(COLOURS)], PALEST * turn / max(3, count - 1)),
                "marker": MARKERS[(own + turn) % len(MARKERS)],
                "linestyle": DASHES[(own + turn) % len(DASHES)],
            }
        return looks


def of_suite(suite: SuiteResults, pairs: Sequence[Pair], looks: Looks) -> View:
    """For every model the preset's own row, or its variants where it has none."""
    compared = {pair.row.cell: pair for pair in pairs}
    chosen: dict[str, list[tuple[str, Row]]] = {}
    subtitles = {}
    for task in suite.tasks:
        rows = [row for row in suite.of_task(task) if row.cell not in suite.ablated]
        own = {row.config.model for row in rows if not row.variant}
        rows = [row for row in rows if not row.variant or row.config.model not in own]
        if not rows:
            continue
        shared = {row.config.model: _shared(rows, row.config.model) for row in rows}
        chosen[task] = [(_label(row, shared[row.config.model]), row) for row in rows]
        subtitles[task] = "; ".join(
            f"{model}: {', '.join(settings)}" for model, settings in shared.items() if settings
        )
    look = looks.of(each for rows in chosen.values() for each in rows)
    panels = [
        Panel(
            task,
            subtitles[task],
            tuple(
                Entry(row, label, look[label], None, "", compared.get(row.cell))
                for label, row in rows
            ),
        )
        for task, rows in chosen.items()
    ]
    stem, title = f"{suite.suite}-{suite.preset}", f"{suite.suite}, {suite.preset} preset"
    return View(stem, title, tuple(panels))


def of_ablation(ablation: AblationResults, looks: Looks) -> View:
    """Every variant that has a row, in the order of the declaration."""
    known = [(point, point.row) for point in ablation.points if point.row]
    look = looks.of((point.name, row) for point, row in known)
    panels = []
    for task in ablation.tasks:
        points = ablation.of_task(task)
        baselines = [point.declared.factors for point in points if not point.declared.variant]
        own = baselines[0] if baselines else {}
        entries = tuple(
            Entry(
                row,
                point.name,
                look[point.name],
                _x(ablation, own, point.declared.factors),
                _series(ablation, own, point.declared.factors),
                ablation.pairs.get(row.cell),
            )
            for point, row in known
            if point.declared.task == task
        )
        if entries:
            panels.append(Panel(task.partition("/")[2], "", entries))
    title = f"ablation {ablation.name}, {ablation.preset} preset"
    return View(f"ablation-{ablation.name}-{ablation.preset}", title, tuple(panels), ablation)


def _x(ablation: AblationResults, own: dict[str, Any], factors: dict[str, Any]) -> Any:
    """A variant that does not set the factor has the baseline's, if it is of the same model."""
    if ablation.record.x is None:
        return None
    same = factors.get("model", ablation.record.model) == ablation.record.model
    return {**(own if same else {}), **factors}.get(ablation.record.x)


def _series(ablation: AblationResults, own: dict[str, Any], factors: dict[str, Any]) -> str:
    changed = {key: value for key, value in factors.items() if own.get(key) != value}
    changed.pop(ablation.record.x or "", None)
    return ", ".join(f"{_bare(key)}={value}" for key, value in changed.items())


def _family(model: str) -> str:
    return model.partition("-")[0]


def _label(row: Row, shared: Sequence[str]) -> str:
    return " ".join(
        [row.config.model, *(_bare(each) for each in row.variant if each not in shared)]
    )


def _shared(rows: Sequence[Row], model: str) -> tuple[str, ...]:
    """The settings that all of several variants of a model have in common."""
    variants = [row.variant for row in rows if row.config.model == model]
    return tuple(s for s in variants[0] if all(s in other for other in variants))


def _bare(setting: str) -> str:
    return setting.removeprefix("model.")


def _paler(colour: str, share: float) -> str:
    parts = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return "#" + "".join(f"{math.floor(part + (255 - part) * share):02X}" for part in parts)
