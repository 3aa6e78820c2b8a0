"""From a declared ablation to cells, and from their records to what it compares."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flexbench.ablations import Ablation, read
from flexbench.config import PRESETS
from flexbench.errors import DataUnavailable, UserError, did_you_mean
from flexbench.harness.events import Observer
from flexbench.harness.executor import Executor
from flexbench.harness.sweep import BASELINE, SEEDS, Cell, Plan, SweepResult, plan, run
from flexbench.records import AblationPoint, AblationRecord, TrialConfig, write_json
from flexbench.tasks.base import registry as task_registry
from flexbench.tasks.base import suites
from flexbench.tasks.store import Store

LEAST_LEAVES = 8
"""A sequence of fewer leaves says nothing of blocks."""


@dataclass(frozen=True)
class Variant:
    """A cell of an ablation; task, label and factors are those of `AblationPoint`."""

    task: str
    label: str
    factors: dict[str, Any]
    cell: Cell


@dataclass(frozen=True)
class AblationPlan:
    """All that an ablation will do at one preset, the baseline of each task first."""

    name: str
    ablation: Ablation
    preset: str
    device: str
    variants: tuple[Variant, ...]


def plan_ablation(
    which: str, *, preset: str = "quick", seeds: int | None = None, device: str = "auto"
) -> AblationPlan:
    """The baseline and its variants on every task; made without data, network or training.

    A cell is what `plan` makes of the same settings: trials are shared with any other sweep.

    Args:
        which: the name of a declared ablation, or the path of a declaration.
        preset, seeds, device: as in `plan`; None: as many seeds as the declaration says.

    Raises:
        UserError: an unknown preset, task, model, key or value; a variant that is the same cell as
            the baseline or another variant.
    """
    name, ablation = read(which)
    if preset not in PRESETS:
        raise UserError(f"unknown preset '{preset}'{did_you_mean(preset, PRESETS)}")
    tasks = ablation.tasks.get(preset)
    if not tasks:
        raise UserError(f"'{name}' declares no tasks at preset '{preset}'")
    if seeds is None:
        seeds = {**SEEDS, **ablation.seeds}[preset]
    variants: list[Variant] = []
    for where in tasks:
        own: dict[str, Variant] = {}
        for label, factors in ablation.variants():
            cell = _plan_cell(ablation, where, factors, tasks, preset, seeds, device)
            variant = Variant(where, label, factors, cell)
            twin = own.setdefault(cell.grid[0].cell if cell.grid else label, variant)
            if twin is not variant and (twin.label or not ablation.grid):
                same = f"is the same as '{twin.label}'" if twin.label else "changes nothing"
                raise UserError(f"variant '{label}' of '{name}' {same} on {where}; leave it out")
        baseline, *others = own.values()
        variants += [_with_own_values(baseline, others), *others]
    device = next((each.cell.grid[0].device for each in variants if each.cell.grid), device)
    return AblationPlan(name, ablation, preset, device, tuple(variants))


def run_ablation(
    planned: AblationPlan,
    *,
    results: Path,
    store: Store,
    executor: Executor,
    observe: Observer = lambda event: None,
    measure_speed: bool = True,
) -> tuple[AblationRecord, SweepResult]:
    """Train what is not on record, write down what is compared; raises what `run` raises."""
    ablation = planned.ablation
    result = run(
        Plan(planned.device, tuple(_unless_short(each.cell, store) for each in planned.variants)),
        results=results,
        store=store,
        executor=executor,
        observe=observe,
        measure_speed=measure_speed,
    )
    points = []
    for variant, outcome in zip(planned.variants, result.cells, strict=True):
        cell = outcome.cell
        ran = cell.status == "planned"
        points.append(
            AblationPoint(
                task=variant.task,
                variant=variant.label,
                factors=variant.factors,
                cell=cell.grid[0].cell if ran else None,
                reason="" if ran else f"{cell.status}: {cell.reason}",
            )
        )
    record = AblationRecord(
        name=planned.name,
        question=ablation.question,
        preset=planned.preset,
        model=ablation.model,
        x=ablation.plot.x,
        log_x=ablation.plot.log,
        y=list(ablation.plot.y),
        points=tuple(points),
        declaration=ablation.model_dump(mode="json", exclude_unset=True),
    )
    write_json(record.path(results), record)
    return record, result


def _plan_cell(
    ablation: Ablation,
    where: str,
    factors: dict[str, Any],
    tasks: Mapping[str, Mapping[str, Any]],
    preset: str,
    seeds: int,
    device: str,
) -> Cell:
    suite, _, task = where.partition("/")
    known = [f"{suite}/{name}" for suite, names in suites().items() for name in names]
    if where not in known:
        raise UserError(f"unknown task '{where}'{did_you_mean(where, known)}")
    settings = {**ablation.settings, **tasks[where], **factors}
    model = settings.pop("model", ablation.model)
    apart = {*(each.partition("/")[2] for each in tasks), *ablation.models}
    apart -= {task, model, BASELINE}
    overrides = [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in settings.items()
        if key.rpartition(".")[0] not in apart
    ]
    planned = plan(
        suite,
        tasks=[task],
        models=[model],
        seeds=seeds,
        preset=preset,
        device=device,
        overrides=overrides,
    )
    return planned.cells[0]


def _with_own_values(baseline: Variant, variants: Sequence[Variant]) -> Variant:
    """The baseline with its values of all that the variants set."""
    if not baseline.cell.grid:
        return baseline
    keys = dict.fromkeys(key for variant in variants for key in variant.factors)
    own = _settings(baseline.cell.grid[0])
    return replace(baseline, factors={key: own[key] for key in keys if key in own})


def _settings(trial: TrialConfig) -> dict[str, Any]:
    """All values that a trial is made of, by every key that sets them."""
    found: dict[str, Any] = {"model": trial.model}
    for scopes, values in (
        (("training",), trial.training.model_dump(mode="json")),
        (("stack",), trial.stack.model_dump(mode="json")),
        (("task", trial.task), trial.task_options),
        (("model", trial.model), trial.model_options),
    ):
        found |= {f"{scope}.{key}": value for scope in scopes for key, value in values.items()}
    return found


def _unless_short(cell: Cell, store: Store) -> Cell:
    """The cell, or why it is not run: too few leaves a sequence to say anything of blocks."""
    options = cell.grid[0].model_options if cell.grid else {}
    l0 = options.get("l0") or options.get("block_gating")
    if not l0:
        return cell
    task = task_registry.get(cell.task).parse(cell.grid[0].task_options)
    try:
        task.prepare(store)
        leaves = -(-task.load(store).spec.max_length // l0)
    except DataUnavailable:
        return cell  # which the sweep says
    if leaves >= LEAST_LEAVES:
        return cell
    reason = f"too short: {leaves} blocks a sequence, {LEAST_LEAVES} are wanted"
    return replace(cell, status="skipped", reason=reason)
