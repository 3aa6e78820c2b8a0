"""What there is to run, as text: `flexbench ls`."""

from __future__ import annotations

from tabulate import tabulate

from flexbench import ablations as declared
from flexbench.models.base import registry as model_registry
from flexbench.tasks.base import Task
from flexbench.tasks.base import registry as task_registry
from flexbench.tasks.base import suites as tasks_by_suite


def suites() -> str:
    """A line a suite: its tasks."""
    return _table([[name, ", ".join(tasks)] for name, tasks in tasks_by_suite().items()])


def tasks() -> str:
    """A line a task: what it is, how it is scored, where its data come from."""
    rows = []
    for suite, names in tasks_by_suite().items():
        for name in names:
            task = task_registry.get(name)
            rows.append(
                [
                    name,
                    suite,
                    _score(task),
                    task.summary,
                    _published(task),
                    "; ".join(filter(None, [_source(task), task.license])),
                ]
            )
    return _table(rows, ["task", "suite", "score", "what", "published (mamba)", "data"])


def models() -> str:
    """A line a model."""
    rows = []
    for name in model_registry:
        model = model_registry.get(name)
        rows.append([name, "causal" if model.causal else "sees the future", model.summary])
    return _table(rows)


def ablations() -> str:
    """A line an ablation: its question."""
    return _table([[name, declared.read(name)[1].question] for name in declared.names()])


def _score(task: type[Task]) -> str:
    """The customary metric, and what a guess scores; chance is of accuracy whatever the metric."""
    of = "chance" if task.metric == "accuracy" else "accuracy by chance"
    return f"{task.metric}, {of} {100 * task.parse({}).chance_level():.3g} %"


def _published(task: type[Task]) -> str:
    figure = task.published.get("mamba")
    return "–" if figure is None else f"{figure:.1f} %"


def _source(task: type[Task]) -> str:
    names = [source.name for resource in task.resources for source in resource.sources]
    names += ["a local copy" for resource in task.resources if resource.local]
    return " or ".join(dict.fromkeys(names))


def _table(rows: list[list[str]], titles: list[str] | None = None) -> str:
    text = tabulate(rows, titles or (), tablefmt="plain", disable_numparse=True)
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())
