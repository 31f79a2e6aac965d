"""A client's side of the conversation: joins, obeys orders, and comes back when the connection is lost.

What the client computes is a ``Worker``'s business; nothing here needs torch.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

import grpc
import numpy as np
from numpy.typing import NDArray

from mocosfl_device import __version__
from mocosfl_device.codecs import NAMES
from mocosfl_device.errors import MocosflError, RunError, SettingError
from mocosfl_device.protocol_pb2 import (
    ClientMessage,
    Goodbye,
    Heartbeat,
    Join,
    Latents,
    Order,
    Ready,
    ServerMessage,
    Welcome,
)
from mocosfl_device.settings import JoinSettings, address, is_own
from mocosfl_device.sockets import bytes_of, hold
from mocosfl_device.wire import (
    METHOD,
    PROTOCOL,
    Coder,
    Refused,
    Violation,
    channel_options,
    describe,
    fingerprint,
    from_server,
    goodbye,
    pack_weights,
    unpack_weights,
)

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds before a lost connection is tried again: the first time, and at most."""
LARGEST = 2**30
"""Bytes of the largest message that the server may send: weights of a client half."""
HELLO_SECONDS = 20.0
"""A server that has not said anything by then is not one."""
INBOX = 4
"""Messages of the server that wait while the worker is busy, at most."""
LOST = (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError)
"""What gRPC raises when a connection is gone."""


P = ParamSpec("P")
R = TypeVar("R")


class Worker(Protocol):
    """What a client computes. All methods may take long; they are called one at a time, in a thread."""

    capabilities: tuple[str, ...]
    """``learn``, ``forward``."""
    description: Mapping[str, Any]
    """All that ``wire.fingerprint`` covers besides the weights, as it is computed; from ``prepare`` on."""

    @property
    def images(self) -> int:
        """That the client holds."""

    def prepare(self, welcome: Welcome) -> tuple[int, list[int], list[int]]:
        """Decode the images and build the half. Returns the number of images, and each channel's sum and sum of
        squares of all pixels, 0 to 255."""

    def specification(self, names: frozenset[str]) -> Mapping[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of the weights of these names. Raises ``Violation`` for a name that it does not know."""

    def take(self, weights: Mapping[str, NDArray], restart: bool) -> None:
        """Take weights over; forget the optimiser's momentum if ``restart``."""

    def draw(self, step: int, first: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Query and key latents, (V, B, ...), of the images that draws from ``first`` on fall on."""

    def learn(self, step: int, gradient: NDArray[np.float32], lr: float) -> None:
        """One step with the gradient at the query latents of that step."""

    def weights(self) -> Mapping[str, NDArray]:
        """The weights that are averaged, by name."""


@dataclass
class Traffic:
    """Bytes of one client.

    Attributes:
        sent, received: across the socket, as the operating system counts them: TLS, HTTP/2 and all. Without TCP's own
            headers. Zero where it does not tell.
        tensors_sent, tensors_received: of numbers alone.
    """

    sent: int = 0
    received: int = 0
    tensors_sent: int = 0
    tensors_received: int = 0


@dataclass(eq=False)
class Client:
    """One client.

    Args:
        settings: where the server is, and how to reach it.
        worker: computes.
        say: told what happens, a line each.
        largest: bytes of the largest message that the server may send.

    Attributes:
        traffic: bytes so far.
        steps: latents sent so far.
    """

    settings: JoinSettings
    worker: Worker
    say: Callable[[str], None]
    largest: int = LARGEST
    traffic: Traffic = field(default_factory=Traffic)
    steps: int = 0
    _ready: bool = False

    def run(self) -> None:
        """Take part until the run is over. Ctrl-C and SIGTERM tell the server before they end it.

        Raises:
            RunError: the server does not want this client, or was not there for ``give_up`` seconds.
            KeyboardInterrupt: it was asked to stop.
        """

        async def main() -> None:
            # One thread for the worker: each would have memory of its own.
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
            task = asyncio.ensure_future(self.take_part())
            for number in (signal.SIGINT, signal.SIGTERM):
                with suppress(NotImplementedError, ValueError, RuntimeError):  # Windows; not the main thread
                    asyncio.get_running_loop().add_signal_handler(number, task.cancel)
            try:
                await task
            except asyncio.CancelledError:
                raise KeyboardInterrupt from None

        asyncio.run(main())

    async def take_part(self) -> None:
        """``run``, in a loop that exists."""
        wait, lost = FIRST_WAIT, time.monotonic()
        while True:
            self._ready = False
            try:
                await self._connect()
                return
            except Refused as refusal:
                why = refusal.goodbye
                if why.code not in (Goodbye.BUSY, Goodbye.STOPPED):
                    raise RunError(f"the server at {self.settings.server} says: {why.reason}") from None
                reason = why.reason
            except Violation as error:
                reason = str(error)
            except LOST as error:
                reason = describe(error)
                if "CERTIFICATE" in reason.upper():
                    raise RunError(
                        f"{self.settings.server}: the server's certificate is not accepted ({reason})"
                    ) from error
            if self._ready:
                wait, lost = FIRST_WAIT, time.monotonic()
            gone = time.monotonic() - lost
            if self.settings.give_up is not None and gone > self.settings.give_up:
                raise RunError(f"no run at {self.settings.server} for {gone:.0f} s: {reason}")
            pause = wait * random.uniform(0.5, 1)
            self.say(f"{self.settings.server}: {reason}; trying again in {pause:.1f} s")
            await asyncio.sleep(pause)
            wait = min(2 * wait, LONGEST_WAIT)

    def _channel(self) -> grpc.aio.Channel:
        settings = self.settings
        host, _ = address(settings.server, "server")
        options: list[tuple[str, Any]] = [*channel_options(self.largest), ("grpc.use_local_subchannel_pool", 1)]
        if settings.plain or (is_own(host) and settings.tls_ca is None):
            return grpc.aio.insecure_channel(settings.server, options)

        def read(path: Path | None, what: str) -> bytes | None:
            try:
                return None if path is None else path.read_bytes()
            except OSError as error:
                raise SettingError(f"{what}={path}: cannot be read: {error.strerror}") from error

        credentials = grpc.ssl_channel_credentials(
            read(settings.tls_ca, "tls_ca"), read(settings.tls_key, "tls_key"), read(settings.tls_cert, "tls_cert")
        )
        return grpc.aio.secure_channel(settings.server, credentials, options)

    async def _connect(self) -> None:
        """One connection, until the run is over.

        Raises:
            Refused: the server says goodbye for another reason.
            Violation: it is no server of ours.
            grpc.RpcError: the connection is lost.
        """
        async with self._channel() as channel:
            stream: Any = channel.stream_stream(METHOD)()
            talk = _Talk(self, stream)
            try:
                await talk.hold()
            except asyncio.CancelledError:
                await talk.leave("the client stops")
                raise
            except MocosflError as error:  # such as images that cannot be decoded
                await talk.leave(str(error))
                raise
            finally:
                talk.close()
                sent, received = bytes_of(talk.sockets)
                self.traffic.sent += sent
                self.traffic.received += received
                for handle in talk.sockets:
                    handle.close()
                stream.cancel()


def coders(settings: str) -> tuple[Coder, Coder]:
    """How latents and gradients travel, of the settings in a welcome.

    Raises:
        RunError: they are not understood.
    """
    try:
        told: dict[str, Any] = json.loads(settings).get("traffic", {})
        share, zstd = told.get("topk", 0.1), bool(told.get("zstd", False))
        pair = [Coder(told.get(what, "fp32"), share, zstd) for what in ("latents", "gradients")]
        for coder in pair:
            coder.size((1, 1, 1))  # now, rather than when the first latents are there
        return pair[0], pair[1]
    except (ValueError, AttributeError, TypeError) as error:
        raise RunError(f"the server's settings are not understood: {error}") from error


class _Talk:
    """One stream."""

    def __init__(self, client: Client, stream: Any) -> None:
        self.client, self.worker, self.stream = client, client.worker, stream
        self._writing = asyncio.Lock()
        self._written = time.monotonic()
        self._drawn: tuple[int, tuple[int, ...]] | None = None  # step and shape whose gradient may come
        self._beating: asyncio.Task[None] | None = None
        self._listening: asyncio.Task[None] | None = None
        self._inbox: asyncio.Queue[bytes | Exception] = asyncio.Queue(INBOX)
        self._latents, self._gradients = Coder(), Coder()
        self._frozen = False
        self._handed = False  # whether the server has handed out weights
        self.sockets: list[socket.socket] = []  # held: the server may close them before they are counted

    async def hold(self) -> None:
        self._listening = asyncio.create_task(self._listen())
        try:
            await self._join()
            while True:
                order = await self._next("order")
                await self._obey(order.order)
        except Refused as refusal:
            if refusal.goodbye.code != Goodbye.FINISHED:
                raise
            self.client.say(refusal.goodbye.reason)

    def close(self) -> None:
        """Neither speak nor listen any more."""
        for task in (self._beating, self._listening):
            if task is not None:
                task.cancel()

    async def leave(self, reason: str) -> None:
        """Tell the server, if it still listens."""
        with suppress(*LOST, TimeoutError):
            await asyncio.wait_for(self._write(ClientMessage(goodbye=goodbye(Goodbye.STOPPED, reason))), 2)
            await asyncio.wait_for(self.stream.done_writing(), 2)

    async def _join(self) -> None:
        try:
            hello = (await asyncio.wait_for(self._next("hello"), HELLO_SECONDS)).hello
        except TimeoutError as error:
            raise Violation(f"the server says nothing for {HELLO_SECONDS:g} s") from error
        if hello.protocol != PROTOCOL:
            raise Refused(
                Goodbye.REFUSED,
                f"it speaks protocol version {hello.protocol}, this client version {PROTOCOL} (mocosfl "
                f"{hello.software[:20]} and {__version__})",
            )
        settings = self.client.settings
        self.sockets = hold(address(settings.server, "server")[1])
        join = Join(
            protocol=PROTOCOL,
            nonce=hello.nonce,
            client=settings.client,
            token=settings.secret(),
            images=self.worker.images,
            capabilities=[*self.worker.capabilities, *NAMES, "zstd"],
            software=__version__,
        )
        await self._say(ClientMessage(join=join))
        welcome = (await self._next("welcome")).welcome
        self._latents, self._gradients = coders(welcome.settings)
        self._frozen = welcome.frozen
        if settings.half is not None and not self._frozen:
            raise RunError(f"half={settings.half[:8]}...: the half of this run learns, so it is none that you can know")
        self._beating = asyncio.create_task(self._beat(welcome.heartbeat))
        images, sums, squares = await self._computed(self.worker.prepare, welcome)
        await self._say(ClientMessage(ready=Ready(images=images, sums=sums, squares=squares)))
        self.client._ready = True
        self.client.say(f"joined {settings.server} as client {welcome.client} with {images:,} images")

    async def _obey(self, order: Order) -> None:
        traffic = self.client.traffic
        if self._frozen and (order.HasField("gradients") or order.HasField("collect")):
            raise Violation("an order to learn, and the half is frozen")
        if order.HasField("gradients"):
            step = order.gradients.step
            if self._drawn is None or step != self._drawn[0]:  # no gradient is ever applied twice
                raise Violation(f"a gradient of step {step}, which is not the last one")
            gradient = self._gradients.unpack(order.gradients.query, self._drawn[1], "gradient")
            if not np.isfinite(gradient).all():
                raise Violation("a gradient that is not finite")
            self._drawn = None
            traffic.tensors_received += len(order.gradients.query.data)
            await self._computed(self.worker.learn, step, gradient, order.gradients.lr)
        if order.HasField("collect"):
            weights = await self._computed(self.worker.weights)
            traffic.tensors_sent += sum(array.nbytes for array in weights.values())
            await self._say(ClientMessage(weights=pack_weights(weights, order.collect.number)))
        if order.HasField("weights"):
            specification = self.worker.specification(frozenset(order.weights.tensors))
            tensors = unpack_weights(order.weights, specification)
            traffic.tensors_received += sum(array.nbytes for array in tensors.values())
            if self._frozen:
                self._check_half(tensors)
            await self._computed(self.worker.take, tensors, order.weights.restart)
            self._handed = True
        if order.HasField("draw"):
            if self.client.settings.half is not None and not self._handed:
                raise Violation("an order to draw before there is a half")
            step = order.draw.step
            query, key = await self._computed(self.worker.draw, step, order.draw.first)
            self._drawn = (step, query.shape)
            latents = Latents(step=step)
            self._latents.pack_into(latents.query, query)
            self._latents.pack_into(latents.key, key)
            traffic.tensors_sent += len(latents.query.data) + len(latents.key.data)
            await self._say(ClientMessage(latents=latents))
            self.client.steps += 1

    async def _computed(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """What the worker computes.

        Raises:
            RunError: it fails, as a half fails that does not fit together.
        """
        try:
            return await asyncio.to_thread(work, *args, **kwargs)
        except (MocosflError, Violation):
            raise
        except Exception as error:
            raise RunError(f"what the server asks for cannot be computed: {error!r}") from error

    def _check_half(self, weights: Mapping[str, NDArray]) -> None:
        """Accept a frozen half, if it is the one that was asked for.

        Raises:
            RunError: it is not.
        """
        found, wanted = fingerprint(self.worker.description, weights), self.client.settings.half
        if wanted not in (None, found):
            raise RunError(f"half={wanted}: the server hands out another frozen half, {found}")
        self.client.say(f"frozen half, SHA-256 {found}" + ("" if wanted is None else ", as asked for"))

    async def _beat(self, seconds: float) -> None:
        """Signs of life while there is nothing else to say."""
        seconds = max(seconds, 0.05)
        while True:
            await asyncio.sleep(seconds)
            if time.monotonic() - self._written > seconds / 2:
                with suppress(*LOST):  # whoever speaks or listens next will notice
                    await self._write(ClientMessage(heartbeat=Heartbeat()))

    async def _write(self, message: ClientMessage) -> None:
        async with self._writing:
            self._written = time.monotonic()
            await self.stream.write(message.SerializeToString())

    async def _say(self, message: ClientMessage) -> None:
        try:
            await self._write(message)
        except LOST:
            while True:  # what the server said last tells why
                await self._next(None)

    async def _listen(self) -> None:
        """Take in what the server says, also while the worker is busy: nothing can be read after the stream's end."""
        try:
            while (raw := await self.stream.read()) is not grpc.aio.EOF:
                await self._inbox.put(raw)
            await self._inbox.put(Violation("the server hung up"))
        except LOST as error:
            await self._inbox.put(error)

    async def _next(self, kind: str | None) -> ServerMessage:
        """What the server says next, of this kind; of any where there is none.

        Raises:
            Refused: it says goodbye.
            Violation: it says something else, or nothing any more.
            grpc.RpcError: the connection is lost.
        """
        raw = await self._inbox.get()
        if isinstance(raw, Exception):
            raise raw
        message = from_server(raw)
        found = message.WhichOneof("kind")
        if found == "goodbye":
            why = message.goodbye
            raise Refused(why.code, why.reason)
        if kind not in (None, found):
            raise Violation(f"the server sent a {found} instead of a {kind}")
        return message
