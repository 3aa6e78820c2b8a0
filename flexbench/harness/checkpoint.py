"""The state of a trial under way, on disk: enough to go on to the same bits."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from flexbench.records import write_atomic

SCHEMA = 2


class Unusable(Exception):
    """A checkpoint that is cut short, foreign or of another trial; the message says which."""


def save(path: Path, key: str, state: dict[str, Any]) -> None:
    """Replace the checkpoint at once. `state` holds tensors, numbers, text, lists and dicts only.

    Raises:
        CannotWrite: the directory is read-only or the disk full; the old checkpoint stays.
    """
    buffer = io.BytesIO()
    torch.save({"schema": SCHEMA, "key": key, "state": state}, buffer)
    write_atomic(path, buffer.getvalue())


def load(path: Path, key: str) -> dict[str, Any] | None:
    """What `save` wrote for `key`, or None where there is no file. Runs no code from it.

    Raises:
        Unusable: see there.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except Exception as error:
        raise Unusable("it cannot be read") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise Unusable("it is not a flexbench checkpoint")
    if found.get("key") != key or not isinstance(found.get("state"), dict):
        raise Unusable("it belongs to another trial")
    return found["state"]
