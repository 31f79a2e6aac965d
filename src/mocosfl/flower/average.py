"""Clients that learn by themselves for a round, averaged by Flower's FedAvg."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

from mocosfl.errors import RunError
from mocosfl.flower.cohort import Asked, Chunk, FlowerCohort
from mocosfl.flower.records import LEARN, natives, understood, weights_of
from mocosfl.network.claims import check_weights
from mocosfl.server import Server
from mocosfl_device.wire import Specification, Violation


class AveragingCohort(FlowerCohort):
    """Clients that are handed the average half and a copy of the server, and learn for a round (``clients.Cohort``).

    A round is ``sync.every`` steps. Each client takes them by itself: its latents are contrasted against the server's
    queue by a copy of the server half that stays as it is, and the gradient moves its half alone. It returns the half
    and the latents that it has computed on the way. Flower's FedAvg averages the halves; the server half then learns
    from the latents, in as many steps.

    Nothing is asked for ahead of time: the next round begins with what this one ends with.

    Built as ``FlowerCohort`` is.

    Attributes:
        server: whose copy the clients are handed; to be set before the run begins.
        rates: learning rate of the clients in a step, from 0; likewise.
        strategy: averages.
    """

    kind: ClassVar[str] = LEARN
    prefetch: ClassVar[bool] = False
    server: Server
    rates: Callable[[int], float]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.momentum = {name: t.clone() for name, t in self.online.items()}
        self.strategy = FedAvg()
        self.loss = float("nan")
        self._replies: dict[int, Message] = {}

    def average(self) -> dict[str, torch.Tensor]:
        """The average client half as a state dict; changes nothing."""
        return self.online

    def state_dict(self) -> dict[str, Any]:
        """The average halves and the counters. Clients keep nothing between two rounds."""
        return super().state_dict() | {"momentum": self.momentum}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``'s result. Of a round that was not done its clients learn the rest again."""
        super().load_state_dict(state)
        self.momentum = {name: tensor.clone() for name, tensor in state["momentum"].items()}

    def _length(self) -> int:
        return self.config.sync.every

    def _open(self, start: int) -> Chunk:
        chunk = super()._open(start)
        since = start % self.round_steps  # sync points are counted within a round of a pool
        chunk.stop = min(chunk.stop, start + self.config.sync.every - since % self.config.sync.every)
        self._replies.clear()
        return chunk

    def _weights(self) -> dict[str, NDArray]:
        return super()._weights() | {f"momentum.{name}": t.numpy() for name, t in self.momentum.items()}

    @property
    def _specification(self) -> Specification:
        """What a client returns: what can be averaged of both halves."""
        return {
            f"{half}.{name}": (tuple(t.shape), str(t.dtype).removeprefix("torch."))
            for half, tensors in (("online", self.online), ("momentum", self.momentum))
            for name, t in tensors.items()
            if t.is_floating_point()
        }

    def _content(self, chunk: Chunk) -> dict[str, Any]:
        rates = [self.rates(step) for step in range(chunk.start, chunk.stop)]
        return super()._content(chunk) | {
            "server": natives(server_state(self.server)),
            "rates": ConfigRecord({"rates": rates}),
        }

    def _answered(self, asked: Asked, reply: Message) -> None:
        record: Any = understood(lambda: reply.content["arrays"])
        arrays = understood(lambda: weights_of(record, self._specification))
        check_weights(arrays, {"online": self.online, "momentum": self.momentum})
        metrics: Any = understood(lambda: reply.content["metrics"])
        loss = understood(lambda: float(metrics["loss"]))
        if not math.isfinite(loss):
            raise Violation("a loss that is not finite")
        super()._answered(asked, reply)
        assert asked.client is not None
        assert asked.chunk is not None
        images = (asked.chunk.stop - asked.chunk.start) * self.config.batch_of(asked.client)
        self.counts["bytes_in"] += sum(array.nbytes for array in arrays.values())
        reply.content = RecordDict(
            {"arrays": natives(arrays), "metrics": MetricRecord({"num-examples": images, "loss": loss})}
        )
        self._replies[asked.client] = reply

    def _closed(self, chunk: Chunk) -> None:
        """Let the strategy average."""
        replies = [self._replies.pop(client) for client in sorted(self._replies)]
        arrays, metrics = self.strategy.aggregate_train(self.counts["chunks"] + 1, replies)
        if arrays is None or metrics is None:
            raise RunError("Flower's strategy has made no average of the clients' halves")
        for name, array in arrays.items():
            half, _, weight = name.partition(".")
            getattr(self, half)[weight] = torch.from_numpy(np.array(array.numpy(), np.float32))
        self.loss = float(metrics["loss"])  # type: ignore[arg-type]
        super()._closed(chunk)


def server_state(server: Server) -> dict[str, NDArray]:
    """All that a client needs of a server, by name: both copies of its half with the head, and the queue."""
    halves = {"online": server.online, "momentum": server.momentum}
    states = {f"{kind}.{name}": t for kind, half in halves.items() for name, t in half.state_dict().items()}
    return {name: t.detach().cpu().numpy() for name, t in (states | {"keys": server.queue.keys}).items()}


def take_over(server: Server, record: ArrayRecord) -> None:
    """Make a server a copy of that whose state a message holds; it stays as it is when it is asked for gradients.

    Raises:
        Violation: the record does not fit the server.
    """
    own = server_state(server)
    state = weights_of(record, {name: (array.shape, str(array.dtype)) for name, array in own.items()})
    tensors = {name: torch.from_numpy(array.copy()) for name, array in state.items()}
    server.queue.keys.copy_(tensors.pop("keys"))
    for kind, half in (("online", server.online), ("momentum", server.momentum)):
        half.load_state_dict({name.partition(".")[2]: t for name, t in tensors.items() if name.startswith(f"{kind}.")})
        half.eval()  # BatchNorm uses the statistics of all clients, not those of one
