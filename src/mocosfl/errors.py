"""Errors that are the user's to mend. The command line prints their message alone, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from mocosfl_device.errors import DataError, MocosflError, RunError, SettingError

__all__ = ["DataError", "MocosflError", "ReportedElsewhere", "RunError", "SettingError", "nearest"]


class ReportedElsewhere(RunError):
    """The first process of a run met an error, and reports it; the others only end."""


def nearest(word: str, known: Iterable[str]) -> str:
    """``did you mean X?`` for the known word most like ``word``; empty where none is."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else ""
