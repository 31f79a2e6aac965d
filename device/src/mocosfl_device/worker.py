"""A client's computation in numpy: views, client half, SGD and moving average, for devices without PyTorch.

Equal to ``mocosfl join``'s up to the rounding of float32: same images, same views, same steps.
"""

from __future__ import annotations

import json
import secrets
import tracemalloc
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mocosfl_device.augment import AugmentParameters, Policy, augmented
from mocosfl_device.engine import Array, Weights, built
from mocosfl_device.errors import DataError, RunError
from mocosfl_device.images import Source, decoded
from mocosfl_device.protocol_pb2 import Welcome
from mocosfl_device.randomness import items
from mocosfl_device.wire import Violation, weights_of

SIZE, BATCH = 512, 4096
"""Height and width of images in pixels, and images of a step, at most."""


class NumpyWorker:
    """Computes a client's latents and steps (``client.Worker``).

    Args:
        source: the client's images.
        skip_corrupt: leave out images that cannot be decoded; those of a folder that grows are left out in any case.
        grows: whether images are added to the source.
        say: told what happens, a line each.

    Attributes:
        images: that the source holds.
    """

    capabilities: tuple[str, ...] = ("learn", "forward")

    def __init__(self, source: Source, skip_corrupt: bool, grows: bool, say: Callable[[str], None]) -> None:
        self.source, self.skip_corrupt, self.grows, self.say = source, skip_corrupt or grows, grows, say
        self.description: Mapping[str, Any] = {}
        self.online: Weights = {}
        self.averaged: Weights = {}
        self.velocity: Weights = {}
        self._mask: Array | None = None
        self._random = np.random.default_rng(secrets.randbits(128))  # of a defence: must not be known to the server
        self._key: tuple[int, int, int] | None = None
        self._sums: tuple[int, list[int], list[int]] = (0, [], [])

    @property
    def images(self) -> int:
        """That the client holds."""
        return len(self.source)

    def prepare(self, welcome: Welcome) -> tuple[int, list[int], list[int]]:
        """Decode the images once, and build the half; see ``client.Worker``.

        Raises:
            RunError: the server's settings are not understood, or need PyTorch.
            DataError: an image cannot be decoded, or there is none.
        """
        self.client, self.frozen = welcome.client, welcome.frozen
        try:
            self._understand(json.loads(welcome.settings))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise RunError(f"the server's settings are not understood: {error!r}") from error
        key = (self.size, self.channels, self._most) if self._fixed else None
        if key is not None and key == self._key:
            return self._sums  # it has come back
        self._sums = self._statistics()
        self._key = key
        return self._sums

    def _understand(self, told: Mapping[str, Any]) -> None:
        self.seed, self.batch = int(told["seed"]), int(told["clients"]["batch"])
        self.size, self.channels = int(told["data"]["size"]), int(told["data"]["channels"])
        for name, value, most in (("data.size", self.size, SIZE), ("clients.batch", self.batch, BATCH)):
            if not 1 <= value <= most:
                raise RunError(f"the server asks for {name}={value}; accepted are 1 to {most}")
        if self.channels not in (1, 3):
            raise RunError(f"the server asks for data.channels={self.channels}; accepted are 1 and 3")
        self.policy = Policy.of(told["augment"])
        self.tau = float(told["contrast"]["momentum"])
        self.both_views = bool(told["contrast"]["both_views"]) and not self.frozen
        self.averages_momentum = bool(told["sync"]["momentum"])
        self.momentum, self.decay = float(told["train"]["momentum"]), float(told["train"]["weight_decay"])
        self.defence = told["defence"]
        if self.defence["kind"] not in ("none", "noise", "dropout"):
            raise RunError(f"this client does not know defence.kind={self.defence['kind']}; use mocosfl join")
        half = told["half"]
        try:
            self.network = built(half["layers"])
        except ValueError as error:
            raise RunError(f"this client cannot compute the run's client half ({error}); use mocosfl join") from error
        self.shapes = {str(name): tuple(map(int, shape)) for name, shape in half["shapes"].items()}
        self.description = {
            "layers": half["layers"],
            "data": {"size": self.size, "channels": self.channels},
            "traffic": {name: told["traffic"][name] for name in ("latents", "topk")},
            "augment": told["augment"],
            "defence": self.defence,
        }
        # The server keeps latents of each image: it must stay the same one, also for a client that was away.
        self._fixed = bool(told["recalls"]) or not self.grows
        self._most = int(told["images"]) if self.grows else 0
        self.online, self.averaged, self.velocity = {}, {}, {}
        self._mask = None

    def _statistics(self) -> tuple[int, list[int], list[int]]:
        """Number of the images, and each channel's sum and sum of squares over all their pixels."""
        counts = np.zeros((self.channels, 256), np.int64)
        number = 0
        while number < self.images and not (self._fixed and 0 < self._most <= number):
            try:
                pixels = decoded(self.source, number, self.size, self.channels)
            except DataError as error:
                if not self.skip_corrupt:
                    raise DataError(f"{error}; --skip-corrupt leaves such images out") from error
                self._leave_out(number, error)
                continue
            for channel, plane in enumerate(pixels):
                counts[channel] += np.bincount(plane.ravel(), minlength=256)
            number += 1
        if not number:
            raise DataError("there is no image that can be decoded")
        values = np.arange(256)
        return number, (counts @ values).tolist(), (counts @ values**2).tolist()

    def _leave_out(self, number: int, error: DataError) -> None:
        self.say(f"{error}; left out")
        self.source.drop(number)

    def specification(self, names: frozenset[str]) -> Mapping[str, tuple[tuple[int, ...], str]]:
        """See ``client.Worker``."""
        known = {
            f"{part}.{name}": (shape, "float32")
            for part in ("online", "momentum")
            for name, shape in self.shapes.items()
        }
        return weights_of(names, known | dict.fromkeys(("mean", "std"), ((self.channels,), "float32")))

    def take(self, weights: Mapping[str, NDArray], restart: bool) -> None:
        """See ``client.Worker``."""
        self.mean, self.std = (np.array(weights[name])[:, None, None] for name in ("mean", "std"))
        for part, half in (("online.", self.online), ("momentum.", self.averaged)):
            for name, array in weights.items():
                if name.startswith(part):
                    half[name.removeprefix(part)] = np.array(array)
        if restart or self.frozen:
            self.velocity = {}

    def draw(self, step: int, first: int) -> tuple[Array, Array]:
        """See ``client.Worker``."""
        if not self.online:
            raise Violation("an order to draw before there is a half")
        draws = np.arange(first, first + self.batch)
        images = self._drawn(draws)
        one, other = (self._view(images, draws, view) for view in range(2))
        query_views, key_views = one, other
        if self.both_views:
            query_views, key_views = np.concatenate([one, other]), np.concatenate([other, one])
        if self.frozen:
            key, query = (self.network.forward(views, self.online, learns=False) for views in (key_views, query_views))
        else:
            for name, weight in self.online.items():
                self.averaged[name] += np.float32(1 - self.tau) * (weight - self.averaged[name])
            key = self.network.forward(key_views, self.averaged, learns=False)
            query = self.network.forward(query_views, self.online, learns=True)
        query, key = (self._sent(latents, learns) for latents, learns in ((query, not self.frozen), (key, False)))
        ways = 2 if self.both_views else 1
        return query.reshape(ways, self.batch, *query.shape[1:]), key.reshape(ways, self.batch, *key.shape[1:])

    def learn(self, step: int, gradient: NDArray[np.float32], lr: float) -> None:
        """See ``client.Worker``: SGD with momentum and weight decay, as ``torch.optim.SGD`` has it."""
        gradient = gradient.reshape(-1, *gradient.shape[2:])
        if self._mask is not None:
            gradient, self._mask = gradient * self._mask, None
        into = {name: np.zeros_like(weight) for name, weight in self.online.items()}
        self.network.backward(gradient, self.online, into, wanted=False)
        for name, weight in self.online.items():
            change = into.pop(name)
            change += np.float32(self.decay) * weight
            if name in self.velocity:
                self.velocity[name] *= np.float32(self.momentum)
                self.velocity[name] += change
            else:
                self.velocity[name] = change
            weight -= np.float32(lr) * self.velocity[name]

    def weights(self) -> Mapping[str, NDArray]:
        """See ``client.Worker``."""
        halves = {"online": self.online} | ({"momentum": self.averaged} if self.averages_momentum else {})
        return {f"{part}.{name}": weight for part, half in halves.items() for name, weight in half.items()}

    def _drawn(self, draws: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The images that draws fall on, (B, C, S, S); of a folder that grows, among those that are there now."""
        if not self._fixed:
            self.source.look()
        whose = np.full(len(draws), self.client)
        while True:
            count = self._sums[0] if self._fixed else self.images
            if not count:
                raise RunError("no image is left")
            rows, _ = items(self.seed, whose, draws, np.full(len(draws), count))
            pixels = np.empty((len(rows), self.channels, self.size, self.size), np.uint8)
            for place, row in enumerate(rows.tolist()):
                try:
                    pixels[place] = decoded(self.source, row, self.size, self.channels)
                except DataError as error:
                    if self._fixed:
                        raise
                    self._leave_out(row, error)
                    break
            else:
                return pixels

    def _view(self, images: NDArray[np.uint8], draws: NDArray[np.int64], view: int) -> Array:
        """One view of each image, normalised, (B, C, S, S)."""
        parameters = AugmentParameters.draw(self.policy, self.size, self.seed, self.client, draws, view)
        pixels = augmented(images, parameters, self.policy)
        pixels -= self.mean
        pixels /= self.std
        return pixels

    def _sent(self, latents: Array, learns: bool) -> Array:
        """Latents, (n, ...), after the defence, as ``mocosfl.privacy.defences`` has it."""
        if self.defence["kind"] == "noise":
            size = np.sqrt(np.square(latents.reshape(len(latents), -1)).mean(axis=1)).reshape(-1, 1, 1, 1)
            noise = self._random.standard_normal(latents.shape, np.float32)
            return latents + np.float32(self.defence["noise"]) * size * noise
        if self.defence["kind"] == "dropout":
            share = self.defence["dropout"]
            mask = (self._random.random(latents.shape, np.float32) >= share) / np.float32(1 - share)
            self._mask = mask if learns else self._mask
            return latents * mask
        return latents

    def measure(self) -> int:
        """Compute one more step, and see how much memory its arrays take: weights, their momentum, activations,
        gradients, views. For when the run is over: it changes the half, and must be alone in the process.

        Returns:
            Peak bytes; 0 if there is no half yet, or an image is gone.
        """
        if not self.online:
            return 0
        halves = (self.online, self.averaged, self.velocity)
        held = sum(array.nbytes for half in halves for array in half.values())
        tracemalloc.start()
        try:
            query, _ = self.draw(0, 0)
            if not self.frozen:
                self.learn(0, np.zeros_like(query), 0.0)
            return held + tracemalloc.get_traced_memory()[1]
        except (DataError, RunError):
            return 0
        finally:
            tracemalloc.stop()
