"""Bytes where they cross the socket, as the operating system counts them (Linux; elsewhere none are known)."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable, Iterator
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
        included, TCP's headers not; its opening and closing count as a byte each. Empty where the system does not
        tell.
    """
    found = {}
    for handle in _copies(local_port, remote_port):
        with handle, suppress(OSError):
            found[handle.getpeername()[:2]] = bytes_of([handle])
    return found


def hold(remote_port: int) -> list[socket.socket]:
    """Copies of this process's connections to a port. Theirs can be counted after the connection has ended; close them
    then."""
    return list(_copies(None, remote_port))


def bytes_of(handles: Iterable[socket.socket]) -> tuple[int, int]:
    """Bytes sent and received, as ``connections`` counts them, over some connections."""
    sent = received = 0
    for handle in handles:
        with suppress(OSError, struct.error):
            info = handle.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, 256)
            sent, received = sent + _at(info, _ACKED), received + _at(info, _RECEIVED)
    return sent, received


def _at(info: bytes, offset: int) -> int:
    return struct.unpack_from("=Q", info, offset)[0]


def _copies(local_port: int | None, remote_port: int | None) -> Iterator[socket.socket]:
    """Copies of this process's TCP connections, one of each: gRPC holds some twice."""
    folder = Path("/proc/self/fd")
    names = os.listdir(folder) if folder.is_dir() else []
    seen = set()
    for name in names:
        with suppress(OSError):
            target = os.readlink(folder / name)
            if target.startswith("socket:") and target not in seen:
                seen.add(target)
                handle = socket.socket(fileno=os.dup(int(name)))
                if _is_connection(handle, local_port, remote_port):
                    yield handle
                else:
                    handle.close()


def _is_connection(handle: socket.socket, local_port: int | None, remote_port: int | None) -> bool:
    if handle.family not in (socket.AF_INET, socket.AF_INET6) or handle.type != socket.SOCK_STREAM:
        return False
    try:
        own, peer = handle.getsockname()[1], handle.getpeername()[1]
    except OSError:  # it only listens
        return False
    return local_port in (None, own) and remote_port in (None, peer)
