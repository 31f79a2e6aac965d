"""Which functions and classes of the user may be run where settings name them.

Settings come with run folders and from servers, so that they name one is no reason to run it: somebody has to say so
here, on this machine.
"""

from __future__ import annotations

import os

from mocosfl.config import OBJECTIVES, Config
from mocosfl.errors import SettingError

VARIABLE = "MOCOSFL_TRUST_CODE"
"""Of the environment: what may be run, ``MODULE:FUNCTION`` or ``FILE.py:CLASS``, with commas between them."""

FUNCTION = "python:"
"""Beginning of ``model.backbone`` where that is a function of the user."""

_trusted: set[str] = set()


def trust_code(function: str) -> None:
    """Allow a function to be run wherever settings name it, from now on in this process.

    Args:
        function: ``MODULE:FUNCTION``, such as ``my_networks:small``, as ``model.backbone=python:my_networks:small`` has
            it; or ``FILE.py:CLASS``, as ``contrast.objective`` has it.
    """
    _trusted.add(function)


def handed_on() -> dict[str, str]:
    """What an environment needs in which a process may run what this one may; nothing, if that is nothing."""
    names = sorted(_trusted.union(filter(None, os.environ.get(VARIABLE, "").split(","))))
    return {VARIABLE: ",".join(names)} if names else {}


def check_settings(config: Config) -> None:
    """Raises ``SettingError`` if settings name code that may not be run."""
    backbone, objective = config.model.backbone, config.contrast.objective
    if backbone.startswith(FUNCTION):
        check_trusted(f"model.backbone={backbone}", backbone.removeprefix(FUNCTION))
    if objective not in OBJECTIVES:
        check_trusted(f"contrast.objective={objective}", objective)


def check_trusted(setting: str, function: str) -> None:
    """Raises ``SettingError`` unless a function that a setting names may be run."""
    if function not in _trusted.union(os.environ.get(VARIABLE, "").split(",")):
        raise SettingError(
            f"{setting}: this runs code of yours, which nobody has allowed here; if you know what it does, set "
            f"{VARIABLE}={function} in the environment, or call mocosfl.trust_code({function!r})"
        )
