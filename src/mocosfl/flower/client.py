"""What a node computes: a client's views, latents and steps, as the simulator does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from flwr.app import MetricRecord, RecordDict
from numpy.typing import NDArray

from mocosfl.config import Config
from mocosfl.data.federation import Federation, federate
from mocosfl.data.images import ImageSet
from mocosfl.errors import RunError, SettingError
from mocosfl.experiment import choose_device, networks, prepared
from mocosfl.flower.average import take_over
from mocosfl.flower.cohort import settings_of
from mocosfl.flower.records import coded, joined, natives, weights_of
from mocosfl.models.heads import WIDTHS
from mocosfl.network.claims import Holding
from mocosfl.network.welcome import client_settings
from mocosfl.network.worker import TorchWorker
from mocosfl.server import Server
from mocosfl_device.protocol_pb2 import Welcome
from mocosfl_device.wire import Coder, fingerprint

PIECE = 256
"""Images that are computed at a time."""

NodeConfig = Mapping[str, Any]
"""Of ``flower-supernode --node-config``: ``data``, ``client``, ``half``, ``device``, ``threads``; or Flower's own
``partition-id``."""


def tell(content: RecordDict, node: NodeConfig, say: Callable[[str], None]) -> RecordDict:
    """Say which client this is, how many images it has, and what their pixels add up to.

    Args:
        content: of the server's message.
        node: the node's own settings.
        say: told what is converted or left out.

    Raises:
        SettingError: the node's or the server's settings are not accepted.
        DataError: the images cannot be used.
    """
    config = settings_of(content)
    client = _number(node)
    _, holding = _worker(config, node, 0 if client is None else client, config.clients.batch, say)
    return joined(client, holding)


def latents(content: RecordDict, node: NodeConfig, say: Callable[[str], None]) -> RecordDict:
    """Latents of the images that a client draws next, from a frozen half.

    Args, raises: as for ``tell``.
    """
    config, ask = settings_of(content), _ask(content)
    client, first, count = (int(ask[name]) for name in ("client", "first", "images"))
    pieces = -(-count // PIECE)
    batch = -(-count // pieces)
    worker, _ = _worker(config, node, client, batch, say)
    with prepared(worker.device):
        handed = _handed(content, worker)
        wanted = node.get("half")
        if wanted is not None and (found := fingerprint(worker.description, handed)) != wanted:
            raise RunError(f"half={wanted}: the server hands out another, {found}; no image was looked at")
        worker.take(handed, restart=False)
        drawn = [worker.draw(0, first + piece * batch) for piece in range(pieces)]
    query, key = (np.concatenate(part, axis=1)[:, :count] for part in zip(*drawn, strict=True))
    return RecordDict({"latents": coded(_coder(config), query, key)})


def learn(content: RecordDict, node: NodeConfig, say: Callable[[str], None]) -> RecordDict:
    """Learn for a round against a copy of the server, and return the half with the latents on the way.

    Args, raises: as for ``tell``.
    """
    config, ask = settings_of(content), _ask(content)
    if "half" in node:
        raise RunError(f"half={node['half']}: the half of this run learns, so it is none that you can know")
    client, first = int(ask["client"]), int(ask["first"])
    record: Any = content["rates"]
    rates = [float(rate) for rate in record["rates"]]
    worker, _ = _worker(config, node, client, config.batch_of(client), say)
    with prepared(worker.device):
        worker.take(_handed(content, worker), restart=True)
        server = _copy_of_server(config, content, worker.device)
        keys = server.queue.keys.clone()
        worker.cohort.sampler.drawn[worker.cohort.pool] = first
        queries, pairs, losses = [], [], []
        for rate in rates:
            sent = worker.cohort.forward()
            own = int(sent.sizes.sum())
            # a client's gradient is its share of the mean over everybody's images
            gradients, metrics = server.step(replace(sent, shares=(config.step_images,)), 0.0)
            assert gradients is not None
            queries.append(sent.query.detach().cpu().numpy())
            pairs.append(sent.key.cpu().numpy())
            losses.append(float(metrics["loss"]) * config.step_images / own)
            worker.cohort.backward(gradients, rate)
            server.queue.keys.copy_(keys)  # one client's keys must not drive out those of all others
        halves = {name: t.cpu().numpy() for name, t in worker.cohort.halves().items() if t.is_floating_point()}
    query, key = (np.concatenate(part, axis=1) for part in (queries, pairs))
    metric = MetricRecord({"num-examples": query.shape[1], "loss": float(np.mean(losses))})
    return RecordDict({"arrays": natives(halves), "metrics": metric, "latents": coded(_coder(config), query, key)})


def _ask(content: RecordDict) -> Any:
    return content["ask"]


def _coder(config: Config) -> Coder:
    return Coder(config.traffic.latents, config.traffic.topk, config.traffic.zstd)


def _copy_of_server(config: Config, content: RecordDict, device: torch.device) -> Server:
    channels, size = config.data.channels, config.data.size
    assert size is not None  # the server fills it in
    encoder, head = networks(config, channels, size, fresh=False)
    own = config.updated({"train.compile": "off"})
    server = Server(encoder.server, head, own, WIDTHS[config.model.head], device)
    record: Any = content["server"]
    take_over(server, record)
    return server


def _handed(content: RecordDict, worker: TorchWorker) -> dict[str, NDArray]:
    """The weights that the server hands out."""
    record: Any = content["arrays"]
    return weights_of(record, worker.specification(frozenset(record)))


def _worker(
    config: Config, node: NodeConfig, client: int, batch: int, say: Callable[[str], None]
) -> tuple[TorchWorker, Holding]:
    """What computes for a client, and what its images are."""
    threads = node.get("threads", 1)
    if type(threads) is not int or threads < 1:
        raise SettingError(f"threads={threads!r} of --node-config: expected a whole number from 1")
    torch.set_num_threads(threads)
    worker = TorchWorker(_images(node, config, say), choose_device(str(node.get("device", "auto"))), say)
    assert config.data.size is not None  # the server fills it in
    told = client_settings(config, [], {}, config.data.channels, config.data.size, batch)
    welcome = Welcome(client=client, settings=json.dumps(told), frozen=config.clients.frozen)
    return worker, Holding(*worker.prepare(welcome))


def _number(node: NodeConfig) -> int | None:
    """The client's number; None where the server is to give it one."""
    number = node.get("client", node.get("partition-id"))
    if number is not None and type(number) is not int:
        raise SettingError(f"client={number!r} of --node-config: expected a whole number")
    return number


def _images(node: NodeConfig, config: Config, say: Callable[[str], None]) -> str | ImageSet:
    """The client's images: its own, or a part of those of the recipe."""
    if "data" in node:
        return str(node["data"])
    if "partition-id" not in node:
        raise SettingError(
            "this node has no images; start it with --node-config 'data=\"FOLDER\" client=NUMBER', or with "
            "partition-id=NUMBER for a part of data.source"
        )
    number = _number({"partition-id": node["partition-id"]})
    assert number is not None
    if not 0 <= number < config.clients.number:
        raise SettingError(f"partition-id={number}: the run has {config.clients.number} clients (clients.number)")
    parts = {name: getattr(config, name).model_dump() for name in ("data", "partition", "clients")}
    federation = _federation(Config(seed=config.seed, **parts).model_dump_json(), say)
    return ImageSet(federation.splits.train.gather(federation.partition.client(number)))


@lru_cache(maxsize=1)
def _federation(settings: str, say: Callable[[str], None]) -> Federation:
    """The images of all simulated clients: a process that stands for many of them decodes them once."""
    return federate(Config(**json.loads(settings)), say)
