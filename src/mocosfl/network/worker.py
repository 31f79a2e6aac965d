"""What a client computes with PyTorch: the simulator's cohort, with one client in it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mocosfl.clients import FrozenCohort, LocalCohort
from mocosfl.config import Config
from mocosfl.data.images import ImageSet, channel_sums
from mocosfl.data.partition import Partition
from mocosfl.data.sampler import ClientSampler
from mocosfl.data.sources import count_images, load_unlabelled
from mocosfl.distributed import World
from mocosfl.errors import RunError
from mocosfl.models import build
from mocosfl.models.description import described, shown
from mocosfl.privacy.defences import defence_of
from mocosfl_device.protocol_pb2 import Welcome
from mocosfl_device.wire import weights_of


class TorchWorker:
    """Computes a client's latents and steps.

    Args:
        source: the client's images, as data.source, or decoded.
        device: where to compute.
        say: told what is converted or left out.

    Raises:
        DataError, SettingError: there are no images.
    """

    capabilities: tuple[str, ...] = ("learn", "forward")

    def __init__(self, source: str | ImageSet, device: torch.device, say: Callable[[str], None]) -> None:
        self.source, self.device, self.say = source, device, say
        self.images = len(source) if isinstance(source, ImageSet) else count_images(source, say)
        self.description: Mapping[str, Any] = {}
        self._key: tuple[int, str] | None = None
        self._codec: dict[str, Any] = {}

    def prepare(self, welcome: Welcome) -> tuple[int, list[int], list[int]]:
        """Decode the images and build the half; see ``client.Worker``.

        Raises:
            RunError: the server's settings are not understood.
            DataError: the images cannot be used.
        """
        self.config = self._settings(welcome)
        key = (welcome.client, self.config.to_yaml())
        if key != self._key:
            decoded = self.source if isinstance(self.source, ImageSet) else None
            self.pixels = load_unlabelled(self.config.data, self.say) if decoded is None else decoded
            self.sums = channel_sums(self.pixels, np.arange(len(self.pixels)))
            self.pixels.to(self.device)
            self._key = key
        self._build(welcome.client)
        return len(self.pixels), *self.sums

    def _settings(self, welcome: Welcome) -> Config:
        """The server's settings, for a cohort whose last client is this one."""
        try:
            told: dict[str, Any] = json.loads(welcome.settings)
            if isinstance(self.source, str):
                told["data"] |= {"source": self.source}
            told["clients"] |= {"number": welcome.client + 1, "pool": 1, "frozen": welcome.frozen}
            told["sync"] |= {"every": 0}
            self._codec = {name: told["traffic"][name] for name in ("latents", "topk")}
            told["traffic"] = {}  # whoever sends the latents encodes them
            for name in ("half", "recalls", "images"):
                told.pop(name, None)
            return Config(**told)
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"the server's settings are not understood: {error}") from error

    def _build(self, client: int) -> None:
        config, images = self.config, self.pixels
        size, channels = images.shape[-1], images.shape[0]
        model = build(config.model, channels, size, config.seed)
        agreed = config.updated({f"traffic.{name}": value for name, value in self._codec.items()})
        self.description = shown(described(model.client), agreed, channels, size)
        held = Partition(np.arange(len(images)), np.append(np.zeros(client + 1, np.int64), len(images)))
        defence = defence_of(config, model.latent_shape, images.shape, self.device, World())
        kind = FrozenCohort if config.clients.frozen else LocalCohort
        self.cohort = kind(
            model.client,
            config,
            images,
            ClientSampler(held, config.seed),
            torch.zeros(channels),
            torch.ones(channels),
            self.device,
            defence=defence,
        )
        self.cohort.pool = np.array([client])
        self.cohort.secret = secrets.randbits(63)  # what a defence draws must not be known to the server
        self._specification = {
            name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in self.cohort.halves().items()
        } | dict.fromkeys(("mean", "std"), ((channels,), "float32"))

    def specification(self, names: frozenset[str]) -> Mapping[str, tuple[tuple[int, ...], str]]:
        """See ``client.Worker``."""
        return weights_of(names, self._specification)

    def take(self, weights: Mapping[str, NDArray], restart: bool) -> None:
        """See ``client.Worker``."""
        tensors = {name: torch.from_numpy(array.copy()) for name, array in weights.items()}
        self.cohort.mean, self.cohort.std = tensors.pop("mean").to(self.device), tensors.pop("std").to(self.device)
        self.cohort.take_over(tensors, restart)

    def draw(self, step: int, first: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """See ``client.Worker``."""
        self.cohort.sampler.drawn[self.cohort.pool] = first
        latents = self.cohort.forward()
        return latents.query.cpu().numpy(), latents.key.cpu().numpy()

    def learn(self, step: int, gradient: NDArray[np.float32], lr: float) -> None:
        """See ``client.Worker``."""
        self.cohort.backward(torch.from_numpy(gradient.copy()).to(self.device), lr)

    def weights(self) -> Mapping[str, NDArray]:
        """See ``client.Worker``."""
        kept = ("online.", "momentum.") if self.config.sync.momentum else ("online.",)
        return {name: t.cpu().numpy() for name, t in self.cohort.halves().items() if name.startswith(kept)}
