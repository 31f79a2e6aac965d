"""Bytes are counted where they cross the socket."""

import socket
import sys

import pytest
from peers import eventually

from mocosfl_device.sockets import bytes_of, connections, hold

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell")


SYN = 1
"""TCP counts the opening of a connection as a byte of who opens it, and its closing as one too."""


def pair() -> tuple[socket.socket, socket.socket, int]:
    """Both ends of a TCP connection, and the port that one was made to."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        ours = socket.create_connection(("127.0.0.1", port))
        return ours, listening.accept()[0], port


def exchange(ours: socket.socket, theirs: socket.socket, there: int, back: int) -> None:
    for sender, receiver, count in ((ours, theirs, there), (theirs, ours, back)):
        sender.sendall(b"x" * count)
        left = count
        while left:
            left -= len(receiver.recv(left))


def test_bytes_of_a_connection_are_those_that_it_carried() -> None:
    ours, theirs, port = pair()
    with ours, theirs:
        exchange(ours, theirs, 12_345, 678)
        eventually(lambda: connections(remote_port=port) == {("127.0.0.1", port): (12_345 + SYN, 678)})
        eventually(lambda: connections(local_port=port) == {ours.getsockname(): (678, 12_345)})
        exchange(ours, theirs, 55, 0)
        eventually(lambda: connections(remote_port=port) == {("127.0.0.1", port): (12_400 + SYN, 678)})
    assert connections(remote_port=port) == {}


def test_a_connection_that_is_held_is_counted_after_its_end() -> None:
    ours, theirs, port = pair()
    with theirs:
        with ours, ours.dup():
            held = hold(port)
            assert len(held) == 1  # held twice, counted once
            exchange(ours, theirs, 1000, 2000)
            ours.shutdown(socket.SHUT_RDWR)
        with held[0]:
            eventually(lambda: 1000 <= bytes_of(held)[0] <= 1000 + 2 * SYN)
            assert 2000 <= bytes_of(held)[1] <= 2000 + SYN
            assert connections(remote_port=port).keys() <= {("127.0.0.1", port)}


def test_nothing_but_connections_is_counted() -> None:
    """What listens, datagrams and local pairs have no peer elsewhere; looking at them leaves them open."""
    one, two = socket.socketpair()
    with one, two, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        before = set(connections())
        with socket.create_server(("127.0.0.1", 0)) as listening:
            datagrams.connect(listening.getsockname())
            assert set(connections()) == before
            with socket.create_connection(listening.getsockname()) as ours:
                assert set(connections()) - before == {ours.getpeername()}
        one.sendall(b"x")
        assert two.recv(1) == b"x"
