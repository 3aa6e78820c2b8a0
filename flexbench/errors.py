"""Errors that a user can mend. The CLI prints them as one sentence and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right; the message is one sentence that says how."""


class DataUnavailable(UserError):
    """A data set is neither cached nor reachable; the message names the command that fetches it."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'listops'?"` for a near miss, else the known words, else nothing."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(known)}" if known else ""
