"""The clients of a run as Flower's nodes: one message asks each for the latents of many steps."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray
from torch import Tensor, nn

from mocosfl.clients import Latents, Stopped
from mocosfl.config import Config
from mocosfl.data.sampler import pool_of_round, with_stand_ins
from mocosfl.errors import RunError
from mocosfl.flower import records
from mocosfl.flower.records import JOIN, LATENTS, natives, understood, who
from mocosfl.flower.settings import FlowerSettings
from mocosfl.models.description import described, shown
from mocosfl.network.claims import Holding, pooled
from mocosfl_device.wire import Coder, Violation, fingerprint

PAUSE = 0.5
"""Seconds between two looks at what has come."""
PULLS = 8
"""Calls that fetch answers at the same time. One whose node dies while it sends blocks for minutes."""
RETRY = 30.0
"""Seconds after which a node that could not join is asked again."""
LONGEST_REST = 7
"""A client that fails n > 1 times in a row is left out of the chunk and of the next 2^(n-2) - 1; n counts to this
many."""
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError)
"""What Flower raises when it cannot put an answer together again."""


@dataclass(eq=False)
class Chunk:
    """Steps that one message to each client covers.

    Attributes:
        start, stop: the first of them, counted from 0, and the one after the last.
        pool: (P,) int64, clients that may take part, ascending.
        answers: what came, by client: draw of the first image, and query and key latents, (V, n, ...) float32.
        query, key: (V, steps, n, ...) float32, of all clients, when the chunk is closed.
        clients, sizes, first: (P',) int64, of those that are in it, images of each in a step, and its first draw.
    """

    start: int
    stop: int
    pool: NDArray[np.int64]
    answers: dict[int, tuple[int, NDArray[np.float32], NDArray[np.float32]]] = field(default_factory=dict)
    query: Tensor = field(default_factory=lambda: torch.empty(0))
    key: Tensor = field(default_factory=lambda: torch.empty(0))
    clients: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    sizes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    first: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def close(self) -> None:
        """Lay the answers side by side, step after step."""
        steps, order = self.stop - self.start, sorted(self.answers)
        pieces = [self.answers.pop(client) for client in order]
        self.clients, self.first = np.array(order), np.array([first for first, _, _ in pieces])
        self.sizes = np.array([query.shape[1] // steps for _, query, _ in pieces])

        def beside(arrays: list[NDArray[np.float32]]) -> Tensor:
            apart = [array.reshape(len(array), steps, -1, *array.shape[2:]) for array in arrays]
            return torch.from_numpy(np.concatenate(apart, axis=2))

        self.query, self.key = beside([query for _, query, _ in pieces]), beside([key for _, _, key in pieces])


@dataclass(frozen=True, eq=False)
class Asked:
    """A message that was sent.

    Attributes:
        node: whom.
        since: when, ``time.monotonic``.
        client: which client it is; None if it was asked just that.
        first: draw of the first image.
        chunk: for which the answer is.
    """

    node: int
    since: float
    client: int | None = None
    first: int = 0
    chunk: Chunk | None = None


Question = tuple[Asked, Message]
"""A message that is to be sent."""


class FlowerCohort:
    """Frozen clients under Flower (``clients.Cohort``).

    One message asks each client for the latents of a chunk: many steps. While the server trains from one chunk the
    clients compute the next. A chunk is complete when everybody who was asked has answered or failed, or when the
    quorum has and ``timeout`` is over. Whoever fails (an error, an answer that is not used, silence, a node that is
    gone), and fails again when asked again, is left out of the chunk; its images wait for the next one. An answer that
    comes when its chunk is over serves the next one.

    Nodes are looked for all the time. Each is asked who it is: the number of a client, images, sums of their pixels. A
    node that comes back under another id takes its client over. Nodes keep nothing between two messages, so each
    message holds the half too. A thread attends to all that, so that no slow upload holds the training up.

    Args:
        half: the client half, initialised.
        config: the whole configuration.
        settings: how to wait.
        grid: Flower's nodes.
        shape: of one image's latent.
        channels, size: of the images.
        device: where the server computes.
        say: told what happens, a line each.

    Attributes:
        images, drawn: (N,) int64, of every client: images it has (0 before it comes), and images used so far or in the
            current chunk.
        nodes: node of each client that is there.
        step: steps so far.
        counts: of failed messages, bytes and so on.
    """

    kind: ClassVar[str] = LATENTS
    """Type of the messages that ask for a chunk."""
    prefetch: ClassVar[bool] = True
    """Whether the next chunk is asked for while the server trains from this one."""

    def __init__(
        self,
        half: nn.Module,
        config: Config,
        settings: FlowerSettings,
        grid: Grid,
        shape: tuple[int, ...],
        channels: int,
        size: int,
        device: torch.device,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.settings, self.grid, self.device, self.say = config, settings, grid, device, say
        self.shape, self.channels, self.size = shape, channels, size
        self.views = 2 if config.contrast.both_views else 1
        self.online = {name: t.detach().cpu().clone() for name, t in half.state_dict().items()}
        self.layers = described(half)
        self.mean, self.std = np.zeros(channels, np.float32), np.ones(channels, np.float32)
        number = config.clients.number
        self.images, self.drawn = np.zeros(number, np.int64), np.zeros(number, np.int64)
        self.holdings: dict[int, Holding] = {}
        self.nodes: dict[int, int] = {}
        self.counts: Counter[str] = Counter()
        self.waited = 0.0
        self.round_trips, self.round_trip_seconds = 0, 0.0
        self.step, self.steps, self.round_steps = 0, 2**62, 2**62
        self._room = math.inf
        self._coder = Coder(config.traffic.latents, config.traffic.topk, config.traffic.zstd)
        told = config.updated({"data.size": size, "data.channels": channels, "clients.init": None})
        self._told = ConfigRecord({"settings": told.model_dump_json()})
        self._there: set[int] = set()
        self._asked: dict[str, Asked] = {}
        self._sending: list[Asked] = []  # what is on its way to the SuperLink
        self._retry: dict[int, float] = {}  # nodes that could not join, and when they are asked again
        self._claims: dict[int, int] = {}  # nodes that have said themselves which client they are
        self._failures: Counter[int] = Counter()  # of each client, in a row
        self._rests: dict[int, int] = {}  # until which step a client is left alone
        self._current: Chunk | None = None
        self._coming: Chunk | None = None
        self._pulls: dict[Future[list[Message]], list[str]] = {}
        self._alone: set[str] = set()  # messages whose answers are fetched one by one
        self._pool = ThreadPoolExecutor(PULLS, "mocosfl flower pull")
        self._changed = threading.Condition()  # held by whoever reads or changes what both threads use
        self._over = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._serve, name="mocosfl flower", daemon=True)
        self._stopping: Callable[[], bool] = lambda: False

    # The run

    def start(self) -> None:
        """Begin to look for nodes."""
        self._thread.start()

    def stop(self) -> None:
        """Leave the nodes alone."""
        self._over.set()
        self._thread.join(10 * PAUSE)  # it may wait for a SuperLink that is gone
        self._pool.shutdown(wait=False, cancel_futures=True)

    def gather(self, count: int, say: Callable[[int], None] = lambda present: None) -> tuple[int, NDArray, NDArray]:
        """Wait until so many clients have joined.

        Args:
            count: clients to wait for.
            say: told how many there are, when that changes.

        Returns:
            Their images, and the mean and standard deviation of each channel over all of them, in [0, 1].

        Raises:
            RunError: fewer came within ``give-up`` seconds.
        """
        said, began = -1, time.monotonic()
        with self._changed:
            while True:
                if self.present != said:
                    said = self.present
                    say(said)
                if said >= count:
                    return pooled([self.holdings[client] for client in sorted(self.nodes)], self.size)
                if time.monotonic() - began > self.settings.give_up:
                    raise RunError(
                        f"{said} of {count} clients have joined within {self.settings.give_up:g} s (give-up); start "
                        "more SuperNodes, or lower min-clients"
                    )
                self._wait()

    def begin(self, mean: NDArray, std: NDArray) -> None:
        """Let the clients start; images are normalised with these, (C,)."""
        self.mean, self.std = mean.astype(np.float32), std.astype(np.float32)

    def admit(self, images: float) -> None:
        """So many images may all clients have together."""
        self._room = images

    def follow(self, steps: int, round_steps: int | None, stopping: Callable[[], bool]) -> None:
        """What the cohort needs to know of the run.

        Args:
            steps: of the run; nobody is asked for more.
            round_steps: of a round, where pools are sampled; a chunk ends with it.
            stopping: asked while waiting: when true, waiting ends with ``Stopped``.
        """
        self.steps, self.round_steps, self._stopping = steps, round_steps or 2**62, stopping

    def stop_asking(self) -> None:
        """Nothing more will be asked. Flower's nodes need not be told."""
        with self._changed:
            self.drawn, self._current = self._used(), None  # its memory
            self.steps, self._coming = self.step, None
        for client in np.flatnonzero(self.drawn < self.images):
            self.say(
                f"client {client}: latents of {self.images[client] - self.drawn[client]:,} of its "
                f"{self.images[client]:,} images have not come; the rest of the run goes without them"
            )

    @property
    def present(self) -> int:
        """Clients that are there."""
        return len(self.nodes)

    def fingerprint(self) -> str:
        """Of the half that clients are handed."""
        return fingerprint(shown(self.layers, self.config, self.channels, self.size), self._weights())

    # The cohort, called by the training loop

    def activate(self, pool: NDArray[np.int64]) -> None:
        """Nothing: a chunk ends with its round, and its clients are drawn when it is opened."""

    def forward(self) -> Latents:
        """Latents of the next step; see ``Cohort.forward``. Waits where a chunk begins.

        Raises:
            Stopped: ``follow``'s ``stopping`` said so before the quorum was reached.
            RunError: the quorum was not reached within ``give-up`` seconds.
        """
        if self._current is None or self.step >= self._current.stop:
            self._current = None  # its memory
            with self._changed:
                self._current = self._filled()
        chunk = self._current
        at = self.step - chunk.start
        self.step += 1
        query, key = (t[:, at].to(self.device) for t in (chunk.query, chunk.key))
        first = chunk.first + at * chunk.sizes
        return Latents(query, key, chunk.clients, chunk.sizes, first, (query.shape[1],), learning=False)

    def backward(self, gradients: Tensor, lr: float) -> dict[str, Tensor]:
        """Never called: no client is sent a gradient."""
        raise RuntimeError("clients under Flower take no gradient")

    def synchronise(self) -> dict[str, Tensor]:
        """Nothing: all halves are the same."""
        return {}

    def average(self) -> dict[str, Tensor]:
        """The half as a state dict."""
        return self.online

    def state_dict(self) -> dict[str, Any]:
        """The half and the counters. Latents of steps that are not done yet are asked for again."""
        return {"online": self.online, "drawn": torch.from_numpy(self._used()), "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``'s result."""
        self.online = {name: tensor.clone() for name, tensor in state["online"].items()}
        self.drawn, self.step = state["drawn"].numpy().copy(), state["step"]

    # Chunks

    def _used(self) -> NDArray[np.int64]:
        """(N,) int64, images of each client that were used so far."""
        drawn = self.drawn.copy()
        if (chunk := self._current) is not None:
            drawn[chunk.clients] -= (chunk.stop - self.step) * chunk.sizes
        return drawn

    def _length(self) -> int:
        """Steps of a chunk."""
        if self.settings.steps:
            return self.settings.steps
        step = 2 * self.views * 4 * math.prod(self.shape) * self.config.step_images
        return max(1, int(self.settings.memory * 2**20 // step))

    def _open(self, start: int) -> Chunk:
        """An empty chunk."""
        config = self.config
        round_ = start // self.round_steps
        stop = min(start + self._length(), self.steps, (round_ + 1) * self.round_steps)
        pool = pool_of_round(config.seed, round_, config.clients.number, config.pool, config.rich, config.pool_rich)
        return Chunk(start, stop, with_stand_ins(config.seed, start, pool, np.array(sorted(self.nodes), np.int64)))

    @property
    def need(self) -> int:
        """Clients without whose answers the run waits."""
        return self.config.needed(self.settings.quorum, self.settings.min_clients)

    def _filled(self) -> Chunk:
        """The next chunk, when all who were asked have answered or failed; the one after it is asked for."""
        if self._coming is None:
            self._coming = self._open(self.step)
        chunk, began = self._coming, time.monotonic()
        while True:
            enough = len(chunk.answers) >= self.need
            latest = time.monotonic() - self.settings.timeout if enough else -math.inf
            under_way = [asked for asked in (*self._asked.values(), *self._sending) if asked.chunk is chunk]
            waiting = any(asked.since > latest for asked in under_way)
            # a client that is asked afresh again and again, node after node, must not keep the chunk open
            if enough and (not waiting or time.monotonic() - began > self.settings.timeout):
                break
            if self._stopping():
                raise Stopped
            if not enough and not waiting:
                self._rests.clear()  # nobody who is there can be spared
            if not enough and time.monotonic() - began > self.settings.give_up:
                raise RunError(
                    f"{len(chunk.answers)} of {self.config.pool} clients have answered within "
                    f"{self.settings.give_up:g} s (give-up), and {self.need} must; start more SuperNodes, or lower "
                    "min-clients or quorum"
                )
            self._wait()
        self.waited += time.monotonic() - began
        for asked in under_way:  # its client is left alone until the answer is there
            self._blame(asked, f"no answer within {self.settings.timeout:g} s (timeout)")
        self._closed(chunk)
        self.drawn[chunk.clients] += (chunk.stop - chunk.start) * chunk.sizes
        self.counts["chunks"] += 1
        self.counts["answers"] += len(chunk.clients)
        self._coming = self._open(chunk.stop) if self.prefetch and chunk.stop < self.steps else None
        return chunk

    def _closed(self, chunk: Chunk) -> None:
        chunk.close()

    # The nodes

    def _serve(self) -> None:
        """The thread: attend until it is over."""
        try:
            while not self._over.is_set():
                there = set(self.grid.get_node_ids())
                with self._changed:
                    questions = self._attend(there)
                    self._sending = [asked for asked, _ in questions]
                    self._changed.notify_all()
                self._send(questions)
                self._over.wait(PAUSE)
        except Exception as error:  # whatever the connection to the SuperLink raises: the run must hear of it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _wait(self) -> None:
        """Wait until the thread has attended again.

        Raises:
            RunError: it cannot any more.
        """
        self._changed.wait(1.0)
        if self._error is not None:
            raise RunError(f"Flower's nodes cannot be reached any more: {self._error!r}") from self._error

    def _attend(self, there: set[int]) -> list[Question]:
        """Take in who is there and what has come; returns what to ask those who are free."""
        now, self._there = time.monotonic(), there
        self._claims = {node: client for node, client in self._claims.items() if node in there}
        for client, node in list(self.nodes.items()):
            if node not in self._there:
                del self.nodes[client]
                self.counts["left"] += 1
                self.say(f"client {client} is gone (node {node})")
        self._fetch()
        for identifier, asked in list(self._asked.items()):
            if asked.node not in self._there:
                self._failed(self._asked.pop(identifier), "its node is gone")
            elif now - asked.since > self.settings.give_up:
                self._failed(self._asked.pop(identifier), f"no answer within {self.settings.give_up:g} s (give-up)")
        questions = self._ask_who(now)
        if self._coming is not None:
            questions += self._ask(self._coming)
        return questions

    def _fetch(self) -> None:
        """Take in what was fetched, and have more of it fetched."""
        for pull in [pull for pull in self._pulls if pull.done()]:
            identifiers = self._pulls.pop(pull)
            try:
                replies = pull.result()
            except UNREADABLE as error:
                if isinstance(error, OSError):  # a certificate that is not accepted is a ValueError too
                    raise
                self._unreadable(identifiers, error)
                continue
            self._alone.difference_update(identifiers)
            for reply in replies:
                if (asked := self._asked.pop(reply.metadata.reply_to_message_id, None)) is not None:
                    self._take(asked, reply)
        fetched = {identifier for identifiers in self._pulls.values() for identifier in identifiers}
        left, free = [identifier for identifier in self._asked if identifier not in fetched], PULLS - len(self._pulls)
        groups = [[identifier] for identifier in left if identifier in self._alone][:free]
        together, free = [identifier for identifier in left if identifier not in self._alone], free - len(groups)
        groups += [together[place::free] for place in range(min(free, len(together)))]
        for group in groups:
            self._pulls[self._pool.submit(self._pull, group)] = group

    def _unreadable(self, identifiers: list[str], error: Exception) -> None:
        """An answer cannot be put together: find out which. Those that came with it may be lost, and fail then too."""
        if len(identifiers) > 1:
            self._alone.update(identifiers)
            return
        self._alone.discard(identifiers[0])
        if (asked := self._asked.pop(identifiers[0], None)) is not None:
            self._failed(asked, f"an answer that cannot be read: {error!r}"[:300])

    def _pull(self, identifiers: list[str]) -> list[Message]:
        return list(self.grid.pull_messages(identifiers))

    def _take(self, asked: Asked, reply: Message) -> None:
        """Take an answer in, if it is a good one."""
        if reply.has_error():
            self._failed(asked, reply.error.reason or f"error {reply.error.code}")
            return
        try:
            if asked.client is None:
                self._join(asked, *understood(lambda: who(reply.content)))
            else:
                self.round_trips += 1
                self.round_trip_seconds += time.monotonic() - asked.since
                if asked.chunk is not self._coming:
                    self.counts["late"] += 1
                    asked = self._for_coming(asked)
                if asked.chunk is self._coming:
                    self._answered(asked, reply)
                assert asked.client is not None
                self._failures[asked.client] = 0
                self._rests.pop(asked.client, None)
        except Violation as error:
            self._failed(asked, str(error))

    def _for_coming(self, asked: Asked) -> Asked:
        """A message whose chunk is over, as one for the chunk that is coming if its answer does for that as well."""
        late, coming, client = asked.chunk, self._coming, asked.client
        if not self.prefetch or coming is None:  # a client that learns has learned from what is out of date
            return asked
        assert late is not None
        assert client is not None
        length = late.stop - late.start
        wanted = client in coming.pool and client not in coming.answers and asked.first == self.drawn[client]
        return replace(asked, chunk=coming) if wanted and length == coming.stop - coming.start else asked

    def _failed(self, asked: Asked, why: str) -> None:
        """Nothing came of a message."""
        if asked.client is None:
            self._retry[asked.node] = time.monotonic() + RETRY
            self.say(f"node {asked.node} cannot join: {why}")
            return
        if asked.chunk is self._coming:
            self._blame(asked, why)

    def _blame(self, asked: Asked, why: str) -> None:
        """A client has failed. The first time it is asked again at once, then it rests."""
        client, chunk = asked.client, asked.chunk
        assert client is not None
        assert chunk is not None
        self.counts["failures"] += 1
        self._failures[client] += 1
        if self._failures[client] > 1:
            rest = 2 ** (min(self._failures[client], LONGEST_REST) - 2) - 1
            self._rests[client] = chunk.stop + rest * (chunk.stop - chunk.start)
        self.say(f"client {client} has failed: {why}")

    def _question(self, asked: Asked, content: RecordDict, kind: str) -> Question:
        return asked, Message(content, asked.node, kind, ttl=self.settings.give_up, group_id=str(self.counts["chunks"]))

    def _send(self, questions: list[Question]) -> None:
        """Send messages. The lock is not held: a SuperLink that is gone holds nobody up but the thread."""
        if not questions:
            return
        accepted = set(self.grid.push_messages([message for _, message in questions]))
        with self._changed:
            self._sending = []
            for asked, message in questions:
                if (identifier := message.metadata.message_id) in accepted:
                    self._asked[identifier] = asked
                    continue
                if not self.counts["refused"]:
                    self.say(f"the SuperLink has not accepted a message to node {asked.node}; it is sent again")
                self.counts["refused"] += 1
            self._changed.notify_all()

    def _ask_who(self, now: float) -> list[Question]:
        """What to ask nodes that are not known yet: who they are."""
        known = set(self.nodes.values()) | {asked.node for asked in self._asked.values()}
        # two nodes with one number would displace each other for ever: the first is left alone while the other is there
        known |= {node for node, client in self._claims.items() if client in self.nodes}
        new = sorted(node for node in self._there - known if self._retry.get(node, now) <= now)
        return [self._question(Asked(node, now), RecordDict({"run": self._told}), JOIN) for node in new]

    def _join(self, asked: Asked, client: int | None, holding: Holding) -> None:
        """A node has said who it is.

        Raises:
            Violation: it cannot take part.
        """
        number = self.config.clients.number
        holding.check(self.channels, self.size)
        claimed = client is not None
        if client is None:
            if self.config.recalls:  # it might be given the latents of another's images
                raise Violation(
                    "the server keeps latents of each image, so a node must say which client it is (client=NUMBER of "
                    "--node-config)"
                )
            free = [client for client in range(number) if client not in self.nodes]
            if not free:
                raise Violation(f"all {number} clients are there (clients.number)")
            client = free[0]
        if not 0 <= client < number:
            raise Violation(f"there is no client {client}: the run has {number} (clients.number)")
        before = int(self.images[client])
        if before == 0 and self.images.sum() + holding.images > self._room:
            raise Violation(f"the server keeps latents of each image, and has no room for {holding.images:,} more")
        if self.config.recalls and before not in (0, holding.images):
            raise Violation(
                f"client {client} was here with {before:,} images and now has {holding.images:,}; the server keeps "
                "latents of each, so they must stay the same"
            )
        if (node := self.nodes.get(client)) is not None:
            self.say(f"client {client} has moved from node {node} to {asked.node}")
            for identifier, other in list(self._asked.items()):
                if other.client == client:
                    del self._asked[identifier]
        if claimed:
            self._claims[asked.node] = client
        self.nodes[client], self.holdings[client], self.images[client] = asked.node, holding, holding.images
        self._failures[client] = 0
        self._rests.pop(client, None)
        self.counts["joined"] += 1

    def _ask(self, chunk: Chunk) -> list[Question]:
        """What to ask those who are free: their part of a chunk."""
        now, busy = time.monotonic(), {asked.client for asked in self._asked.values()}
        free = [
            client
            for client in chunk.pool.tolist()
            if client in self.nodes
            and client not in busy
            and client not in chunk.answers
            and self._rests.get(client, 0) <= chunk.start
        ]
        if not free:
            return []
        common = self._content(chunk)
        questions = []
        for client in free:
            first = int(self.drawn[client])
            count = (chunk.stop - chunk.start) * self.config.batch_of(client)
            own = ConfigRecord({"client": client, "first": first, "images": count})
            content = RecordDict({**common, "ask": own})
            asked = Asked(self.nodes[client], now, client, first, chunk)
            questions.append(self._question(asked, content, self.kind))
        return questions

    def _weights(self) -> dict[str, NDArray]:
        """What clients compute with, by name."""
        online = {f"online.{name}": t.numpy() for name, t in self.online.items()}
        return online | {"mean": self.mean, "std": self.std}

    def _content(self, chunk: Chunk) -> dict[str, Any]:
        """What a message holds for all clients alike."""
        return {"run": self._told, "arrays": natives(self._weights())}

    def _answered(self, asked: Asked, reply: Message) -> None:
        """A client has answered.

        Raises:
            Violation: the answer cannot be used.
        """
        client, chunk = asked.client, asked.chunk
        assert client is not None
        assert chunk is not None
        count = (chunk.stop - chunk.start) * self.config.batch_of(client)
        record: Any = understood(lambda: reply.content["latents"])
        shape = (self.views, count, *self.shape)
        query, key = understood(lambda: records.decoded(record, shape, self.settings.max_latent, self._coder))
        self.counts["bytes_in"] += sum(len(record[name].data) for name in ("query", "key"))
        chunk.answers[client] = asked.first, query, key


def settings_of(content: RecordDict) -> Config:
    """The settings that a message holds.

    Raises:
        SettingError: they are not understood.
    """
    return Config(**json.loads(records.text(content, "run", "settings")))
