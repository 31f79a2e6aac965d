"""Latents that are used more than once: the server keeps what clients have sent, and trains on with it.

``RecallingCohort`` stands between the training loop and any cohort. What it asks of the clients in a step is up to a
schedule: of frozen clients views of each image once (``UploadFirst``), of learning ones as much as the loss calls for
(``LossThreshold``).
"""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mocosfl.clients import Cohort, Latents
from mocosfl.config import CacheSettings, Config
from mocosfl.data.images import upload
from mocosfl.errors import SettingError
from mocosfl.trainer import Callback, Trainer
from mocosfl_device.randomness import REPLAY, bits, items, uniform

_ITEM, _VIEW, _FLIP, _ROW, _COLUMN, _NOISE = range(6)
"""Second counter of each use of ``REPLAY``."""


class Ask(enum.Enum):
    """What a step asks of the clients."""

    LEARN = "learn"
    """Latents, and a gradient goes back."""
    UPLOAD = "upload"
    """Latents alone."""
    NOTHING = "nothing"
    """The step is made of latents that the server has."""


class Schedule(Protocol):
    """Decides what each step asks."""

    def ask(self, step: int) -> Ask:
        """What the step of this number, from 0, asks; called for one after the other."""

    def uploads(self, steps: int) -> int:
        """How many of so many steps ask for latents, at most."""

    def observe(self, step: int, loss: Tensor) -> None:
        """Take note of the loss of a step."""

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``'s result."""


class UploadFirst:
    """Frozen clients send views of all images first; then only a share of the steps asks for more.

    Args:
        first: steps at the beginning that ask.
        refresh: share of the later ones that do.
    """

    def __init__(self, first: int, refresh: float) -> None:
        self.first, self.refresh = first, refresh

    @classmethod
    def of(cls, config: Config, images: NDArray[np.int64]) -> UploadFirst:
        """So many steps that the clients have sent ``cache.views`` views of each image.

        Args:
            config: the whole configuration.
            images: (N,) int64, of each client.

        Raises:
            SettingError: the run is over before that.
        """
        passes = config.cache.views // 2  # two views a pass
        first = int(np.ceil(passes * images / config.batches).max())
        epochs = first * config.step_images / images.sum()
        if round(epochs, 6) > config.train.epochs:
            raise SettingError(
                f"cache.views={config.cache.views}: to send them takes the clients {epochs:g} epochs, 2 views of each "
                f"image in one; train.epochs={config.train.epochs:g} are fewer"
            )
        return cls(first, config.cache.refresh)

    def ask(self, step: int) -> Ask:
        """See ``Schedule``."""
        return Ask.UPLOAD if self.uploads(step + 1) > self.uploads(step) else Ask.NOTHING

    def uploads(self, steps: int) -> int:
        """See ``Schedule``."""
        return min(steps, self.first) + int(max(0, steps - self.first) * self.refresh + 1e-9)

    def observe(self, step: int, loss: Tensor) -> None:
        """The loss decides nothing."""

    def state_dict(self) -> dict[str, Any]:
        """See ``Schedule``."""
        return {"first": self.first}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Schedule``."""
        self.first = state["first"]


class LossThreshold:
    """Learning clients learn while the loss changes much, an epoch at a time (Chen, Li and Chakrabarti, 2021).

    Clients learn in the first epoch. After each, its mean loss is compared with that of the last epoch in which they
    learned. If it differs by more than the threshold, they learn in the next epoch. If not, they send latents without
    being sent gradients, once, because their halves have moved since the last ones; from then on those are used
    again.

    Args:
        threshold: of the mean loss.
        length: steps of an epoch.
    """

    def __init__(self, threshold: float, length: int) -> None:
        self.threshold, self.length = threshold, length
        self.now, self.learned_at = Ask.LEARN, float("nan")
        self._losses: list[Tensor] = []

    def ask(self, step: int) -> Ask:
        """See ``Schedule``."""
        if step > 0 and step % self.length == 0 and self._losses:
            loss = float(torch.stack([loss.to(self._losses[-1].device) for loss in self._losses]).mean())
            self._losses.clear()
            self._next(loss)
        return self.now

    def _next(self, loss: float) -> None:
        if self.now is Ask.LEARN:
            before, self.learned_at = self.learned_at, loss
            moved = not abs(before - loss) <= self.threshold  # there is nothing before the first
        else:
            moved = abs(self.learned_at - loss) > self.threshold
        if moved:
            self.now = Ask.LEARN
        else:
            self.now = Ask.UPLOAD if self.now is Ask.LEARN else Ask.NOTHING

    def uploads(self, steps: int) -> int:
        """See ``Schedule``: the loss is not known before."""
        return steps

    def observe(self, step: int, loss: Tensor) -> None:
        """See ``Schedule``."""
        self._losses.append(loss)

    def state_dict(self) -> dict[str, Any]:
        """See ``Schedule``."""
        losses = torch.tensor([float(loss) for loss in self._losses])
        return {"now": self.now.value, "learned_at": self.learned_at, "losses": losses, "length": self.length}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Schedule``."""
        self.now, self.learned_at, self.length = Ask(state["now"]), state["learned_at"], state["length"]
        self._losses = list(state["losses"])


class LatentStore:
    """Latents of every image of every client, in the memory of the compute device.

    They are kept as float32, or in two bytes where a codec has left little more of them than that holds: exactly for
    bf16, and to 2**-11 of themselves for the others (to 3e-8 where they are below 6e-5).

    Args:
        views: V, latents that are kept of an image; the next one takes the place of the oldest.
        shape: of one latent.
        clients: N.
        codec: ``traffic.latents``.
        device: where to keep them.

    Attributes:
        latents: (images, V, ...), zero where nothing was sent.
        held: (images, V) bool, what was sent.
        base: (N,) int64, row of each client's first image; ``images``, (N,) int64, how many it has. None until
            ``make_room``.
    """

    def __init__(self, views: int, shape: tuple[int, ...], clients: int, codec: str, device: torch.device) -> None:
        kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
        self.views, self.device = views, device
        self.latents = torch.zeros(0, views, *shape, dtype=kinds.get(codec, torch.float16), device=device)
        self.held = np.zeros((0, views), bool)
        self.base, self.images = np.zeros(clients, np.int64), np.zeros(clients, np.int64)
        self._ready: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]] | None = None

    @property
    def bytes_of_image(self) -> int:
        """That its V latents take."""
        return self.latents.element_size() * self.latents.shape[1:].numel()

    @property
    def room(self) -> int:
        """Images whose latents fit in this machine's memory."""
        return _memory(self.device) // self.bytes_of_image

    def make_room(self, images: NDArray[np.int64]) -> None:
        """Make room for clients that have none yet.

        Args:
            images: (N,) int64, of each client; 0 for one that is not there yet.

        Raises:
            SettingError: they would not fit in this machine's memory.
        """
        new = np.flatnonzero((self.images == 0) & (images > 0))
        if len(new) == 0:
            return
        count = int(images[new].sum())
        if len(self.held) + count > self.room:
            raise SettingError(
                f"cache.views={self.views}: the latents of {len(self.held) + count:,} images take "
                f"{(len(self.held) + count) * self.bytes_of_image / 2**30:.1f} GiB, and this machine has "
                f"{_memory(self.device) / 2**30:.1f}"
            )
        self.base[new] = len(self.held) + np.cumsum(images[new]) - images[new]
        self.images[new] = images[new]
        room = self.latents.new_zeros(count, *self.latents.shape[1:])
        self.latents = torch.cat([self.latents, room]) if len(self.held) else room
        self.held = np.concatenate([self.held, np.zeros((count, self.views), bool)])

    def keep(self, rows: NDArray[np.int64], views: NDArray[np.int64], latents: Tensor) -> None:
        """Keep latents.

        Args:
            rows: (n,) int64, of the images.
            views: (n,) int64, which of an image's views it is.
            latents: (n, ...) float32.
        """
        where = upload(rows, self.device), upload(views, self.device)
        self.latents[where] = latents.detach().to(self.latents.dtype)
        self.held[rows, views] = True
        self._ready = None

    @property
    def ready(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Rows of the images of which two views are there, client after client, (m,) int64; where each client's begin
        among them, and how many there are, (N,) int64."""
        if self._ready is None:
            usable = self.held.sum(axis=1) >= 2
            order = np.argsort(self.base[self.images > 0])
            clients = np.flatnonzero(self.images > 0)[order]  # as their rows lie
            whose = np.repeat(clients, self.images[clients])
            rows = np.flatnonzero(usable)
            counts = np.bincount(whose[rows], minlength=len(self.images))
            starts = np.zeros_like(counts)
            starts[clients] = np.cumsum(counts[clients]) - counts[clients]
            self._ready = rows, starts, counts
        return self._ready

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        numbers = {name: torch.from_numpy(getattr(self, name)) for name in ("held", "base", "images")}
        return numbers | {"latents": self.latents}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``'s result."""
        for name in ("held", "base", "images"):
            setattr(self, name, state[name].numpy().copy())
        self.latents = state["latents"].to(self.device)
        self._ready = None


class RecallingCohort:
    """Clients who are not asked in every step (``clients.Cohort``).

    Args:
        cohort: the clients; of frozen ones ``stop_asking`` is called, if there is such a thing, when nothing more will
            be asked of them.
        config: the whole configuration.
        images: (N,) int64, of each client; those of clients that come later may be filled in then.
        begun: (N,) int64, of each when the run began, from which the schedule follows. Unset: ``images``.
        shape: of one image's latent.
        device: where the server computes.

    Raises:
        SettingError: the settings do not fit the clients, or the latents this machine's memory.

    Attributes:
        cohort: the clients.
        schedule: what each step asks.
        store: what they have sent.
        step: steps so far.
        replayed: (N,) int64, images of each client that were taken from the store so far.
        asked: steps so far, by what they asked (``Ask``).
    """

    def __init__(
        self,
        cohort: Cohort,
        config: Config,
        images: NDArray[np.int64],
        shape: tuple[int, ...],
        device: torch.device,
        begun: NDArray[np.int64] | None = None,
    ) -> None:
        if len(shape) != 3:
            for name in ("flip", "crop"):
                if value := getattr(config.cache, name):
                    raise SettingError(
                        f"cache.{name}={value:g}: latents of {shape} have no pixels to move; accepted is 0"
                    )
        self.cohort, self.config, self.images, self.device = cohort, config, images, device
        self.schedule: Schedule
        begun = images if begun is None else begun
        if config.clients.frozen:
            self.schedule = UploadFirst.of(config, begun)
        else:
            assert config.traffic.loss_threshold is not None
            length = max(1, round(int(begun.sum()) / config.step_images))
            self.schedule = LossThreshold(config.traffic.loss_threshold, length)
        views = config.cache.views if config.clients.frozen else 2
        self.store = LatentStore(views, shape, config.clients.number, config.traffic.latents, device)
        self.store.make_room(images)
        self.step = 0
        self.replayed = np.zeros(config.clients.number, np.int64)
        self.asked = dict.fromkeys(Ask, 0)
        self._moved = False
        self._steps = 2**62
        self._let_go = False

    def follow(self, steps: int) -> None:
        """Tell how many steps the run has."""
        self._steps = steps
        if self.has_all:  # it goes on from a checkpoint that says so
            self.let_go()

    def describe(self, steps: int) -> str:
        """What is kept, in a line."""
        match self.schedule:
            case UploadFirst(first=first, refresh=refresh):
                later = f", then new ones of {refresh:.3g} of the images an epoch" if refresh else ""
                return (
                    f"cache:   {self.store.views} views of each image in the first {first:,} of {steps:,} steps{later};"
                    " all other steps use them again"
                )
            case LossThreshold(threshold=threshold):
                return f"traffic: clients learn while the loss of an epoch changes by more than {threshold:g}"
        raise AssertionError(self.schedule)

    def activate(self, pool: NDArray[np.int64]) -> None:
        """All clients are active, always (``Config`` sees to it)."""
        self.cohort.activate(pool)

    def forward(self) -> Latents:
        """Latents of the clients, or of the store; see ``Cohort.forward``."""
        ask = self.schedule.ask(self.step)
        if ask is Ask.NOTHING:
            latents = self._recalled()
        else:
            latents = self.cohort.forward()
            self._keep(latents)
            self._moved |= ask is Ask.LEARN
            latents = replace(latents, learning=ask is Ask.LEARN and latents.learning)
        self.step += 1
        self.asked[ask] += 1
        return latents

    @property
    def has_all(self) -> bool:
        """Whether clients over the network could be let go: nothing more will be asked of them."""
        asked_no_more = self.schedule.uploads(self._steps) <= self.schedule.uploads(self.step)
        return hasattr(self.cohort, "stop_asking") and not self._let_go and self.step < self._steps and asked_no_more

    def let_go(self) -> None:
        """Let them go. What they have sent must be kept where a crash does not lose it: they will not come back."""
        self._let_go = True
        self.cohort.stop_asking()  # type: ignore[attr-defined]

    def _keep(self, latents: Latents) -> None:
        """Put latents where their images' are."""
        self.store.make_room(self.images)
        owner = np.repeat(latents.clients, latents.sizes)
        starts = np.repeat(latents.sizes.cumsum() - latents.sizes, latents.sizes)
        draws = np.repeat(latents.first, latents.sizes) + np.arange(len(owner)) - starts
        item, epoch = items(self.config.seed, owner, draws, self.store.images[owner])
        rows = self.store.base[owner] + item
        for offset, sent in enumerate((latents.query[0], latents.key[0])):
            self.store.keep(rows, (2 * epoch + offset) % self.store.views, sent)

    def _recalled(self) -> Latents:
        """Two views each of the next images of every client, of those that are in the store."""
        config, seed = self.config, self.config.seed
        rows, starts, counts = self.store.ready
        everyone = np.arange(config.clients.number)
        there = counts[everyone] > 0
        clients, sizes = everyone[there], config.batches[there]
        owner = np.repeat(clients, sizes)
        draws = self.replayed[owner] + np.arange(len(owner)) - np.repeat(sizes.cumsum() - sizes, sizes)
        self.replayed[clients] += sizes
        item, _ = items(seed, owner, draws, counts[owner], REPLAY)
        found = rows[starts[owner] + item]
        views = np.tile([[0], [1]], len(found))  # a learning client's halves differ, so its pairs stay as they are
        if config.clients.frozen:
            keys = bits(seed, REPLAY, _VIEW, owner[:, None], draws[:, None], np.arange(self.store.views)) >> np.uint64(
                1
            )
            keys[~self.store.held[found]] = np.uint64(2**63)
            views = np.argpartition(keys, 1, axis=1)[:, :2].T
        pair = self.store.latents[upload(found, self.device), upload(np.ascontiguousarray(views), self.device)].float()
        pair = augmented_latents(pair, config.cache, seed, owner, draws, self.step)
        return Latents(pair[:1], pair[1:], clients, sizes, draws[np.cumsum(sizes) - sizes], (len(owner),), False)

    def backward(self, gradients: Tensor, lr: float) -> dict[str, Tensor]:
        """Called after steps in which clients learn; see ``Cohort.backward``."""
        return self.cohort.backward(gradients, lr)

    def synchronise(self) -> dict[str, Tensor]:
        """Average the clients' halves, if any has moved."""
        moved, self._moved = self._moved, False
        return self.cohort.synchronise() if moved else {}

    def average(self) -> dict[str, Tensor]:
        """The average client half as a state dict."""
        return self.cohort.average()

    def apart(self) -> tuple[int, dict[str, Any]]:
        """The store's state, which is large, and a number that grows when it changes."""
        return self.asked[Ask.LEARN] + self.asked[Ask.UPLOAD], self.store.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """The clients' state, the schedule and the counters; what is in the store is ``apart``."""
        return {
            "clients": self.cohort.state_dict(),
            "schedule": self.schedule.state_dict(),
            "replayed": torch.from_numpy(self.replayed),
            "asked": {ask.value: count for ask, count in self.asked.items()},
            "step": self.step,
            "moved": self._moved,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``'s result; the store has been restored before."""
        self.cohort.load_state_dict(state["clients"])
        self.schedule.load_state_dict(state["schedule"])
        self.images[:] = np.where(self.store.images > 0, self.store.images, self.images)
        self.replayed = state["replayed"].numpy().copy()
        self.step, self._moved = state["step"], state["moved"]
        self.asked = {ask: state["asked"][ask.value] for ask in Ask}


class LossWatch(Callback):
    """Tells the schedule of a cohort the loss of every step."""

    def __init__(self, cohort: RecallingCohort) -> None:
        self.cohort = cohort

    def before_training(self, trainer: Trainer) -> None:
        """Tell the cohort how long the run is."""
        self.cohort.follow(trainer.steps)

    def after_step(self, trainer: Trainer, metrics: dict[str, Tensor]) -> None:
        """Pass the loss on."""
        self.cohort.schedule.observe(trainer.step - 1, metrics["loss"])


def augmented_latents(
    latents: Tensor,
    settings: CacheSettings,
    seed: int,
    client: NDArray[np.int64],
    draw: NDArray[np.int64],
    step: int,
) -> Tensor:
    """Flip, shift and disturb latents, each in a way of its own.

    Args:
        latents: (2, n, C, H, W) float32, two views; of any shape where they are neither mirrored nor shifted.
        settings: how much of each.
        seed: the run's.
        client, draw: (n,) int64, which count the randomness.
        step: of the run, which counts that of the noise.

    Returns:
        Of the same shape; what a shift leaves bare is filled from the edge.
    """
    view, (height, width) = np.arange(2)[:, None], latents.shape[-2:]
    if settings.flip or settings.crop:
        columns = np.broadcast_to(np.arange(width), (*latents.shape[:2], width))
        rows = np.arange(height)
        if settings.crop:
            span = 2 * settings.crop + 1
            down, right = (
                (uniform(seed, REPLAY, use, client, draw, view) * span).astype(np.int64) - settings.crop
                for use in (_ROW, _COLUMN)
            )
            columns = (columns + right[..., None]).clip(0, width - 1)
            rows = (rows + down[..., None]).clip(0, height - 1)
            index = upload(rows, latents.device)[:, :, None, :, None]
            latents = latents.take_along_dim(index, dim=-2)
        if settings.flip:
            mirrored = uniform(seed, REPLAY, _FLIP, client, draw, view) < settings.flip
            columns = np.where(mirrored[..., None], columns[..., ::-1], columns)
        latents = latents.take_along_dim(upload(columns, latents.device)[:, :, None, None, :], dim=-1)
    if settings.noise:
        generator = torch.Generator(latents.device)
        generator.manual_seed(int(bits(seed, REPLAY, _NOISE, step) >> np.uint64(1)))
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        size = latents.square().mean(dim=tuple(range(2, latents.ndim)), keepdim=True).sqrt()
        latents = latents + settings.noise * size * noise
    return latents


def _memory(device: torch.device) -> int:
    """Bytes of a device's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**62
