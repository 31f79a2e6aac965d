"""Bytes, beside the counters of real clients and a real server on the loopback device."""

import asyncio
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mocosfl.config import Config
from mocosfl.data.federation import export, federate
from mocosfl.distributed import World
from mocosfl.footprint import traffic
from mocosfl.footprint.plan import Plan
from mocosfl.footprint.traffic import DOWN, UP, way
from mocosfl.latent_cache import RecallingCohort
from mocosfl.models import build, build_head
from mocosfl.models.heads import WIDTHS
from mocosfl.network.cohort import RemoteCohort
from mocosfl.network.settings import ServeSettings
from mocosfl.network.worker import TorchWorker
from mocosfl.server import Server
from mocosfl.trainer import Callback, Trainer
from mocosfl_device import client as device_client
from mocosfl_device.client import Client
from mocosfl_device.settings import JoinSettings

TINY = {
    "data.source": "digits",
    "data.size": 8,
    "data.channels": 1,
    "data.held_out": 0.1,
    "partition.kind": "iid",
    "model.width": 4,
    "model.head": "v1",
    "contrast.queue": 64,
    "clients.number": 2,
    "clients.batch": 4,
    "sync.every": 5,
    "train.epochs": 0.085,
    "train.checkpoint_every": 7,
}
"""14 steps of 2 clients; averages after 5, 10 and 14, checkpoints after 7 and 14."""

RUNS = {
    "learning": {},
    "one half averaged": {"sync.momentum": False, "contrast.symmetric": False},
    "frozen": {"clients.frozen": True, "model.bottleneck": "C4S2"},
    "codecs": {"traffic.latents": "int4", "traffic.gradients": "topk", "model.cut": 3},
    "pools": {"clients.number": 4, "clients.pool": 2, "clients.round": 3, "sync.every": 2, "sync.momentum": False},
    "rich, both views": {
        "clients.rich_share": 0.5,
        "clients.rich_batch_factor": 2,
        "contrast.both_views": True,
        "sync.every": 0,
        "train.checkpoint_every": 3,
    },
    "cache": {"clients.frozen": True, "cache.views": 2, "cache.refresh": 0.4, "train.epochs": 2, "clients.batch": 50},
}


class Checkpoints(Callback):
    def after_step(self, trainer: Trainer, metrics: dict[str, Tensor]) -> None:
        if trainer.step % trainer.config.train.checkpoint_every == 0:
            trainer.cohort.state_dict()


def ran(config: Config, plan: Plan, folder: Path) -> tuple[Counter[str], list[Client]]:
    """A whole run with real clients in threads of this process: the server's counts, and the clients."""
    federation = federate(config, lambda _: None)
    assert federation.epoch_images == plan.images
    folders = export(federation, folder)
    model = build(config.model, 1, 8, config.seed)
    head = build_head(config.model.head, model.features, config.seed)
    device, listen = torch.device("cpu"), ServeSettings(listen="127.0.0.1:0", heartbeat=60)
    cohort = RemoteCohort(model.client, config, listen, model.latent_shape, 1, 8, device, lambda *_, **__: None)
    cohort.start()
    clients = [
        Client(
            JoinSettings(server=f"127.0.0.1:{cohort.exchange.service.port}", client=number),
            TorchWorker(str(path), device, lambda _: None),
            lambda _: None,
        )
        for number, path in enumerate(folders)
    ]

    async def take_part() -> None:
        await asyncio.gather(*(client.take_part() for client in clients))

    thread = threading.Thread(target=asyncio.run, args=[take_part()])
    thread.start()
    try:
        cohort.gather(len(clients))
        cohort.begin(np.zeros(1), np.ones(1))
        server = Server(model.server, head, config, WIDTHS[config.model.head], device)
        steps = cohort
        if config.recalls:
            steps = RecallingCohort(cohort, config, cohort.images, model.latent_shape, device)
        trainer = Trainer(config, steps, server, federation.epoch_images, [Checkpoints()], World())
        cohort.follow(plan.asked, plan.round_steps if plan.sampled else None, lambda: False)
        assert (trainer.steps, trainer.round_steps) == (plan.steps, plan.round_steps)
        trainer.run()
    finally:
        cohort.stop(True)
        thread.join(60)
    assert not thread.is_alive()
    return cohort.exchange.counts, clients


@pytest.mark.parametrize("name", RUNS)
def test_bytes_are_those_of_a_real_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: Counter[str] = Counter()
    count_messages(messages, monkeypatch)
    config = Config().updated(TINY | RUNS[name])
    plan = Plan.of(config)
    counts, clients = ran(config, plan, tmp_path)
    kinds = [traffic.of_client(plan, rich) for rich in ([False, True] if config.rich else [False])]
    sizes = [plan.number(rich) for rich in (False, True)][: len(kinds)]
    up, down = (sum(n * way(kind.run, way_) for n, kind in zip(sizes, kinds, strict=True)) for way_ in (UP, DOWN))
    assert counts["tensor_bytes_in"] == sum(c.traffic.tensors_sent for c in clients) == pytest.approx(up, abs=1e-6)
    assert counts["tensor_bytes_out"] == sum(c.traffic.tensors_received for c in clients)
    assert counts["tensor_bytes_out"] == pytest.approx(down, abs=1e-6)
    if not plan.sampled and not config.rich:  # every single client too
        for client in clients:
            assert client.traffic.tensors_sent == way(kinds[0].run, UP)
            assert client.traffic.tensors_received == way(kinds[0].run, DOWN)
    assert counts["latents"] == sum(n * plan.client_steps(rich) for rich, n in zip((False, True), sizes, strict=False))
    for place, direction in enumerate(("up", "down")):
        whole = sum(n * kind.messages[place] for n, kind in zip(sizes, kinds, strict=True))
        assert messages[direction] == pytest.approx(whole, rel=2e-3)


def test_the_estimate_of_the_socket_is_near_a_real_one(tmp_path: Path) -> None:
    changes = {"clients.number": 1, "clients.batch": 100, "train.epochs": 3, "train.checkpoint_every": 100}
    plan = Plan.of(Config().updated(TINY | changes))
    _, [client] = ran(plan.config, plan, tmp_path)
    if not client.traffic.sent:
        pytest.skip("this system does not count a socket's bytes")
    found = traffic.of_client(plan)
    assert found.socket[0] == pytest.approx(client.traffic.sent, rel=0.01)
    assert found.socket[1] == pytest.approx(client.traffic.received, rel=0.01)


def count_messages(into: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the bytes of latents, weights and orders, as they are written and read, with gRPC's frame."""
    write, read = device_client._Talk._write, device_client.from_server

    async def counted_write(self: object, message: object) -> None:
        if message.WhichOneof("kind") in ("latents", "weights"):
            into["up"] += len(message.SerializeToString()) + 5
        await write(self, message)

    def counted_read(raw: bytes) -> object:
        message = read(raw)
        if message.WhichOneof("kind") == "order":
            into["down"] += len(raw) + 5
        return message

    monkeypatch.setattr(device_client._Talk, "_write", counted_write)
    monkeypatch.setattr(device_client, "from_server", counted_read)


def test_steps_and_averages_make_up_the_run() -> None:
    plan = Plan.of(Config().updated(TINY))
    found = traffic.of_client(plan)
    assert (plan.steps, plan.averages, plan.collections) == (14, 3, 4)
    assert way(found.run, UP) == 14 * way(found.step, UP) + 4 * way(found.average, UP)
    assert way(found.run, DOWN) == 14 * way(found.step, DOWN) + 3 * way(found.average, DOWN)
    assert found.step["query latents"] == 4 * 4 * 4 * 8 * 8


def test_a_codec_makes_the_latents_smaller() -> None:
    changes = {"traffic.latents": "int8", "traffic.gradients": "bf16"}
    full, small = (traffic.of_client(Plan.of(Config().updated(TINY | more))) for more in ({}, changes))
    assert full.step["query latents"] / small.step["query latents"] == pytest.approx(4, rel=0.07)
    assert full.step["gradients"] == 2 * small.step["gradients"]
    assert full.average == small.average
