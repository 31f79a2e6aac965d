"""The dashboard of a served run, with clients in processes of their own."""

import json
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peers import Commands, eventually

from mocosfl.reporting.report import Reader
from tiny import digits

LONGER = {"model.width": 16, "clients.batch": 8, "train.epochs": 2, "train.log_every": 5}
"""108 steps: a few seconds."""


@pytest.mark.soak
def test_the_dashboard_shows_who_is_connected(start: Commands, data: Callable[..., Path], tmp_path: Path) -> None:
    """Also while the server waits; afterwards the report tells the bytes that were measured."""
    server = start.serve(digits(**LONGER), "--dashboard", 0)
    address = eventually(lambda: [line for line in server.said.splitlines() if line.startswith("dashboard: ")])[0]
    last: dict[str, Any] = {}

    def clients(count: int) -> bool:
        nonlocal last
        time.sleep(0.5)  # no browser asks more often
        with urllib.request.urlopen(address.removeprefix("dashboard: ") + "state.json", timeout=60) as answer:
            last = json.load(answer)
        table = last["parts"].get("clients", "").partition("</table>")[0]
        return table.count('<th scope="row">') == count

    own, folders = server.port(), data()
    eventually(lambda: clients(0))
    members = [start.join(own, folders / f"client-{number}") for number in (0, 1)]
    eventually(lambda: clients(2))
    assert "waiting for clients" in last["parts"]["head"]
    assert "127.0.0.1:" in last["parts"]["clients"]
    members.append(start.join(own, folders / "client-2"))
    eventually(lambda: clients(3) and "loss" in last["figures"])
    assert "wire-0" in last["figures"]
    eventually(lambda: clients(0) and last["ended"])
    server.ends_well()
    for member in members:
        member.ends_well()
    into, out = Reader(tmp_path / "run").read().measured
    assert into > out > 0
