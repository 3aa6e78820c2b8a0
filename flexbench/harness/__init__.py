"""Trains trials, once each, so that their numbers can be compared.

Use it as the CLI does::

    chosen = plan("lra", models=["mamba", "bimamba"], preset="quick")
    executor = make_executor(device=chosen.device)
    result = run(chosen, results=Path("results"), store=Store(), executor=executor, observe=print)
"""

from flexbench.harness.ablation import AblationPlan, Variant, plan_ablation, run_ablation
from flexbench.harness.events import Done, Event, Notice, Observer, Progress, Stage, Step, label
from flexbench.harness.executor import Executor, make_executor
from flexbench.harness.sweep import Cell, CellResult, Plan, SweepResult, plan, run

__all__ = [
    "AblationPlan",
    "Cell",
    "CellResult",
    "Done",
    "Event",
    "Executor",
    "Notice",
    "Observer",
    "Plan",
    "Progress",
    "Stage",
    "Step",
    "SweepResult",
    "Variant",
    "label",
    "make_executor",
    "plan",
    "plan_ablation",
    "run",
    "run_ablation",
]
