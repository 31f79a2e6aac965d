"""Bytes where they cross the socket, as the operating system counts them (Linux; elsewhere none are known)."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_TCP_INFO = 11
_ACKED, _RECEIVED = 120, 128  # of struct tcp_info (linux/tcp.h, since 4.1): tcpi_bytes_acked, tcpi_bytes_received


Peer = tuple[str, int]
"""Address and port."""


def connections(local_port: int | None = None, remote_port: int | None = None) -> dict[Peer, tuple[int, int]]:
    """Bytes that this process's TCP connections have carried.

    Args:
        local_port: only connections at this port of ours.
        remote_port: only connections to this port.

    Returns:
        By the peer's address and port: bytes sent (that the peer has acknowledged) and received, TLS and HTTP/2
        included, TCP's headers not. Empty where the system does not tell.
    """
    found = {}
    for handle in _sockets():
        with handle, suppress(OSError, struct.error):
            peer, own = handle.getpeername()[:2], handle.getsockname()[:2]
            if local_port in (None, own[1]) and remote_port in (None, peer[1]):
                info = handle.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, 256)
                found[peer] = (_at(info, _ACKED), _at(info, _RECEIVED))
    return found


def bytes_of_connections(local_port: int | None = None, remote_port: int | None = None) -> tuple[int, int]:
    """Sums over ``connections``: bytes sent and received."""
    counts = connections(local_port, remote_port).values()
    return sum(sent for sent, _ in counts), sum(received for _, received in counts)


def _at(info: bytes, offset: int) -> int:
    return struct.unpack_from("=Q", info, offset)[0]


def _sockets() -> Iterator[socket.socket]:
    """Copies of this process's TCP sockets."""
    folder = Path("/proc/self/fd")
    names = os.listdir(folder) if folder.is_dir() else []
    for name in names:
        with suppress(OSError):
            if os.readlink(folder / name).startswith("socket:"):
                handle = socket.socket(fileno=os.dup(int(name)))
                if handle.family in (socket.AF_INET, socket.AF_INET6) and handle.type == socket.SOCK_STREAM:
                    yield handle
                else:
                    handle.close()
