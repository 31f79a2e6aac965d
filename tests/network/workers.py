"""A client without PyTorch. As a program: [PORT, CLIENT, ...] joins so many clients, in one process."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mocosfl_device.client import Client
from mocosfl_device.settings import JoinSettings

SHAPE = (3,)
"""Of a latent."""
SPECIFICATION = {"weight": (3, 2), "bias": (3,)}


class FakeWorker:
    """A client without PyTorch: it computes nothing, and writes down what it is asked.

    Attributes:
        calls: ("take", ...), ("draw", step), ("learn", step), ("weights",) in order.
        drawing, learning: called with the step before it answers; what ``drawing`` returns is sent, if anything.
    """

    capabilities: tuple[str, ...] = ("learn", "forward")
    description: Mapping[str, Any] = {}

    def __init__(
        self, shape: tuple[int, ...] = (1, 2, *SHAPE), names: Mapping[str, tuple] = SPECIFICATION, images: int = 10
    ) -> None:
        self.images = images
        self.shape, self.names = shape, dict(names)
        self.calls: list[tuple] = []
        self.drawing: Callable[[int], Any] = lambda step: None
        self.learning: Callable[[int], None] = lambda step: None
        self.momentum = True

    def prepare(self, welcome: Any) -> tuple[int, list[int], list[int]]:
        self.told = json.loads(welcome.settings)
        self.momentum = self.told["sync"]["momentum"]
        channels = self.told["data"]["channels"]
        pixels = self.images * self.told["data"]["size"] ** 2
        return self.images, [100 * pixels] * channels, [20_000 * pixels] * channels

    def specification(self, names: frozenset[str]) -> dict[str, tuple[tuple[int, ...], str]]:
        own = {
            "mean": ((self.told["data"]["channels"],), "float32"),
            "std": ((self.told["data"]["channels"],), "float32"),
        }
        return {name: own[name] if name in own else (self.names[name.partition(".")[2]], "float32") for name in names}

    def take(self, weights: Mapping[str, np.ndarray], restart: bool) -> None:
        self.calls.append(("take", restart))

    def draw(self, step: int, first: int) -> tuple[np.ndarray, np.ndarray]:
        self.calls.append(("draw", step, first))
        if (answer := self.drawing(step)) is not None:
            return answer
        numbers = np.random.default_rng(step).standard_normal((2, *self.shape)).astype(np.float32)
        return numbers[0], numbers[1]

    def learn(self, step: int, gradient: np.ndarray, lr: float) -> None:
        self.calls.append(("learn", step))
        self.learning(step)

    def weights(self) -> dict[str, np.ndarray]:
        self.calls.append(("weights",))
        parts = ("online.", "momentum.") if self.momentum else ("online.",)
        return {part + name: np.ones(shape, np.float32) for part in parts for name, shape in self.names.items()}

    def steps(self, kind: str) -> list[int]:
        return [call[1] for call in list(self.calls) if call[0] == kind]


def learned_twice(calls: list[tuple]) -> list[int]:
    """Steps that a client learned again without being handed weights in between, or that were not its last draw."""
    wrong, since, drawn = [], set(), None
    for call in calls:
        if call[0] == "take":
            since, drawn = set(), None
        elif call[0] == "draw":
            drawn = call[1]
        elif call[0] == "learn":
            if call[1] in since or call[1] != drawn:
                wrong.append(call[1])
            since.add(call[1])
    return wrong


async def main(port: int, *numbers: int) -> None:
    clients = []
    for number in numbers:
        settings = JoinSettings(server=f"127.0.0.1:{port}", client=number)
        clients.append(Client(settings, FakeWorker(), lambda text, n=number: print(n, text, flush=True)))
    await asyncio.gather(*(client.take_part() for client in clients))


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:])))
