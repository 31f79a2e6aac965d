"""Clients that learn for a round, averaged by Flower's FedAvg."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

import torch
from flwr.app import Array, Message
from nodes import CALM, Nodes, digits, figures, losses, parts, run
from safetensors.torch import load_file

import mocosfl
from mocosfl.config import Config
from mocosfl.encoder import Encoder
from mocosfl.flower.records import LEARN
from mocosfl.flower.serving import serve
from mocosfl.flower.settings import FlowerSettings

pytestmark = pytest.mark.usefixtures("quick")


def half_of(run: Path) -> torch.Tensor:
    weights = load_file(run / "encoder.safetensors")
    return torch.cat([weights[name].flatten() for name in sorted(weights) if name.startswith("client.")])


def moved(run: Path, config: Config) -> torch.Tensor:
    """How far the client half is from where it began."""
    start = Encoder(config.model, 1, 8, config.seed).client.state_dict()
    return half_of(run) - torch.cat([start[name].flatten() for name in sorted(start)])


@pytest.mark.parametrize(
    "changes",
    [
        {"contrast.symmetric": False, "clients.lr_scale": "per_client_mean"},
        {"clients.number": 6, "clients.pool": 3, "clients.round": 4, "contrast.both_views": True},
    ],
    ids=["one-way", "pool"],
)
def test_rounds_of_one_step_are_mocosfl(changes: dict, tmp_path: Path) -> None:
    """Then no client learns against a server that is behind, and the numbers are those of the simulator."""
    config = digits(**CALM | {"sync.every": 1, "train.momentum": 0.0, "train.epochs": 0.06} | changes)
    run(config, Nodes(parts(config.clients.number)), tmp_path, mode="average")
    mocosfl.train(config, tmp_path / "simulated")
    one, two = losses(tmp_path / "run"), losses(tmp_path / "simulated")
    assert list(one.values()) == pytest.approx(list(two.values()), rel=2e-5)
    far = moved(tmp_path / "simulated", config)
    assert (half_of(tmp_path / "run") - half_of(tmp_path / "simulated")).norm() < 0.02 * far.norm()


def test_a_longer_round_moves_the_half_likewise(tmp_path: Path) -> None:
    """Against a server that is up to a round behind, in fewer messages, and in other numbers."""
    changes = CALM | {"sync.every": 7, "train.momentum": 0.0, "clients.lr": 0.01}
    config = digits(**changes)
    nodes = Nodes(parts(3))
    run(config, nodes, tmp_path, mode="average")
    assert len(nodes.asked(LEARN)) == 2 * 3
    mocosfl.train(config, tmp_path / "simulated")
    ours, theirs = moved(tmp_path / "run", config), moved(tmp_path / "simulated", config)
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.5
    assert figures(tmp_path / "run")["clients_loss"] > 0


def test_a_bad_half_is_not_averaged(tmp_path: Path) -> None:
    nodes = Nodes(parts(3))

    def blown_up(node: int, message: Message, reply: Message) -> Message:
        if node == 1001 and message.metadata.message_type == LEARN:
            record: Any = reply.content["arrays"]
            name = next(iter(record))
            record[name] = Array(record[name].numpy() + 1e4)
        return reply

    nodes.spoil = blown_up
    config = digits(**CALM | {"sync.every": 7})
    run(config, nodes, tmp_path, mode="average")
    told = figures(tmp_path / "run")
    assert told["failures"] == 2
    assert told["answers"] == 4
    assert moved(tmp_path / "run", config).abs().max() < 1


def test_a_resumed_run_goes_on_with_the_average(tmp_path: Path) -> None:
    config = digits(**CALM | {"sync.every": 7, "train.checkpoint_every": 7})

    class Stop(mocosfl.trainer.Callback):
        def after_step(self, trainer: Any, metrics: Any) -> None:
            trainer.stop = trainer.step == 7

    assert not run(config, Nodes(parts(3)), tmp_path, mode="average", callbacks=(Stop(),)).finished
    settings = FlowerSettings(mode="average", out=str(tmp_path / "run"), resume=True)
    assert serve(settings, Nodes(parts(3))).finished
    run(config, Nodes(parts(3)), tmp_path, "whole", mode="average")
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=2e-5)
    assert torch.allclose(half_of(tmp_path / "run"), half_of(tmp_path / "whole"), atol=1e-6)
