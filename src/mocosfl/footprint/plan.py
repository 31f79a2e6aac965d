"""How long a run is, and how often a client takes part in it, before it is made."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mocosfl.config import Config
from mocosfl.data.sampler import pool_of_round
from mocosfl.data.sources import count_training_images, hub_id
from mocosfl.errors import SettingError
from mocosfl.latent_cache import UploadFirst

KNOWN = {
    "cifar10": (50_000, 32),
    "cifar100": (50_000, 32),
    "svhn": (73_257, 32),
    "stl10": (5_000, 96),
    "tiny-imagenet": (100_000, 64),
}
"""Training images of the public data sets, and their height and width in pixels."""


@dataclass(frozen=True)
class Plan:
    """A run that has not been made. Clients are taken to hold equally many images.

    Attributes:
        config: the whole configuration.
        images: of all clients.
        size: height and width of an image in pixels.
    """

    config: Config
    images: int
    size: int

    @classmethod
    def of(cls, config: Config, images: int | None = None) -> Plan:
        """The plan of a configuration.

        Args:
            config: the whole configuration.
            images: that all clients hold together. Unset: the training images of ``data.source``, without those that
                are held out; those of a data set on the hub are known for the short names alone.

        Raises:
            SettingError: number or size of the images is not known.
            DataError: the folder cannot be used.
        """
        source = config.data.source
        known, pixels = KNOWN.get(source, (None, 8 if source == "digits" else None))
        size = config.data.size or pixels
        if size is None:
            raise SettingError(f"data.size is not set, and the size of the images of data.source={source} is not known")
        if images is None:
            if known is None and (hub := hub_id(source)) is not None:
                raise SettingError(
                    f"images is not set, and how many {hub} has is not known before it is downloaded; known are those "
                    f"of {', '.join(KNOWN)}, digits, and local files"
                )
            if known is None:
                known, labelled = count_training_images(config.data, config.seed)
            else:
                labelled = True
            known = min(known, config.data.images or known)
            images = known - (round(config.data.held_out * known) if labelled else 0)
        if images < config.clients.number:
            raise SettingError(f"clients.number={config.clients.number}: there are only {images} training images")
        return cls(config, images, size)

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return max(1, round(self.config.train.epochs * self.images / self.config.step_images))

    @property
    def round_steps(self) -> int:
        """Steps of a round, where pools are sampled."""
        config = self.config
        a_pass = round(self.images * config.pool / (config.clients.number * config.step_images))
        return config.clients.round or max(1, a_pass)

    @property
    def sampled(self) -> bool:
        """Whether pools are sampled."""
        return self.config.pool < self.config.clients.number

    @property
    def each(self) -> float:
        """Images of a client."""
        return self.images / self.config.clients.number

    @property
    def asked(self) -> int:
        """Steps in which active clients are asked for latents; with ``traffic.loss_threshold``, at most."""
        if not self.config.cache.views:
            return self.steps
        images = np.full(self.config.clients.number, round(self.each))
        return UploadFirst.of(self.config, images).uploads(self.steps)

    def batch(self, rich: bool = False) -> int:
        """Images of a client in a step."""
        clients = self.config.clients
        return clients.batch * (clients.rich_batch_factor if rich else 1)

    def number(self, rich: bool = False) -> int:
        """Clients of this kind."""
        return self.config.rich if rich else self.config.clients.number - self.config.rich

    def active(self, rich: bool = False) -> int:
        """Those that are active in a step."""
        return self.config.pool_rich if rich else self.config.pool - self.config.pool_rich

    def client_steps(self, rich: bool = False) -> float:
        """Steps of the run in which a client sends latents: the mean of all clients, where pools are sampled."""
        return self.asked * self.active(rich) / self.number(rich)

    def epoch_steps(self, rich: bool = False) -> float:
        """The same in an epoch in which every step asks for latents."""
        return self.images / self.config.step_images * self.active(rich) / self.number(rich)

    @cached_property
    def _averages(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Whether each step ends with an average, and whether the clients' halves are collected after it."""
        step, every = np.arange(1, self.steps + 1), self.config.sync.every
        since = step % self.round_steps if self.sampled else step
        averaged = step == self.steps
        if every:
            averaged |= since % every == 0
        if self.sampled:
            averaged |= since == 0
        return averaged, averaged | (step % self.config.train.checkpoint_every == 0)

    @property
    def averages(self) -> int:
        """Averages of the run, the one at its end included. Each but the first interval begins with one handed out."""
        return 0 if self.config.clients.frozen else int(self._averages[0].sum())

    @property
    def collections(self) -> int:
        """Times that active clients send their halves: for averages, and for checkpoints between two of them."""
        return 0 if self.config.clients.frozen else int(self._averages[1].sum())

    def ever_active(self, rich: bool = False) -> int:
        """Clients of this kind that take part at all."""
        if not self.sampled:
            return self.number(rich)
        config, poor, seen = self.config, self.number(), np.zeros(0, np.int64)
        for round_ in range(-(-self.steps // self.round_steps)):
            pool = pool_of_round(config.seed, round_, config.clients.number, config.pool, config.rich, config.pool_rich)
            seen = np.union1d(seen, pool)
            if len(seen) == config.clients.number:
                break
        return int((seen >= poor).sum() if rich else (seen < poor).sum())
