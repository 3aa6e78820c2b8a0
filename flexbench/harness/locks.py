"""Locks that the kernel drops when their holder dies, however it dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from flexbench.cache import cache_directory
from flexbench.records import cannot_write


class Busy(Exception):
    """Another live process works on this trial."""


@contextmanager
def trial_lock(directory: Path, *, wait: bool) -> Iterator[None]:
    """Hold the trial in `directory`, so that two invocations never train it at once.

    Raises:
        Busy: it is held elsewhere and `wait` is False.
        CannotWrite: the lock file cannot be made.
    """
    path = directory / "trial.lock"
    lock = FileLock(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=wait, poll_interval=0.2)
    except Timeout:
        raise Busy(str(directory)) from None
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        yield
    finally:
        lock.release()


class Machine:
    """Says who computes on this machine: many trials at once, or one measurement of speed alone.

    Two files under the user's cache directory carry it. A measurement closes the gate, through
    which every trial passes on its way in, then waits until the trials inside have left. They leave
    for a moment whenever they call `pause`, so a measurement waits for a second, not for a trial.
    """

    def __init__(self, folder: Path | None = None) -> None:
        folder = folder or cache_directory()
        self._gate = folder / "machine.gate"
        self._room = folder / "machine.lock"
        self._held: int | None = None

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Compute beside others. Raises CannotWrite where the cache cannot be written."""
        self._enter()
        try:
            yield
        finally:
            self._leave()

    def pause(self) -> None:
        """Let a waiting measurement go first; returns at once where there is none."""
        self._leave()
        self._enter()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Compute alone. Raises CannotWrite where the cache cannot be written."""
        with _flock(self._gate, fcntl.LOCK_EX), _flock(self._room, fcntl.LOCK_EX):
            yield

    def _enter(self) -> None:
        with _flock(self._gate, fcntl.LOCK_SH):
            self._held = _open(self._room)
            fcntl.flock(self._held, fcntl.LOCK_SH)

    def _leave(self) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise cannot_write(path, error) from error


@contextmanager
def _flock(path: Path, kind: int) -> Iterator[None]:
    handle = _open(path)
    try:
        fcntl.flock(handle, kind)
        yield
    finally:
        os.close(handle)
