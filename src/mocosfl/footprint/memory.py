"""Peak memory of tensors, of the very classes that a run is made of, on the meta device: no memory is taken.

The interpreter, PyTorch itself (more than 200 MB) and the working memory inside kernels are not counted.
"""

from __future__ import annotations

import contextlib
import json
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mocosfl.baselines import held_by_clients
from mocosfl.clients import FrozenCohort, Latents, LocalCohort
from mocosfl.config import CacheSettings, Config, TrafficSettings
from mocosfl.data.images import ImageSet
from mocosfl.data.partition import Partition
from mocosfl.data.sampler import ClientSampler
from mocosfl.errors import RunError
from mocosfl.footprint import arithmetic
from mocosfl.footprint.plan import Plan
from mocosfl.latent_cache import LatentStore
from mocosfl.models import build, build_head
from mocosfl.models.description import described
from mocosfl.models.heads import WIDTHS
from mocosfl.network.welcome import client_settings
from mocosfl.server import Server
from mocosfl_device.protocol_pb2 import Welcome
from mocosfl_device.worker import NumpyWorker

META = torch.device("meta")


class PeakMemory(TorchDispatchMode):
    """Adds up the storages that are alive.

    Args:
        kept: tensors that are there already.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self, kept: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._add(kept)

    def _add(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = id(storage), storage.nbytes()
            if key not in self._alive:  # else it is a view, or was written in place
                self._alive[key] = weakref.ref(storage)
                weakref.finalize(storage, self._remove, key, size)
                self.now += size
                self.peak = max(self.peak, self.now)

    def _remove(self, key: int, size: int) -> None:
        self.now -= size
        del self._alive[key]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and take note of what it has made."""
        made = func(*args, **(kwargs or {}))
        self._add(leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor))
        return made


class _Rounded(TorchFunctionMode):
    """bfloat16 autocast for the meta device, which PyTorch has none for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.conv2d, F.conv_transpose2d, F.linear):
            args = [arg.to(torch.bfloat16) if isinstance(arg, Tensor) else arg for arg in args]
        return func(*args, **(kwargs or {}))


def of_client(plan: Plan, rich: bool = False) -> int:
    """Peak bytes of the tensors of a client with PyTorch: views, both halves, gradients, SGD momentum.

    Of one that holds the whole network: online and target network in place of the halves, and its own queue.

    Args:
        plan: the run.
        rich: of a rich client.
    """
    return _peak(plan.config, *client_step(plan, rich, META))


def of_server(plan: Plan) -> int:
    """Peak bytes of the tensors of the server's step: latents, both halves, gradients, SGD momentum, queue.

    Latents that it keeps to use them again are not among them: ``of_kept_latents``.
    """
    return _peak(plan.config, *server_step(plan, META))


def of_kept_latents(plan: Plan) -> int:
    """Bytes of the latents that the server keeps (``cache.views``, ``traffic.loss_threshold``)."""
    config = plan.config
    if not config.recalls:
        return 0
    views = config.cache.views or 2
    model = build(config.model, config.data.channels, plan.size, config.seed)
    store = LatentStore(views, model.latent_shape, config.clients.number, config.traffic.latents, META)
    return plan.images * store.bytes_of_image


def client_step(plan: Plan, rich: bool, device: torch.device) -> tuple[Callable[[], None], list[Tensor]]:
    """What a client computes in a step, and the tensors that it keeps between two."""
    config = _alone(plan, rich)
    if device == META:
        config = _in_full(config)
    channels = config.data.channels
    model = build(config.model, channels, plan.size, config.seed)
    images = ImageSet(np.zeros((1, channels, plan.size, plan.size), np.uint8))
    sampler = ClientSampler(Partition(np.zeros(config.clients.batch, np.int64), np.array([0, config.clients.batch])), 0)
    facts = (config, images, sampler, torch.zeros(channels), torch.ones(channels), device)
    if config.clients.frozen:
        frozen = FrozenCohort(model.client, *facts)
        return (lambda: _discard(frozen.forward())), _state(frozen.half)
    head = build_head(config.model.head, model.features, config.seed)
    own, others = held_by_clients(config, model.client, model.server, head)
    cohort = LocalCohort(own, *facts)
    halves = [side.weights | side.statistics for side in (cohort.online, cohort.momentum)]
    kept = [tensor for stack in (*halves, cohort.velocity) for tensor in stack.values()]

    def step() -> None:
        query = cohort.forward().query  # the keys are sent, and gone
        cohort.backward(torch.zeros_like(query), 0.1)

    if config.clients.holds == "half":
        return step, kept
    loss = Server(*others, config, WIDTHS[config.model.head], device)

    def whole_step() -> None:
        gradients, _ = loss.step(cohort.forward(), 0.1)
        assert gradients is not None
        cohort.backward(gradients, 0.1)

    return whole_step, [*kept, *_state(loss.queue)]


def server_step(plan: Plan, device: torch.device) -> tuple[Callable[[], None], list[Tensor]]:
    """What the server computes in a step, and the tensors that it keeps between two, SGD momentum apart."""
    config = plan.config.updated({"train.compile": "off"})
    if device == META:
        config = _in_full(config)
    model = build(config.model, config.data.channels, plan.size, config.seed)
    head = build_head(config.model.head, model.features, config.seed)
    server = Server(model.server, head, config, WIDTHS[config.model.head], device)
    ways, count = 2 if config.contrast.both_views else 1, config.step_images
    clients = np.arange(config.pool)

    def step() -> None:
        query, key = (torch.zeros(ways, count, *model.latent_shape, device=device) for _ in range(2))
        learning = not config.clients.frozen
        server.step(Latents(query, key, clients, config.batches, 0 * clients, (count,), learning), 0.1)

    return step, [tensor for part in (server.online, server.momentum, server.queue) for tensor in _state(part)]


def of_client_in_numpy(plan: Plan, rich: bool = False, most: float = 1e10) -> int | None:
    """Peak bytes of the arrays of a client without PyTorch: as ``mocosfl-client`` measures them, of a step made here.

    Args:
        plan: the run.
        rich: of a rich client.
        most: multiply-adds that are worth the time.

    Returns:
        None if such a client cannot take part, or a step takes more than ``most``.
    """
    config, channels, batch = plan.config, plan.config.data.channels, plan.batch(rich)
    if batch * sum(arithmetic.of_client(plan).values()) > most:
        return None
    half = build(config.model, channels, plan.size, config.seed).client
    told = client_settings(config, described(half), half.state_dict(), channels, plan.size, batch)
    worker = NumpyWorker(_Blank(batch, plan.size), False, False, lambda _: None)
    try:
        worker.prepare(Welcome(client=0, settings=json.dumps(told), frozen=config.clients.frozen))
    except RunError:
        return None
    parts = ("online",) if config.clients.frozen else ("online", "momentum")
    weights = {f"{part}.{name}": t.numpy() for part in parts for name, t in half.state_dict().items()}
    worker.take(weights | {name: np.ones(channels, np.float32) for name in ("mean", "std")}, True)
    query, _ = worker.draw(1, 0)
    if not config.clients.frozen:  # SGD's momentum is there from the first step on
        worker.learn(1, np.zeros_like(query), 0.0)
    return worker.measure()


class _Blank:
    """Images of a client that there is not, all black."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.pixels = count, np.zeros((size, size), np.uint8)

    def __len__(self) -> int:
        return self.count

    def look(self) -> None:
        """There is nothing to see."""

    def encoded(self, number: int) -> NDArray[np.uint8]:
        """See ``mocosfl_device.images.Source``."""
        return self.pixels

    def name(self, number: int) -> str:
        """See ``mocosfl_device.images.Source``."""
        return f"image {number}"

    def drop(self, number: int) -> None:
        """Never called: all can be decoded."""


def _peak(config: Config, step: Callable[[], None], kept: Iterable[Tensor]) -> int:
    """Peak of the second of two steps: the first makes what is kept from then on."""
    half: AbstractContextManager = _Rounded() if config.train.precision == "bf16" else contextlib.nullcontext()
    with half, PeakMemory(kept) as memory:
        step()
        step()
    return memory.peak


def _alone(plan: Plan, rich: bool) -> Config:
    """The configuration of a cohort of one client."""
    rings = 1 if plan.config.contrast.feature_sharing else plan.config.clients.number
    return plan.config.updated(
        {
            "clients.number": 1,
            "clients.pool": None,
            "clients.batch": plan.batch(rich),
            "clients.rich_share": 0,
            "clients.rich_batch_factor": 1,
            "pretrain.spare_client": 0,
            "sync.every": 0,
            "sync.own": "none",
            "contrast.queue": plan.config.contrast.queue // rings,
            "train.compile": "off",
            "traffic": TrafficSettings().model_dump(),
            "cache": CacheSettings().model_dump(),
            "defence.kind": "none",
        }
    )


def _in_full(config: Config) -> Config:
    """The same without autocast, for which ``_Rounded`` stands in."""
    return config.updated({"train.precision": "fp32"})


def _state(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def _discard(*values: Any) -> None:
    """Nothing; what is handed over lives until here."""
