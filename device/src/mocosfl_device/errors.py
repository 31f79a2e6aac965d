"""Errors that are the user's to mend. The command line prints their message alone, without a traceback."""

from __future__ import annotations


class MocosflError(Exception):
    """Base of all errors below."""


class SettingError(MocosflError, ValueError):
    """A setting has a value that is not accepted; the message names setting, value and what is accepted."""


class DataError(MocosflError):
    """A source is missing, empty or damaged; the message names it."""


class RunError(MocosflError):
    """A run folder cannot be used, or a run had to stop; the message says what is safe and what to do."""
