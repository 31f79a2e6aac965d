"""The clients of a run where they really are: on other machines."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import TimeoutError as StillWaiting
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mocosfl.clients import Latents, Stopped
from mocosfl.config import Config
from mocosfl.network.exchange import Exchange
from mocosfl.network.service import Events
from mocosfl.network.settings import ServeSettings
from mocosfl_device.protocol_pb2 import Goodbye

T = TypeVar("T")


class RemoteCohort:
    """Clients over the network, for the same loop that simulates them (``clients.Cohort``).

    A step waits for every active client that is there, and no longer than ``step_timeout`` for those beyond the quorum.
    Clients that were late or away take part again as soon as they can: with the average that was last handed out, if
    they missed it. The average counts who took part since the one before.

    The training loop runs in the caller's thread, the network (``exchange``) in one of its own.

    Args:
        half: the client half, initialised.
        config: the whole configuration.
        settings: how to listen and wait.
        shape: of one image's latent.
        channels, size: of the images.
        device: where the server computes.
        events: told what happens.

    Attributes:
        exchange: what goes on in the network's thread.
    """

    def __init__(
        self,
        half: nn.Module,
        config: Config,
        settings: ServeSettings,
        shape: tuple[int, ...],
        channels: int,
        size: int,
        device: torch.device,
        events: Events,
    ) -> None:
        self.device = device
        self.exchange = Exchange(half, config, settings, shape, channels, size, events)
        self._stopping: Callable[[], bool] = lambda: False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mocosfl network", daemon=True)

    # Life

    def start(self) -> None:
        """Begin to listen.

        Raises:
            RunError: the address or a certificate cannot be used.
        """
        self._thread.start()
        self._call(self.exchange.start())

    def stop(self, finished: bool) -> None:
        """Send all clients away, for good or until the server is back, and stop listening."""
        if not self._thread.is_alive():
            self._loop.close()
            return
        if finished:
            code, reason = Goodbye.FINISHED, "the run is over"
        else:
            code, reason = Goodbye.STOPPED, "the server is stopping"
        self._call(self.exchange.service.stop(code, reason))
        self._call(_let_go())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def gather(self, count: int, say: Callable[[int], None] = lambda present: None) -> tuple[int, NDArray, NDArray]:
        """Wait until so many clients have joined.

        Args:
            count: clients to wait for.
            say: told how many there are, when that changes.

        Returns:
            Their images, and the mean and standard deviation of each channel over all of them, in [0, 1].
        """
        return self._wait(self.exchange.gather(count, say))

    def begin(self, mean: NDArray, std: NDArray) -> None:
        """Let the clients start from the half as it is; images are normalised with these, (C,)."""
        self.exchange.mean, self.exchange.std = mean.astype(np.float32), std.astype(np.float32)
        self.exchange.begun = True

    def follow(self, steps: int, round_steps: int | None, stopping: Callable[[], bool]) -> None:
        """What the cohort needs to know of the run.

        Args:
            steps: of the run; nobody is asked for more.
            round_steps: of a round, where pools are sampled; nobody is asked beyond its end.
            stopping: asked while waiting: when true, waiting ends with ``Stopped``.
        """
        self.exchange.steps, self.exchange.round_steps = steps, round_steps or 2**62
        self._stopping = stopping

    def admit(self, images: float) -> None:
        """So many images may all clients have together; who would bring more is refused."""
        self.exchange.room = images

    def fingerprint(self) -> str:
        """Of the half that frozen clients are handed."""
        return self.exchange.fingerprint()

    @property
    def images(self) -> NDArray[np.int64]:
        """(N,) int64, images of each client; 0 if it has not been there. It fills as clients come."""
        return self.exchange.images

    def stop_asking(self) -> None:
        """Send all clients away for good, and those who come later: their latents are no longer needed."""
        self._call(self.exchange.service.dismiss(Goodbye.FINISHED, "the server has all latents that it needs"))

    @property
    def present(self) -> int:
        """Clients that are there."""
        return len(self.exchange.service.sessions)

    # The cohort, called by the training loop

    def activate(self, pool: NDArray[np.int64]) -> None:
        """Start a round. Clients that are away are replaced by others, drawn alike."""
        self._call(self.exchange.activate(pool))

    def forward(self) -> Latents:
        """Ask the active clients for latents, and wait for them; see ``Cohort.forward``.

        Raises:
            Stopped: ``follow``'s ``stopping`` said so before the quorum was reached.
        """
        exchange = self.exchange
        batch, rows = self._wait(exchange.next_step()), exchange.rows()
        query, key = batch.query, batch.key
        if len(rows) < query.shape[1]:
            index = torch.from_numpy(rows)
            query, key = query.index_select(1, index), key.index_select(1, index)
        query, key = (t.to(self.device) for t in (query, key))  # waits: the buffers are used again
        clients, sizes = exchange.pool[exchange.used], exchange.sizes[exchange.used]
        # detach: the buffer is used again, and must not be marked as wanting a gradient
        first = batch.first[exchange.used]
        return Latents(query.detach(), key.detach(), clients, sizes, first, (len(rows),), not exchange.frozen)

    def backward(self, gradients: Tensor, lr: float) -> dict[str, Tensor]:
        """Keep the gradients for the clients' next order: they lie where the latents were."""
        if (batch := self.exchange.current) is None:
            raise RuntimeError("backward needs a forward before it")
        rows = self.exchange.rows()
        if len(rows) < batch.query.shape[1]:
            batch.query[:, torch.from_numpy(rows)] = gradients.to("cpu")
        else:
            batch.query.copy_(gradients)  # waits for the device
        self._loop.call_soon_threadsafe(self.exchange.note_gradients, lr)
        return {}

    def synchronise(self) -> dict[str, Tensor]:
        """Average the halves of all who took part since the last average; all get it with their next order."""
        return self._call(self.exchange.synchronise())

    def average(self) -> dict[str, Tensor]:
        """The average client half as a state dict; changes nothing."""
        return (self._call(self.exchange.collect()) or (self.exchange.online,))[0]

    def state_dict(self) -> dict[str, Any]:
        """The clients' average halves, the pool and the counters. What clients keep for themselves is theirs."""
        exchange = self.exchange
        online, momentum = self._call(exchange.collect()) or (exchange.online, exchange.momentum)
        return {
            "online": online,
            "momentum": momentum,
            "initial": exchange.initial,
            "pool": torch.from_numpy(exchange.pool),
            "drawn": torch.from_numpy(self._call(exchange.used_draws())),
            "activated": torch.from_numpy(exchange.activated),
            "step": exchange.step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``'s result. Clients start from the average, their optimisers afresh."""
        exchange = self.exchange
        for name in ("online", "momentum", "initial"):
            setattr(exchange, name, {key: tensor.clone() for key, tensor in state[name].items()})
        exchange.drawn, exchange.activated = state["drawn"].numpy().copy(), state["activated"].numpy().copy()
        exchange.step = state["step"]
        exchange.seat_pool(state["pool"].numpy().copy())

    # Between the two threads

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something in the network's thread, and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The same for what may take long: gives up when the run is stopping."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        while True:
            try:
                return future.result(0.2)
            except StillWaiting:
                if future.done() or (self._stopping() and not future.cancel()):
                    return future.result()  # it was done in this very moment
                if future.cancelled():
                    raise Stopped from None


async def _let_go() -> None:
    """End what is still under way in this loop, such as conversations with strangers."""
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
