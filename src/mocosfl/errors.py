"""Errors that are the user's to mend. The command line prints their message alone, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MocosflError(Exception):
    """Base of all errors below."""


class SettingError(MocosflError, ValueError):
    """A setting has a value that is not accepted; the message names setting, value and what is accepted."""


class DataError(MocosflError):
    """A source is missing, empty or damaged; the message names it."""


class RunError(MocosflError):
    """A run folder cannot be used, or a run had to stop; the message says what is safe and what to do."""


class ReportedElsewhere(RunError):
    """The first process of a run met an error, and reports it; the others only end."""


def nearest(word: str, known: Iterable[str]) -> str:
    """``did you mean X?`` for the known word most like ``word``; empty where none is."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else ""
