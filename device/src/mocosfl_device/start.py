"""The command ``mocosfl-client``, begun so that it takes little memory."""

from __future__ import annotations

import ctypes
import os
import sys

_ARENAS = -8
"""Of glibc's malloc.h: how many pools of memory threads may have."""

_OPENSSL = ("ssl", "_hashlib")
"""Modules that load it. asyncio and hashlib do without, and gRPC brings TLS of its own: 7 MB less."""


def main() -> int:
    """Run the command line; returns the exit status."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # each thread would take memory, and the matrices are small
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_ARENAS, 1)  # what a thread has freed is then of use to the others
    absent = [name for name in _OPENSSL if name not in sys.modules]
    sys.modules |= dict.fromkeys(absent)  # type: ignore[arg-type]
    from mocosfl_device import cli

    for name in absent:
        del sys.modules[name]
    return cli.main()
