"""What a trained model does with real samples, drawn: its guide map, its gates, its answer."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from flexbench.errors import UserError, did_you_mean
from flexbench.interface import Batch
from flexbench.models import build, resolve
from flexbench.models.flexblock import BlockType, GuideMap
from flexbench.models.flexblock.guide import REV
from flexbench.records import Record, read_record, scan, write_atomic
from flexbench.report.plots import DPI, STYLE
from flexbench.tasks.base import Task, TaskData
from flexbench.tasks.base import registry as task_registry
from flexbench.tasks.store import Store

TYPE_COLOURS = {
    BlockType.FULL: "#0072B2",
    BlockType.REDUCED: "#E69F00",
    BlockType.IDENTITY: "#d9d9d9",
}
BY_DIRECTION = "forward green, REV orange,\nlarger blocks stronger"
WIDTH = 11.0  # inches
LEGIBLE = 128
"""Sequences of at most so many tokens have their tokens written out."""


@dataclass(frozen=True)
class Sample:
    """One example as the model saw it: what it was asked, what it said, what its parts traced."""

    batch: Batch
    answers: Tensor
    traces: list[tuple[str, Any]]


def inspect(
    task: str,
    run: str,
    results: Path,
    store: Store,
    *,
    samples: int = 4,
    output: Path | None = None,
) -> Path:
    """Draw test samples with what a trained model makes of them; returns the PNG's path.

    Args:
        task: a task's name.
        run: a run's directory, or the name of a model, of which the newest finished run is taken.
        results: the results directory.
        store: where the task's data lie.
        samples: how many, the first of the test set.
        output: the PNG; None: `results`/inspect/<task>-<model>.png.

    Raises:
        UserError: no such run, or its weights are gone.
        DataUnavailable: the task's data are not there.
        CannotWrite: no permission, or a full disk.
    """
    if samples < 1:
        raise UserError(f"--samples must be at least 1 (got {samples})")
    record, directory = find_run(task, run, results)
    chosen = task_registry.get(task).parse(record.config.task_options)
    chosen.prepare(store)
    data = chosen.load(store)
    seen = list(look(record, directory, data, samples))
    figure = draw(seen, chosen, data, record, chosen.symbols(store))
    path = output or results / "inspect" / f"{task}-{directory.parent.name}.png"
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DPI, metadata={"Software": None})
    write_atomic(path, picture.getvalue())
    return path


def find_run(task: str, run: str, results: Path) -> tuple[Record, Path]:
    """The record that `run` means, and its directory.

    Raises:
        UserError: there is none, it did not finish, or its weights are gone.
    """
    task_registry.get(task)
    named = Path(run)
    if named.is_dir():
        try:
            record = read_record(named / "record.json")
        except ValueError as error:
            raise UserError(str(error)) from None
        if record is None:
            raise UserError(f"{run} holds no record.json; name a run's directory or a model")
        if record.config.task != task:
            raise UserError(f"{run} is a run of '{record.config.task}', not of '{task}'")
        found = [(record, named)]
    else:
        records = [r for r in scan(results, Record, []) if r.config.task == task]
        found = [(r, r.config.directory(results)) for r in records if r.config.model == run]
        if not found:
            known = {r.config.model for r in records}
            hint = did_you_mean(run, known) or f"; run it first: flexbench run --models {run} …"
            raise UserError(f"no run of '{run}' on '{task}' in {results}{hint}")
    whole = [pair for pair in found if (pair[1] / "best.pt").exists()]
    if not whole:
        raise UserError(
            f"the weights of '{run}' on '{task}' are not there (only records travel with git); "
            f"remove {found[-1][1]}/record.json and run it again"
        )
    return max(whole, key=lambda pair: (pair[1] / "best.pt").stat().st_mtime)


def look(record: Record, directory: Path, data: TaskData, samples: int) -> Iterator[Sample]:
    """Run the model on the first test examples, one at a time, with its parts tracing."""
    config = record.config
    model = build(data.spec, config.stack, resolve(config.model).parse(config.model_options))
    try:
        weights = torch.load(directory / "best.pt", map_location="cpu", weights_only=True)
        model.load_state_dict(weights)
    except Exception:
        raise UserError(f"{directory / 'best.pt'} does not fit its record; run it again") from None
    model.eval()
    tracing = [(name, m) for name, m in model.backbone.named_modules() if hasattr(m, "trace")]
    for index in range(min(samples, len(data.test))):
        batch = data.test.batch(np.array([index]))
        for _, module in tracing:
            module.trace = {}
        with torch.no_grad():
            answers = model(batch).argmax(-1)
        found = [
            (f"{_place(name)}{what}", value)
            for name, module in tracing
            for what, value in module.trace.items()
        ]
        yield Sample(batch, answers, found)


def _place(name: str) -> str:
    """ "layers.1.mixer.router" as "layer 2, "; nothing for what serves all layers."""
    parts = name.split(".")
    return f"layer {int(parts[1]) + 1}, " if parts[0] == "layers" else ""


# -- drawing ---------------------------------------------------------------------------------


def draw(
    samples: list[Sample], task: Task, data: TaskData, record: Record, symbols: list[str] | None
) -> Figure:
    """A block of panels a sample, one under another."""
    as_picture = data.spec.input == "values" and task.view == "image"
    panels = [_picture_panels(s) if as_picture else _strip_panels(s, data) for s in samples]
    heights = [0.7 * len(p) + 1.1 if not as_picture else 2.6 for p in panels]
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(WIDTH, sum(heights) + 0.8), layout="constrained")
        FigureCanvasAgg(figure)
        config = record.config
        figure.suptitle(
            f"{config.model} on {config.task}: {config.preset} preset, seed {config.seed}, "
            f"best validation weights; test samples",
            fontsize=11,
        )
        mapped = any(isinstance(value, GuideMap) for s in samples for _, value in s.traces)
        ratios = [*([0.45] if mapped else []), *heights]
        rest = list(figure.subfigures(len(ratios), 1, height_ratios=ratios, squeeze=False)[:, 0])
        if mapped:
            _legend(rest.pop(0))
        for sub, sample, parts in zip(rest, samples, panels, strict=True):
            sub.suptitle(_verdict(sample), fontsize=9, x=0.01, ha="left")
            if as_picture:
                _draw_picture(sub, sample, parts)
            else:
                _draw_strips(sub, sample, parts, symbols)
    return figure


def _legend(figure: SubFigure) -> None:
    handles = [
        Patch(facecolor=colour, edgecolor="black", label=kind.name.lower())
        for kind, colour in TYPE_COLOURS.items()
    ]
    handles.append(Patch(facecolor="white", edgecolor="black", hatch="////", label="read reversed"))
    figure.legend(handles=handles, loc="center", ncols=len(handles), title="blocks", fontsize=8)


def _verdict(sample: Sample) -> str:
    labels, answers = sample.batch.labels, sample.answers
    if labels.dim() == 1:
        mark = "right" if bool(labels[0] == answers[0]) else "wrong"
        return f"label {int(labels[0])}, answer {int(answers[0])}: {mark}"
    asked = labels != -100
    right = int((labels == answers)[asked].sum())
    return f"{right} of {int(asked.sum())} queries right"


def _rows(sample: Sample) -> list[int]:
    """Real steps of each row of the sample."""
    batch = sample.batch
    if batch.lengths is not None:
        return batch.lengths.tolist()
    return [batch.inputs.shape[1]] * len(batch.inputs)


Panel = tuple[str, int, Any]
"""Title, row of the batch, and what is drawn."""


def _strip_panels(sample: Sample, data: TaskData) -> list[Panel]:
    panels: list[Panel] = []
    rows = _rows(sample)
    for row, length in enumerate(rows):
        tower = f" {row + 1}" if len(rows) > 1 else ""
        panels.append((f"input{tower}", row, sample.batch.inputs[row, :length]))
        for title, value in sample.traces:
            part = _of_row(value, row, rows)
            if part is not None:
                panels.append((f"{title}{tower}", row, part))
    return panels


def _of_row(value: Any, row: int, rows: list[int]) -> Any:
    """A trace's share of one row: a frame of blocks, or (steps, channels)."""
    if isinstance(value, GuideMap):
        frame = value.to_frame()
        return frame[frame["batch"] == row]
    if not isinstance(value, Tensor):
        return None
    if value.dim() == 2:
        value = value[..., None]
    steps = value[row] if len(value) == len(rows) and len(rows) > 1 else value[0]
    if len(value) == 1 and len(steps) == sum(rows):
        start = sum(rows[:row])
        return steps[start : start + rows[row]]
    return steps[: rows[row]]


def _draw_strips(
    figure: SubFigure, sample: Sample, panels: list[Panel], symbols: list[str] | None
) -> None:
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for index, (axis, (title, row, part)) in enumerate(zip(axes, panels, strict=True)):
        length = _rows(sample)[row]
        if title.startswith("input"):
            _draw_input(axis, sample, row, part, symbols)
        elif isinstance(part, Tensor):
            _draw_values(axis, part, shares=title.endswith("mixture"))
        else:
            _draw_blocks(axis, part)
        axis.set_xlim(0, length)
        axis.set_ylabel(title.replace(", ", ",\n"), rotation=0, ha="right", va="center", fontsize=8)
        axis.tick_params(labelsize=7, labelbottom=index == len(panels) - 1)
    axes[-1].set_xlabel("step", fontsize=8)


def _draw_input(
    axis: Axes, sample: Sample, row: int, part: Tensor, symbols: list[str] | None
) -> None:
    length = len(part)
    if part.is_floating_point():
        axis.plot(np.arange(length) + 0.5, part.numpy(), color="black", linewidth=0.7)
    else:
        colours = mpl.colormaps["tab20"].resampled(20)
        ids = part.numpy()[None] % 20
        extent = (0, length, 0, 1)
        axis.imshow(ids, aspect="auto", cmap=colours, vmin=0, vmax=20, alpha=0.55, extent=extent)
        axis.set_yticks([])
        if length <= LEGIBLE:
            names = [symbols[i] if symbols else str(i) for i in part.tolist()]
            size = max(3.5, min(7.0, 620 / length / max(map(len, names))))
            for place, name in enumerate(names):
                middle = (place + 0.5, 0.5)
                axis.text(*middle, name, ha="center", va="center", fontsize=size, clip_on=True)
    labels = sample.batch.labels
    if labels.dim() == 2:
        asked = (labels[row, :length] != -100).nonzero()[:, 0]
        right = (labels[row] == sample.answers[row])[asked]
        for marker, chosen in (("v", asked[right]), ("x", asked[~right])):
            axis.plot(
                chosen.numpy() + 0.5,
                np.full(len(chosen), 1.08),
                marker,
                color="black",
                markersize=3,
                transform=axis.get_xaxis_transform(),
                clip_on=False,
            )


def _draw_blocks(axis: Axes, blocks: Any) -> None:
    top = 1 + int(blocks["level"].max())
    for block in blocks.itertuples(index=False):
        kind, reverse = BlockType(block.type), bool(block.flags & REV)
        axis.add_patch(
            Rectangle(
                (block.start, 0),
                block.length,
                1 + block.level,
                facecolor=TYPE_COLOURS[kind],
                edgecolor="white" if kind is not BlockType.IDENTITY else "#999999",
                hatch="////" if reverse else None,
                linewidth=0.6,
            )
        )
    axis.set_ylim(0, top)
    axis.set_yticks([level + 0.5 for level in range(top)], [f"level {k}" for k in range(top)])


def _draw_values(axis: Axes, part: Tensor, shares: bool) -> None:
    values = part.float().numpy()
    steps = np.arange(len(values)) + 0.5
    if shares:
        axis.stackplot(steps, values.T, labels=[str(k) for k in range(values.shape[1])])
        axis.set_ylim(0, 1)
        return
    if values.shape[1] > 1:
        low, high = np.quantile(values, (0.1, 0.9), axis=1)
        axis.fill_between(steps, low, high, color="#56B4E9", alpha=0.5, linewidth=0)
    axis.step(steps, values.mean(1), where="mid", color="#0072B2", linewidth=0.9)


def _picture_panels(sample: Sample) -> list[Panel]:
    panels: list[Panel] = [("input", 0, sample.batch.inputs[0, :, 0])]
    rows = _rows(sample)
    for title, value in sample.traces:
        part = _of_row(value, 0, rows)
        if part is not None:
            panels.append((title, 0, part))
    return panels


def _draw_picture(figure: SubFigure, sample: Sample, panels: list[Panel]) -> None:
    side = math.isqrt(len(panels[0][2]))
    picture = panels[0][2].numpy().reshape(side, side)
    axes = figure.subplots(1, max(4, len(panels) + 1), squeeze=False)[0]
    for axis in axes:
        axis.set_axis_off()
    axes[0].imshow(picture, cmap="gray")
    axes[0].set_title("input", fontsize=8)
    place = 1
    for title, _, part in panels[1:]:
        if isinstance(part, Tensor):
            axes[place].imshow(part.float().mean(1).numpy().reshape(side, side), cmap="viridis")
            axes[place].set_title(title, fontsize=8)
            place += 1
            continue
        for what, paint in (("types", _paint_types), (BY_DIRECTION, _paint_levels)):
            if place == len(axes):
                return
            axes[place].imshow(picture, cmap="gray")
            axes[place].imshow(paint(part, side), interpolation="nearest")
            axes[place].set_title(f"{title}: {what}", fontsize=7)
            place += 1


def _paint_types(blocks: Any, side: int) -> np.ndarray:
    """(side, side, 4): blue veil on full, orange on reduced, grey cover on identity."""
    veil = {BlockType.FULL: 0.35, BlockType.REDUCED: 0.45, BlockType.IDENTITY: 0.85}
    flat = np.zeros((side * side, 4))
    for block in blocks.itertuples(index=False):
        kind = BlockType(block.type)
        colour = mpl.colors.to_rgb(TYPE_COLOURS[kind])
        flat[block.start : block.start + block.length] = (*colour, veil[kind])
    return flat.reshape(side, side, 4)


def _paint_levels(blocks: Any, side: int) -> np.ndarray:
    """(side, side, 4): the deeper green the larger the block, the deeper red if it is reversed."""
    top = max(1, int(blocks["level"].max()))
    flat = np.zeros((side * side, 4))
    colours = {False: mpl.colors.to_rgb("#009E73"), True: mpl.colors.to_rgb("#D55E00")}
    for block in blocks.itertuples(index=False):
        depth = 0.25 + 0.5 * block.level / top
        flat[block.start : block.start + block.length] = (*colours[bool(block.flags & REV)], depth)
    return flat.reshape(side, side, 4)
