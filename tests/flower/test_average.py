"""Clients that learn for a round, averaged by Flower's FedAvg."""

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr")

import torch
import torch.nn.functional as F
from flwr.app import Array, Message
from nodes import CALM, Nodes, figures, losses, parts, run, travelled
from safetensors.torch import load_file
from torch import nn

import mocosfl
from mocosfl.config import Config
from mocosfl.data.augment import normalise
from mocosfl.encoder import Encoder
from mocosfl.experiment import networks
from mocosfl.flower.client import _worker
from mocosfl.flower.records import LEARN
from mocosfl.flower.serving import serve
from mocosfl.flower.settings import FlowerSettings
from tiny import digits

sys.path.insert(0, str(Path(__file__).parents[1]))
from naive import Client

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


def test_a_round_is_plain_sgd_against_a_server_that_does_not_learn(tmp_path: Path) -> None:
    """What a client returns of several steps, beside modules and a loss written plainly."""
    config = digits(**{"sync.every": 3, "train.lr": 0.05, "contrast.momentum": 0.9, "model.server_norm": "batch"})
    config, nodes, kept = config.updated({"train.epochs": 0.055, "contrast.symmetric": False}), Nodes(parts(3)), []

    def keep(node: int, message: Message, reply: Message) -> Message:
        if node == 1001 and message.metadata.message_type == LEARN:
            kept.append((message.content, travelled(reply.content)))
        return reply

    nodes.spoil = keep
    run(config, nodes, tmp_path, mode="average")
    handed, returned = kept[1]  # the second round: BatchNorm has statistics
    arrays, state, answer = (
        {name: torch.from_numpy(array.numpy().copy()) for name, array in record.items()}
        for record in (handed["arrays"], handed["server"], returned["arrays"])
    )
    encoder, head = networks(config, 1, 8, fresh=True)
    online = nn.Sequential(encoder.server, head)
    copies = {"online": online, "momentum": copy.deepcopy(online)}
    own = Client(encoder.client, config)
    for kind, half in (("online", own.online), ("momentum", own.momentum)):
        copies[kind].load_state_dict(_of(state, kind))
        copies[kind].eval()
        half.load_state_dict(_of(arrays, kind))
    worker, _ = _worker(config, parts(3)[1], 1, config.clients.batch, lambda _: None)
    worker.cohort.sampler.drawn[1] = handed["ask"]["first"]
    losses = []
    for lr in handed["rates"]["rates"]:
        views = normalise(worker.cohort.views.draw(np.array([1])), arrays["mean"], arrays["std"])
        query, key = own.forward(views)
        query.requires_grad_()
        for m, o in zip(copies["momentum"].parameters(), copies["online"].parameters(), strict=True):
            m.data.mul_(0.9).add_(o.data, alpha=0.1)
        q = F.normalize(copies["online"](query[0]), dim=1)
        k = F.normalize(copies["momentum"](key[0]).detach(), dim=1)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ state["keys"][0].T], dim=1) / config.contrast.temperature
        per_image = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64), reduction="none")
        (per_image.sum() / config.step_images).backward()
        own.backward(query.grad, lr)
        losses.append(float(per_image.detach().mean()))
    assert len(losses) == 3
    assert returned["metrics"]["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    for kind, half in (("online", own.online), ("momentum", own.momentum)):
        for name, tensor in half.state_dict().items():
            assert torch.allclose(answer[f"{kind}.{name}"], tensor, atol=1e-5), name
    far = sum(float((answer[f"online.{n}"] - arrays[f"online.{n}"]).norm()) for n in own.online.state_dict())
    assert far > 1e-3


def _of(tensors: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    return {name.partition(".")[2]: t for name, t in tensors.items() if name.startswith(f"{kind}.")}


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
    assert told["failures"] == 3  # twice in the first round, once in the second
    assert told["answers"] == 4
    assert moved(tmp_path / "run", config).abs().max() < 1


def test_a_resumed_run_goes_on_with_the_average(tmp_path: Path) -> None:
    config = digits(**CALM | {"sync.every": 7, "train.checkpoint_every": 7})

    class Stop(mocosfl.trainer.Callback):
        def after_step(self, trainer: Any, metrics: Any) -> None:
            trainer.stop = trainer.step == 7

    assert not run(config, Nodes(parts(3)), tmp_path, mode="average", callbacks=(Stop(),)).finished
    settings = FlowerSettings(out=str(tmp_path / "run"), resume=True)  # the mode is the run's
    assert serve(settings, Nodes(parts(3))).finished
    run(config, Nodes(parts(3)), tmp_path, "whole", mode="average")
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=2e-5)
    assert torch.allclose(half_of(tmp_path / "run"), half_of(tmp_path / "whole"), atol=1e-6)


def test_rounds_are_counted_from_the_sync_points_of_a_pool(tmp_path: Path) -> None:
    """A pool stays 4 steps and clients average every 3, and the run goes on from within a round."""
    changes = {"sync.every": 3, "clients.number": 6, "clients.pool": 3, "clients.round": 4, "train.epochs": 0.07}

    class Stop(mocosfl.trainer.Callback):
        def after_step(self, trainer: Any, metrics: Any) -> None:
            trainer.stop = trainer.step == 5

    first, then = Nodes(parts(6)), Nodes(parts(6))
    config = digits(**CALM | changes)
    assert not run(config, first, tmp_path, mode="average", callbacks=(Stop(),)).finished
    assert serve(FlowerSettings(out=str(tmp_path / "run"), resume=True), then).finished

    def asked(nodes: Nodes) -> list[tuple[int, int, int]]:
        """Client, steps done before and steps, of each message."""
        asks: list[Any] = [m.content["ask"] for m in nodes.sent if m.metadata.message_type == LEARN]
        return [(ask["client"], ask["first"] // 4, ask["images"] // 4) for ask in asks]

    assert [steps for _, _, steps in asked(first)] == [3] * 3 + [1] * 3 + [3] * 3
    assert [steps for _, _, steps in asked(then)] == [2] * 3 + [1] * 3
    done = dict.fromkeys(range(6), 0)
    for place, (client, before, steps) in enumerate(asked(first) + asked(then)):
        assert before == done[client]
        done[client] += 1 if 6 <= place < 9 else steps  # of the round in which it stopped, one step was done
    assert sum(done.values()) == 3 * 8
