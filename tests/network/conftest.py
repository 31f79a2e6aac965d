"""What the tests of the network share."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from peers import Commands, Host, Loop, Member, Proxy

from mocosfl.data.federation import export, federate
from tiny import digits


@pytest.fixture
def start(tmp_path: Path, _own_cache: None) -> Iterator[Commands]:
    """Starts processes: ``start.serve(config)``, ``start.join(port, data)``."""
    commands = Commands(tmp_path)
    yield commands
    commands.stop()


@pytest.fixture
def loop() -> Iterator[Loop]:
    """A loop in a thread."""
    running = Loop()
    yield running
    running.stop()


@pytest.fixture
def host(loop: Loop) -> Iterator[Callable[..., Host]]:
    """Starts servers in this process: ``host({"clients.number": 5}, heartbeat=2)``."""
    hosts = []

    def make(*args: Any, **settings: Any) -> Host:
        hosts.append(Host(*args, **settings))
        return hosts[-1]

    yield make
    for one in hosts:
        one.stop()


@pytest.fixture
def member(loop: Loop) -> Callable[..., Member]:
    """Starts clients in this process: ``member(port, worker, client=2)``."""
    return lambda port, worker=None, **settings: Member(loop, port, worker, **settings)


@pytest.fixture
def proxy(loop: Loop) -> Iterator[Callable[[int], Proxy]]:
    """Stands between clients and a server: ``proxy(port)``."""
    proxies = []

    def make(port: int) -> Proxy:
        proxies.append(Proxy(loop, port))
        return proxies[-1]

    yield make
    for one in proxies:
        one.stop()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders with the images of a run's clients: ``data(config)``."""
    made: dict[str, Path] = {}

    def folder(**changes: object) -> Path:
        name = repr(sorted(changes.items()))
        if name not in made:
            made[name] = tmp_path_factory.mktemp("clients")
            export(federate(digits(**changes), lambda _: None), made[name])
        return made[name]

    return folder
