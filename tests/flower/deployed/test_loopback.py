"""A SuperLink and SuperNodes as processes on the loopback device."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from nodes import figures, losses, written

import mocosfl
from mocosfl.data.federation import export, federate
from tiny import digits

PATIENCE = 240


@pytest.mark.soak
def test_a_node_that_is_killed_does_not_end_the_run(flower: Callable[..., Any], tmp_path: Path) -> None:
    """Three SuperNodes with images of their own; one is killed while it computes the second chunk."""
    mocosfl.train(digits(**{"train.epochs": 0.02}), tmp_path / "half")
    changes = {"clients.number": 3, "clients.frozen": True, "clients.init": str(tmp_path / "half")}
    config = digits(**changes | {"train.epochs": 0.185})
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    parts = export(federate(config, lambda _: None), tmp_path / "parts")
    here = flower()
    nodes = [here.node(f'data="{part}" client={client}') for client, part in enumerate(parts)]
    run = tmp_path / "run"
    settings = {"recipe": str(tmp_path / "run.yaml"), "out": str(run), "steps": 10, "timeout": 90.0}
    command = here.begin(settings)
    deadline = time.monotonic() + PATIENCE
    while not any("loss" in line for line in written(run)):
        assert time.monotonic() < deadline, here.said
        time.sleep(0.1)
    nodes[2].kill()
    command.wait(PATIENCE)
    assert (run / "result.json").exists(), here.said
    assert json.loads((run / "result.json").read_text())["steps"] == 20
    told = figures(run)
    assert told["chunks"] == 2
    assert told["answers"] == 5
    assert told["failures"] == 1
    assert "client 2 has failed" in here.said
    mocosfl.train(config, tmp_path / "simulated")
    one, two = losses(run), losses(tmp_path / "simulated")
    assert [one[step] for step in range(1, 11)] == pytest.approx([two[step] for step in range(1, 11)], rel=2e-5)
    assert one[12] != two[12]
