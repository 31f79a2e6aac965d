"""What clients over the network are asked for, and what comes of their answers."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mocosfl.config import Config
from mocosfl.data.sampler import with_stand_ins
from mocosfl.models.description import described, shown
from mocosfl.network.claims import Holding, check_weights, pooled
from mocosfl.network.service import Events, Gradient, Service, Session
from mocosfl.network.settings import ServeSettings
from mocosfl.network.welcome import client_settings
from mocosfl.sync import averaging, divergence
from mocosfl_device.protocol_pb2 import (
    ClientMessage,
    Goodbye,
    Order,
    Ready,
    Welcome,
)
from mocosfl_device.protocol_pb2 import Latents as LatentsMessage
from mocosfl_device.protocol_pb2 import Weights as WeightsMessage
from mocosfl_device.wire import (
    Coder,
    Refused,
    Specification,
    Violation,
    fingerprint,
    pack_weights,
    unpack_latents,
    unpack_weights,
)

TRANSIT, LARGE_TRANSIT, LARGE = 64 * 2**20, 16 * 2**20, 128 * 2**20
"""Bytes of latents that clients are asked for at a time: it bounds the memory of messages under way. Where all latents
of a step are larger, clients are asked in turn; where they are ``LARGE`` and fill the memory themselves, fewer."""
AHEAD = 256 * 2**20
"""Bytes of the steps that frozen clients may be ahead of the server, the one under way included."""
LONGEST_REST = 6
"""A client that is late n times in a row is left out of the next 2^n - 2 steps; n counts to this many."""

Halves = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Online and momentum half, by name."""


@dataclass(eq=False)
class Batch:
    """The latents of one step as they come in.

    Attributes:
        step: its number.
        query, key: (V, n, ...) float32 in the memory of the host, a piece for every active client.
        arrays: the same two, for numpy.
        first: (P,) int64, number of each client's first draw; -1 if it has not been asked.
        delivered: (P,) bool.
        awaited: clients that have been asked, or will be, and have not answered.
    """

    step: int
    query: Tensor
    key: Tensor
    arrays: tuple[NDArray[np.float32], NDArray[np.float32]]
    first: NDArray[np.int64]
    delivered: NDArray[np.bool_]
    awaited: set[int]


class Exchange:
    """What clients are asked for and what comes back, in the network's thread. It is the door's host
    (``service.Host``).

    Args:
        half: the client half, initialised.
        config: the whole configuration.
        settings: how to listen and wait.
        shape: of one image's latent.
        channels, size: of the images.
        events: told what happens.

    Attributes:
        service: the door.
        layers: the half's description.
        pool: (P,) int64, active clients, ascending.
        sizes, starts: (P,) int64, images of each, and the row of the batch where they begin.
        step: the one under way or just done.
        room: images that all clients may have together.
        current: its batch.
        used: (P',) int64, places in the pool of those whose latents are in it.
        online, momentum: the average halves that are handed out, by name; ``initial``, what they started from.
        images, drawn, contributed, activated: (N,) of every client, images it has (0 before it comes), images asked
            for, images since the last average, and whether it was ever active.
        counts: of late clients, bytes and so on.
    """

    def __init__(
        self,
        half: nn.Module,
        config: Config,
        settings: ServeSettings,
        shape: tuple[int, ...],
        channels: int,
        size: int,
        events: Events,
    ) -> None:
        self.config, self.settings, self.events = config, settings, events
        self.shape, self.channels, self.size = shape, channels, size
        self.frozen = config.clients.frozen
        self.views = 2 if config.contrast.both_views else 1
        self.layers = described(half)
        self.room: float = math.inf
        self.initial = {name: t.detach().cpu().clone() for name, t in half.state_dict().items()}
        self.online = {name: t.clone() for name, t in self.initial.items()}
        self.momentum = {name: t.clone() for name, t in self.initial.items()}
        self.mean, self.std = np.zeros(channels, np.float32), np.ones(channels, np.float32)
        self.begun = False
        number = config.clients.number
        self.drawn, self.contributed = np.zeros(number, np.int64), np.zeros(number, np.int64)
        self.activated, self.images = np.zeros(number, bool), np.zeros(number, np.int64)
        self.counts: Counter[str] = Counter()
        self.steps = self.round_steps = 2**62
        self.step = 0
        self.current: Batch | None = None
        self._generation = 0  # of the average
        self._packed: dict[tuple[bool, str], WeightsMessage] = {}
        self._batches: dict[int, Batch] = {}
        self._spare: list[tuple[Tensor, Tensor]] = []
        self._queue: deque[tuple[Session, Batch]] = deque()
        self._transit = 0
        self._collect_number = 0
        self._collected: dict[int, dict[str, NDArray]] = {}
        self._collect_from: set[int] = set()
        self._collected_at = -1
        self._collected_halves: Halves | None = None
        self._apart: dict[str, Tensor] = {}  # how far those halves had moved apart
        self._parameters = [name for name, _ in half.named_parameters()]
        self._combine = averaging(config.sync)
        kept = ("online.", "momentum.") if config.sync.momentum else ("online.",)
        self._specification: Specification = {
            part + name: (tuple(t.shape), str(t.dtype).removeprefix("torch."))
            for part in kept
            for name, t in self.initial.items()
        }
        image = 2 * self.views * 4 * int(np.prod(shape))  # bytes of its latents here
        traffic = config.traffic
        self._latents = Coder(traffic.latents, traffic.topk)
        self._gradients = {zstd: Coder(traffic.gradients, traffic.topk, zstd) for zstd in (False, True)}
        largest = (self.views, int(config.batches.max()), *shape)
        self._message = 2 * self._latents.size(largest)  # bytes of one client's latents under way
        self._ahead = min(settings.ahead, max(1, AHEAD // (image * config.step_images))) if self.frozen else 1
        self._most_transit = TRANSIT if image * config.step_images < LARGE else LARGE_TRANSIT
        self.seat_pool(np.arange(config.pool))
        weights = sum(t.numel() * 8 for t in self.initial.values()) * 2
        self.service = Service(settings, self, max(self._message, weights), events)

    async def start(self) -> None:
        """Begin to listen.

        Raises:
            RunError: the address or a certificate cannot be used.
        """
        self._changed = asyncio.Event()
        await self.service.start()

    async def gather(self, count: int, say: Callable[[int], None]) -> tuple[int, NDArray, NDArray]:
        """Wait for so many clients; see ``RemoteCohort.gather``."""
        said = -1
        while (there := len(self.service.sessions)) < count:
            if there != said:
                say(there)
                said = there
            await self._change(1.0)
        sessions = list(self.service.sessions.values())
        return pooled([Holding(s.images, s.sums, s.squares) for s in sessions], self.size)

    @property
    def need(self) -> int:
        """Clients without whose latents no step is made."""
        return self.config.needed(self.settings.quorum, self.settings.min_clients)

    def seat_pool(self, pool: NDArray[np.int64]) -> None:
        """Give every active client, (P,) int64 ascending, its place in the batch."""
        self.pool, self.used = pool, np.zeros(0, np.int64)
        self.sizes = np.array([self.config.batch_of(client) for client in pool.tolist()])
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.bounds = [(s, s + n) for s, n in zip(self.starts.tolist(), self.sizes.tolist(), strict=True)]
        self.seat = {int(client): place for place, client in enumerate(self.pool)}
        self._spare = []

    def rows(self) -> NDArray[np.int64]:
        """Rows of the batch whose latents are there."""
        seats = self.used
        sizes = self.sizes[seats]
        within = np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)
        return np.repeat(self.starts[seats], sizes) + within

    async def activate(self, pool: NDArray[np.int64]) -> None:
        """Start a round; clients that are away are replaced by others, drawn alike."""
        before = set(self.pool.tolist()) if self.activated.any() else set()
        present = np.array(sorted(self.service.sessions), np.int64)
        pool = with_stand_ins(self.config.seed, self.step, pool, present)
        for batch in self._batches.values():
            self._close(batch)
        self._batches.clear()
        self.contributed[:] = 0
        self.seat_pool(pool)
        if not self.config.clients.keep_optimizer:
            for client in set(pool.tolist()) - before:
                if (session := self.service.sessions.get(client)) is not None:
                    session.restart = True

    async def next_step(self) -> Batch:
        """One step: everybody is asked; whoever has answered in time is in the batch."""
        self.step += 1
        self.current = None
        try:
            self.current = await self._filled()
        except asyncio.CancelledError:
            self.step -= 1
            raise
        return self.current

    async def _filled(self) -> Batch:
        last = min(self.steps, ((self.step - 1) // self.round_steps + 1) * self.round_steps)
        for step in range(self.step, min(self.step + self._ahead, last + 1)):
            if step not in self._batches:
                self._batches[step] = self._open(step)
        for session in sorted(self.service.sessions.values(), key=lambda s: s.client):
            self._ask(session)
        batch = self._batches[self.step]
        deadline = time.monotonic() + self.settings.step_timeout
        while True:
            enough = batch.delivered.sum() >= self.need
            left = deadline - time.monotonic()
            if enough and (not batch.awaited or left <= 0):
                break
            if not enough and not batch.awaited:  # nobody who is there can be spared
                for session in self.service.sessions.values():
                    session.sits_out = 0
                    self._ask(session)
            if not enough and left <= 0:  # who hangs must not keep those behind from being asked
                self._send_orders(all_of_them=True)
            await self._change(max(left, 0.01) if enough else 1.0)
        self._close(batch)
        del self._batches[self.step]
        self.used = np.flatnonzero(batch.delivered)
        self.contributed[self.pool[self.used]] += self.sizes[self.used]
        return batch

    def _open(self, step: int) -> Batch:
        """An empty batch; its memory is that of an earlier one."""
        if self._spare:
            query, key = self._spare.pop()
        else:
            query, key = (torch.empty(self.views, int(self.sizes.sum()), *self.shape) for _ in range(2))
        seats = len(self.pool)
        return Batch(step, query, key, (query.numpy(), key.numpy()), np.full(seats, -1), np.zeros(seats, bool), set())

    def _close(self, batch: Batch) -> None:
        """Wait no longer for a step. Who owes its latents is late, and rests if that is not the first time."""
        for client in batch.awaited:
            session = self.service.sessions.get(client)
            if session is not None and batch.step in session.asked:
                session.misses += 1
                session.sits_out = batch.step + 2 ** min(session.misses, LONGEST_REST) - 1
                self._transit -= self._message
                self.counts["stragglers"] += 1
                self.events("straggler", client=client, step=batch.step)
        batch.awaited.clear()
        self._queue = deque(pair for pair in self._queue if pair[1] is not batch)
        self._spare.append((batch.query, batch.key))

    def _ask(self, session: Session) -> None:
        """Queue a client for all open steps that it has not been asked for, if it is active and owes nothing old."""
        seat = self.seat.get(session.client)
        late = bool(session.asked) and session.asked[0] < self.step
        if seat is None or not self.begun or late:
            return
        for batch in self._batches.values():
            asked = batch.delivered[seat] or session.client in batch.awaited
            if not asked and batch.step >= max(self.step, session.sits_out):
                batch.awaited.add(session.client)
                self._queue.append((session, batch))
        self._send_orders()

    def _send_orders(self, all_of_them: bool = False) -> None:
        """Ask those who queue, as many as the memory under way allows."""
        while self._queue and (
            all_of_them or self._transit <= 0 or self._transit + self._message <= self._most_transit
        ):
            session, batch = self._queue.popleft()
            if self.service.sessions.get(session.client) is not session:
                continue
            client, seat = session.client, self.seat[session.client]
            first = int(batch.first[seat])
            if first < 0:  # who comes back is asked for the same images
                first = batch.first[seat] = int(self.drawn[client])
                self.drawn[client] += self.sizes[seat]
            self._transit += self._message
            session.asked.append(batch.step)
            weights = self._due_weights(session)
            self.activated[client] = True
            session.send(partial(self._order, session, _taken(session), None, weights, (batch.step, first)))

    def _due_weights(self, session: Session) -> WeightsMessage | None:
        """The average, for a client that was not handed it yet or is to start afresh."""
        if session.generation == self._generation and not session.restart:
            return None
        if self.frozen:
            momentum = "none"
        elif self.config.sync.momentum:
            momentum = "momentum"
        elif session.has_momentum:
            momentum = "none"
        else:
            momentum = "online" if self.activated[session.client] else "initial"
        message = self._weights(session.restart, momentum)
        session.generation, session.has_momentum, session.restart = self._generation, True, False
        session.gradient = None  # of weights that are replaced
        return message

    def _weights(self, restart: bool, momentum: str) -> WeightsMessage:
        """The halves to hand out: one message for all clients. ``momentum`` names the half that is handed out as it."""
        if (message := self._packed.get((restart, momentum))) is None:
            tensors = {f"online.{name}": t.numpy() for name, t in self.online.items()}
            if momentum != "none":
                tensors |= {f"momentum.{name}": t.numpy() for name, t in getattr(self, momentum).items()}
            tensors |= {"mean": self.mean, "std": self.std}
            message = self._packed[restart, momentum] = pack_weights(tensors, restart=restart)
        return message

    def fingerprint(self) -> str:
        """Of the half that frozen clients are handed."""
        tensors = {f"online.{name}": t.numpy() for name, t in self.online.items()}
        return fingerprint(
            shown(self.layers, self.config, self.channels, self.size), tensors | {"mean": self.mean, "std": self.std}
        )

    def _order(
        self,
        session: Session,
        gradient: Gradient | None,
        collect: int | None,
        weights: WeightsMessage | None,
        draw: tuple[int, int] | None,
        order: Order,
    ) -> None:
        """Fill an order. The gradient is read only now, so that those that wait need no memory of their own."""
        if gradient is not None:
            order.gradients.step, order.gradients.lr, array = gradient
            zstd = session.zstd and self.config.traffic.zstd
            self._gradients[zstd].pack_into(order.gradients.query, array)
            self.counts["tensor_bytes_out"] += len(order.gradients.query.data)
        if collect is not None:
            order.collect.number = collect
        if weights is not None:
            order.weights.CopyFrom(weights)
            self.counts["tensor_bytes_out"] += sum(len(t.data) for t in weights.tensors.values())
        if draw is not None:
            order.draw.step, order.draw.first = draw

    def note_gradients(self, lr: float) -> None:
        """The gradients now lie where the latents of the step were: they go out with their clients' next orders."""
        assert self.current is not None
        array, step = self.current.arrays[0], self.current.step
        for seat in self.used.tolist():
            session = self.service.sessions.get(int(self.pool[seat]))
            if session is not None and session.delivered == step:  # else it has come back, and begins anew
                first, last = self.bounds[seat]
                session.gradient = (step, lr, array[:, first:last])

    async def synchronise(self) -> dict[str, Tensor]:
        """Average, and hand the average out with the next orders; see ``Cohort.synchronise``."""
        halves = await self.collect()
        self.contributed[:] = 0
        if halves is None:
            return {}
        self.online, self.momentum = halves
        self._generation += 1
        self._packed.clear()
        return self._apart

    async def used_draws(self) -> NDArray[np.int64]:
        """(N,) int64, ``drawn`` without those asked for ahead of time, which are asked for again after a resume."""
        used = self.drawn.copy()
        for batch in self._batches.values():
            asked = batch.first >= 0
            used[self.pool[asked]] -= self.sizes[asked]
        return used

    async def collect(self) -> Halves | None:
        """Average the halves of those who took part since the last average; None if nobody has moved or answers."""
        if self.frozen or not self.contributed.any():
            return None
        if self._collected_at == self.step:
            return self._collected_halves
        number = self._collect_number = self._collect_number + 1
        self._collected, self._collect_from = {}, set()
        for session in self.service.sessions.values():
            current = session.generation == self._generation and not session.asked and session.collecting is None
            if current and self.contributed[session.client]:
                session.collecting = number
                self._collect_from.add(session.client)
                session.send(partial(self._order, session, _taken(session), number, None, None))
        deadline = time.monotonic() + self.settings.step_timeout
        while self._collect_from and (left := deadline - time.monotonic()) > 0:
            await self._change(left)
        if self._collect_from:
            self.counts["not_averaged"] += len(self._collect_from)
            self.events("not averaged", clients=sorted(self._collect_from))
            self._collect_from = set()
        self._collected_at, self._collected_halves = self.step, await asyncio.to_thread(self._averaged)
        return self._collected_halves

    def _averaged(self) -> Halves | None:
        if not self._collected:
            self.events("no average", why="no client sent its weights")
            return None
        clients = sorted(self._collected)
        weights = torch.from_numpy(self.contributed[clients].astype(np.float32))
        means, deviations = {}, {}
        for name in self._specification:
            stack = torch.from_numpy(np.stack([self._collected[c][name] for c in clients]))
            means[name] = self._combine(stack, weights)
            half, _, parameter = name.partition(".")
            if half == "online" and parameter in self._parameters:
                deviations[parameter] = stack.sub_(means[name])
        of = {name: means[f"online.{name}"] for name in deviations}
        self._apart = {name: values.mean() for name, values in divergence(deviations, of).items()}
        self._collected = {}
        halves = tuple(
            {name.partition(".")[2]: mean for name, mean in means.items() if name.startswith(part)}
            for part in ("online.", "momentum.")
        )
        return halves[0], halves[1] or self.momentum

    # The door's host (service.Host)

    def welcome(self, client: int, capabilities: frozenset[str]) -> Welcome:
        """The settings for a client."""
        config, traffic = self.config, self.config.traffic
        if not self.frozen and "learn" not in capabilities:
            raise Refused(Goodbye.REFUSED, "this run needs clients that learn, and the client cannot")
        codecs = {traffic.latents} if self.frozen else {traffic.latents, traffic.gradients}
        if lacking := codecs - capabilities - {"fp32"}:
            raise Refused(
                Goodbye.REFUSED,
                f"latents and gradients of this run travel as {' and '.join(sorted(lacking))}, which the client does "
                "not know",
            )
        if client >= config.clients.number:
            raise Refused(
                Goodbye.REFUSED, f"there is no client {client}: the run has {config.clients.number} (clients.number)"
            )
        told = client_settings(config, self.layers, self.initial, self.channels, self.size, config.batch_of(client))
        told["traffic"]["zstd"] &= "zstd" in capabilities
        told["images"] = int(self.images[client]) if config.recalls else 0
        return Welcome(client=client, settings=json.dumps(told), heartbeat=self.settings.heartbeat, frozen=self.frozen)

    def free_number(self) -> int:
        """The lowest number that no client has."""
        taken = self.service.taken
        for client in range(self.config.clients.number):
            if client not in taken:
                return client
        raise Refused(Goodbye.BUSY, f"all {self.config.clients.number} clients are there (clients.number)")

    def check_ready(self, ready: Ready) -> None:
        """Pixel statistics must be those of some images."""
        Holding(ready.images, ready.sums, ready.squares).check(self.channels, self.size)

    def entered(self, session: Session) -> None:
        """A client has joined: it is asked at once if a step is under way.

        Raises:
            Refused: it has come back with another number of images, and its latents are being kept.
        """
        before = int(self.images[session.client])
        if before == 0 and self.images.sum() + session.images > self.room:
            raise Refused(
                Goodbye.REFUSED,
                f"the server keeps latents of each image, and has no room for those of {session.images:,} more",
            )
        if self.config.recalls and before not in (0, session.images):
            raise Refused(
                Goodbye.REFUSED,
                f"client {session.client} was here with {before:,} images and now has {session.images:,}; the server "
                "keeps latents of each, so they must stay the same",
            )
        self.images[session.client] = session.images
        self._ask(session)
        self._changed.set()

    def received(self, session: Session, message: ClientMessage) -> None:
        """Latents or weights, as ordered."""
        if message.WhichOneof("kind") == "latents":
            self._take_latents(session, message.latents)
        else:
            self._take_weights(session, message.weights)

    def _take_latents(self, session: Session, message: LatentsMessage) -> None:
        if not session.asked:
            raise Violation("latents that nobody asked for")
        if message.step != session.asked[0]:
            raise Violation(f"latents of step {message.step}, and step {session.asked[0]} comes first")
        client, batch = session.client, self._batches.get(message.step)
        shape = (self.views, self.config.batch_of(client), *self.shape)
        pieces = [
            unpack_latents(tensor, shape, self.settings.max_latent, name, self._latents)
            for tensor, name in ((message.query, "query latents"), (message.key, "key latents"))
        ]
        self.counts["tensor_bytes_in"] += len(message.query.data) + len(message.key.data)
        session.asked.popleft()
        if batch is None or client not in batch.awaited:
            self.counts["late"] += 1
            self.events("late", client=client, step=message.step)
            self._ask(session)
            return
        self._transit -= self._message
        seat = self.seat[client]
        first, last = self.bounds[seat]
        for buffer, piece in zip(batch.arrays, pieces, strict=True):
            buffer[:, first:last] = piece
        batch.delivered[seat] = True
        batch.awaited.discard(client)
        session.delivered, session.misses = batch.step, 0
        self.counts["latents"] += 1
        self._send_orders()
        if not batch.awaited:
            self._changed.set()

    def _take_weights(self, session: Session, message: WeightsMessage) -> None:
        if session.collecting is None:
            raise Violation("weights that nobody asked for")
        if message.number != session.collecting:
            raise Violation(f"weights of collection {message.number} instead of {session.collecting}")
        arrays = unpack_weights(message, self._specification)
        check_weights(arrays, {"online": self.online, "momentum": self.momentum})
        self.counts["tensor_bytes_in"] += sum(array.nbytes for array in arrays.values())
        session.collecting = None
        if session.client not in self._collect_from:
            self.counts["late"] += 1
            return
        self._collected[session.client] = arrays
        self._collect_from.discard(session.client)
        if not self._collect_from:
            self._changed.set()

    def gone(self, session: Session) -> None:
        """A client has left: nothing of it is waited for."""
        for batch in self._batches.values():
            if session.client in batch.awaited:
                batch.awaited.discard(session.client)
                if batch.step in session.asked:
                    self._transit -= self._message
        self._collect_from.discard(session.client)
        self.events("left", client=session.client)
        self._send_orders()
        self._changed.set()

    async def _change(self, seconds: float) -> None:
        """Wait until something has happened, at most so long."""
        self._changed.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), seconds)


def _taken(session: Session) -> Gradient | None:
    """The gradient that a client is still to be sent; it is sent once."""
    gradient, session.gradient = session.gradient, None
    return gradient
