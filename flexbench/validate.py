"""Check what a sweep would train, in seconds: data, gradients, causality, matched parameters."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from tabulate import tabulate

from flexbench.errors import UserError
from flexbench.harness import Cell, Plan
from flexbench.harness.trial import Diverged, make_optimizer, train_step
from flexbench.models import MixerConfig, backbone_parameters, build, is_matched, resolve
from flexbench.models.stack import Backbone
from flexbench.records import TrialConfig
from flexbench.tasks.base import TaskData
from flexbench.tasks.base import registry as task_registry
from flexbench.tasks.store import Store

CHECKS = ("data", "gradients", "causality", "parameters")
EXAMPLES = 4
LENGTH = 96


class Failed(Exception):
    """A check failed; the message says what is wrong."""


@dataclass
class Findings:
    """What each check said of each task and model: "ok", a reason, or "" where it was not run."""

    rows: list[dict[str, str]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(row[check] in ("ok", "") for row in self.rows for check in CHECKS)

    def table(self) -> str:
        """A line a task and model, under it what failed and why."""
        cells, reasons = [], []
        for row in self.rows:
            marks = [_mark(row[check]) for check in CHECKS]
            cells.append([row["task"], row["model"], *marks, row.get("note", "")])
            for check in CHECKS:
                if row[check] not in ("ok", ""):
                    reasons.append(f"{row['task']}, {row['model']}: {check}: {row[check]}")
        titles = ["task", "model", *CHECKS, ""]
        return "\n".join([tabulate(cells, titles), *([""] if reasons else []), *reasons])


def _mark(said: str) -> str:
    return said if said == "ok" else "FAILED" if said else "–"


def check_plan(plan: Plan, store: Store) -> Findings:
    """Run every check on every planned task and model; prepares data as a run would."""
    findings = Findings()
    loaded: dict[str, TaskData | str] = {}
    for cell in plan.cells:
        row = {"task": cell.task, "model": cell.model, **dict.fromkeys(CHECKS, "")}
        findings.rows.append(row)
        if cell.status != "planned":
            row["note"] = f"{cell.status}: {cell.reason}"
            continue
        config = cell.grid[0]
        if cell.task not in loaded:
            loaded[cell.task] = _load(config, store)
        data = loaded[cell.task]
        row["data"] = data if isinstance(data, str) else "ok"
        if isinstance(data, TaskData):
            row["gradients"] = _verdict(partial(_check_gradients, config, data))
        row["causality"] = _verdict(partial(_check_causality, config))
        row["parameters"] = _verdict(partial(_check_parameters, cell))
    return findings


def _verdict(check: Callable[[], None]) -> str:
    try:
        check()
    except (Failed, UserError, Diverged) as error:
        return str(error)
    except Exception:
        return traceback.format_exc().strip().splitlines()[-1]
    return "ok"


def _load(config: TrialConfig, store: Store) -> TaskData | str:
    try:
        task = task_registry.get(config.task).parse(config.task_options)
        task.prepare(store)
        return task.load(store)
    except UserError as error:
        return str(error)


def _mixer(config: TrialConfig) -> MixerConfig:
    return resolve(config.model).parse(config.model_options)


def _check_gradients(config: TrialConfig, data: TaskData) -> None:
    """Two steps, finite; at the second every parameter has a gradient that is not all zero.

    The second, because what starts at zero may hold back the gradients of what comes before it.
    """
    torch.manual_seed(config.seed)
    model = build(data.spec, config.stack, _mixer(config)).to(config.device).train()
    optimizer = make_optimizer(model, config.training, config.learning_rate)
    batch = data.train.batch(np.arange(min(EXAMPLES, len(data.train)))).to(config.device)
    for _ in range(2):
        train_step(model, optimizer, batch, config.training.clip)
    silent = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    ]
    if silent:
        raise Failed(f"no gradient in {', '.join(silent)}")


def _check_causality(config: TrialConfig) -> None:
    """Change one step: what declares itself causal keeps every bit before it, others do not."""
    torch.manual_seed(0)
    mixer = _mixer(config)
    backbone = Backbone(config.stack, mixer).to(config.device).eval()
    x = torch.randn(1, LENGTH, config.stack.d_model, device=config.device)
    changed = x.clone()
    changed[:, LENGTH // 2] += 1.0
    with torch.no_grad():
        before, after = backbone(x), backbone(changed)
    same = torch.equal(before[:, : LENGTH // 2], after[:, : LENGTH // 2])
    if same != mixer.causal:
        seen = "does not see the future" if same else "sees the future"
        raise Failed(f"declares causal = {mixer.causal}, but {seen}")


def _check_parameters(cell: Cell) -> None:
    config = cell.grid[0]
    assert cell.baseline is not None
    parameters = backbone_parameters(_mixer(config), config.stack)
    if not is_matched(parameters, cell.baseline):
        off = 100 * (parameters / cell.baseline - 1)
        raise Failed(f"{parameters:,} in the backbone, {off:+.1f} % from the baseline's")
