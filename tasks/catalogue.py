"""What `flexbench data` does: fetch and verify the data of tasks."""

from __future__ import annotations

from collections.abc import Iterable

from flexbench.errors import UserError
from flexbench.tasks.base import Task
from flexbench.tasks.store import Status, Store


def fetch(tasks: Iterable[Task], store: Store, force: bool = False) -> list[UserError]:
    """Fetch or generate the data of each task; those that fail do not stop the others.

    Args:
        tasks: instances, since their options decide what is prepared.
        store: where to.
        force: again, even if it is there.

    Returns:
        One error for each task that has no data now, its message ready to print.
    """
    if force:
        store = Store(store.cache, store.data_dir, store.offline, force=True)
    problems = []
    for task in tasks:
        try:
            task.prepare(store)
        except UserError as error:
            problems.append(error)
    return problems


def verify(tasks: Iterable[type[Task]], store: Store) -> list[Status]:
    """Hash every raw archive and every prepared array of the tasks again: a row for each."""
    rows: list[Status] = []
    seen: set[str] = set()
    for task in tasks:
        for resource in task.resources:
            if resource.name not in seen and not resource.local:
                seen.add(resource.name)
                rows += store.downloads(resource)
        rows += store.prepared(task.name)
    return rows
