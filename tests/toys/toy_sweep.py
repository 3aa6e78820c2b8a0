"""A sweep in a process of its own, for tests to kill: `toy_sweep.py RESULTS [KEY=VALUE ...]`."""

from __future__ import annotations

import sys
from pathlib import Path

from flexbench.harness import Done, Event, Progress, make_executor, plan, run
from flexbench.tasks.store import Store


def tell(event: Event) -> None:
    if isinstance(event, (Progress, Done)):
        print(type(event).__name__, event.trial.hash, flush=True)


if __name__ == "__main__":
    results, *overrides = sys.argv[1:]
    chosen = plan("toy", models=["toys:Mixer", "toys:Seer"], seeds=2, overrides=overrides)
    run(
        chosen,
        results=Path(results),
        store=Store(),
        executor=make_executor(2),
        observe=tell,
        measure_speed=False,
    )
