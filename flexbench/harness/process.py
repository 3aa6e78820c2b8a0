"""A function in a process of its own, which dies with the one that started it."""

from __future__ import annotations

import multiprocessing
import os
import pkgutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

from flexbench import models, tasks
from flexbench.errors import UserError
from flexbench.harness.allocator import keep_freed_memory
from flexbench.harness.events import Event
from flexbench.harness.locks import Busy

GRACE_SECONDS = 15.0
"""How long an interrupted process may take to leave its checkpoint."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    # Imported once for all trials. An optimiser's first step would import torch._dynamo: seconds.
    ["flexbench.harness.trial", "torch._dynamo"]
    + [
        module.name
        for package in (models, tasks)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ]
)


@dataclass(frozen=True)
class Returned:
    value: Any


@dataclass(frozen=True)
class Raised:
    """An exception left the function: itself if it is one of ours, and its traceback's text."""

    error: UserError | Busy | None
    text: str


@dataclass(frozen=True)
class Died:
    """The process ended without a word, for the reason given."""

    reason: str


class Process:
    """Runs `function(*arguments, observe)`; all three picklable, forked from a warm server.

    `read` gives what it sends: events, then one Returned, Raised or Died.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.inbox, outbox = _context.Pipe(duplex=False)
        self._process = _context.Process(target=_serve, args=(outbox, function, arguments))
        self._process.start()
        outbox.close()

    def read(self) -> Event | Returned | Raised | Died:
        """The next message; waits for it."""
        try:
            message = self.inbox.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            message = Died(_epitaph(self._process.exitcode or 0))
        if isinstance(message, (Returned, Raised)):
            self._process.join()
        return message

    def terminate(self) -> None:
        self._process.terminate()

    def reap(self, seconds: float) -> None:
        """Wait for the end, at most so long; then kill."""
        try:
            self._process.join(max(0.0, seconds))
        finally:
            self._process.kill()
            self._process.join()
            self.inbox.close()


def ready(processes: Iterable[Process]) -> list[Process]:
    """Those of the processes that have something to read; waits for the first."""
    inboxes = {process.inbox: process for process in processes}
    return [inboxes[inbox] for inbox in connection.wait(list(inboxes))]  # type: ignore[index]


def stop(processes: Iterable[Process]) -> None:
    """Interrupt all, give them `GRACE_SECONDS` together to leave checkpoints, kill the rest."""
    processes = list(processes)
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        process.reap(deadline - time.monotonic())


def _epitaph(code: int) -> str:
    if code >= 0:
        return f"the process ended with exit code {code}"
    if -code == signal.SIGKILL:
        return "the process was killed (SIGKILL), most often for want of memory"
    return f"the process was killed by {signal.Signals(-code).name}"


def _serve(outbox: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        message: Returned | Raised = Returned(function(*arguments, outbox.send))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGTERM)
    except Exception as error:
        ours = error if isinstance(error, (UserError, Busy)) else None
        message = Raised(ours, traceback.format_exc())
    outbox.send(message)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)
