"""Flower's simulation runtime."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")
pytest.importorskip("ray")

from nodes import figures, losses

import mocosfl
from tiny import digits


@pytest.mark.soak
def test_a_hundred_virtual_clients(flower: Callable[..., Any], tmp_path: Path) -> None:
    mocosfl.train(digits(**{"train.epochs": 0.02}), tmp_path / "half")
    changes = {"clients.number": 100, "clients.batch": 1, "clients.frozen": True, "train.epochs": 0.8}
    config = digits(**changes | {"clients.init": str(tmp_path / "half")})
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    said = flower(simulated=True).run(
        {"recipe": str(tmp_path / "run.yaml"), "out": str(tmp_path / "run")},
        *("--federation-config", "num-supernodes=100 client-resources-num-cpus=1 init-args-num-cpus=2"),
        seconds=240,
    )
    assert (tmp_path / "run/result.json").exists(), said
    told = figures(tmp_path / "run")
    assert told["clients"] == told["answers"] == 100
    assert told["failures"] == 0
    mocosfl.train(config, tmp_path / "simulated")
    one, two = losses(tmp_path / "run"), losses(tmp_path / "simulated")
    assert one.keys() == two.keys()
    assert list(one.values()) == pytest.approx(list(two.values()), rel=2e-5)
