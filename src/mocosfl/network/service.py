"""The door: who may join, what each client may send, and who is sent away.

Everything here runs in one asyncio loop. What clients are asked for is the cohort's business (``cohort.py``).
"""

from __future__ import annotations

import asyncio
import ipaddress
import secrets
import socket
import ssl
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import grpc
import numpy as np
from numpy.typing import NDArray

from mocosfl import __version__
from mocosfl.errors import RunError, SettingError
from mocosfl.network.enrolment import Registry
from mocosfl.network.settings import ServeSettings
from mocosfl_device.protocol_pb2 import ClientMessage, Goodbye, Hello, Join, Order, Ready, ServerMessage, Welcome
from mocosfl_device.settings import address
from mocosfl_device.wire import METHOD, PROTOCOL, SLACK, Refused, Violation, channel_options, from_client, goodbye

JOIN_SECONDS = 10.0
"""A peer that has not said who it is by then is sent away."""
READY_SECONDS = 900.0
"""A client that has not decoded its images by then is sent away."""
STRANGERS = 256
"""Peers that have not said yet who they are, at most; more are told to come back later."""
MISSES, MISSES_SECONDS = 10, 60.0
"""After so many refused joins within so many seconds an address is not listened to until they are over."""
JOINS, JOINS_SECONDS = 10, 20.0
"""Joins of one client in so many seconds, at most."""
LISTENING = [
    ("grpc.so_reuseport", 0),
    ("grpc.experimental.tcp_max_read_buffer_size", 8192),
    ("grpc.tsi.max_frame_size", 4096),
]
"""Options of the server alone. gRPC keeps a buffer for what a connection may receive next, as large as what came last:
without a limit, all clients' latents once more. TLS has buffers of its own."""
LOST = (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError)
"""What gRPC raises when a connection is gone."""

Gradient = tuple[int, float, NDArray[np.float32]]
"""Step, learning rate, and the gradient at the query latents, (V, B, ...)."""

Events = Callable[..., None]
"""Called as ``events("joined", client=3, ...)``."""


@dataclass(eq=False)
class Session:
    """One connection of one client that has joined.

    Attributes:
        client: its number.
        address: where it is.
        images: that it holds.
        zstd: whether it takes compressed numbers.
        sums, squares: of its pixels, by channel.
        asked: steps whose latents it owes, in order.
        collecting: number of the collect whose weights it owes.
        generation: of the average that it was last handed; -1 for none.
        restart: whether its optimiser is to forget.
        has_momentum: whether it has a momentum copy.
        delivered: step of its last latents that came in time.
        gradient: that is still to be sent to it.
        misses: steps in a row that went on without it.
        sits_out: it is not asked before this step.
        sent, received: bytes of messages.
        writer, writing: sends what is in the outbox; whether it is at it.
    """

    client: int
    address: str
    context: Any
    images: int = 0
    zstd: bool = False
    sums: tuple[int, ...] = ()
    squares: tuple[int, ...] = ()
    asked: deque[int] = field(default_factory=deque)
    collecting: int | None = None
    generation: int = -1
    restart: bool = True
    has_momentum: bool = False
    delivered: int = -1
    gradient: Gradient | None = None
    misses: int = 0
    sits_out: int = 0
    sent: int = 0
    received: int = 0
    joined: float = field(default_factory=time.monotonic)
    heard: float = field(default_factory=time.monotonic)
    heartbeats: int = 0
    outbox: asyncio.Queue[Callable[[Order], None]] = field(default_factory=asyncio.Queue)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    farewell: Goodbye | None = None
    writer: asyncio.Task[None] | None = None
    writing: bool = False

    def end(self, code: Goodbye.Code, reason: str) -> None:
        """End the connection after telling the client why. What the first caller says is said."""
        if not self.ended.is_set():
            self.farewell = goodbye(code, reason)
            self.ended.set()

    def send(self, fill: Callable[[Order], None]) -> None:
        """Send an order; it is filled when its turn comes, so that waiting ones need no memory."""
        self.outbox.put_nowait(fill)


class Host(Protocol):
    """What the door opens to."""

    def welcome(self, client: int, capabilities: frozenset[str]) -> Welcome:
        """The settings for a client. Raises ``Refused`` if there is no place for it, or it cannot do what is needed."""

    def free_number(self) -> int:
        """A number that no client has. Raises ``Refused`` if there is none."""

    def check_ready(self, ready: Ready) -> None:
        """Raises ``Violation`` for statistics that cannot be."""

    def entered(self, session: Session) -> None:
        """A client is ready for orders."""

    def received(self, session: Session, message: ClientMessage) -> None:
        """It sent latents or weights. Raises ``Violation``."""

    def gone(self, session: Session) -> None:
        """It is no longer there."""


class Service:
    """Listens, lets clients in, hands their messages to the host, and notices when they are gone.

    Args:
        settings: how to listen.
        host: what the clients are here for.
        largest: bytes of the largest message that a client has reason to send.
        events: told what happens.

    Attributes:
        sessions: clients that are ready, by number.
        counts: joins, refusals, violations and so on, by kind.
        port: that it listens on.
    """

    def __init__(self, settings: ServeSettings, host: Host, largest: int, events: Events) -> None:
        self.settings, self.host, self.largest, self.events = settings, host, largest + SLACK, events
        self.registry = registry_of(settings)
        self.sessions: dict[int, Session] = {}
        self.counts: Counter[str] = Counter()
        self.closing: Goodbye | None = None
        self._over = asyncio.Event()
        self.port = 0
        self._strangers = 0
        self._numbers: dict[Any, int] = {}  # of every connection that has said who it is
        self._watch: asyncio.Task[None] | None = None
        self._misses: OrderedDict[str, deque[float]] = OrderedDict()
        self._joins: dict[int, deque[float]] = {}

    async def start(self) -> None:
        """Listen.

        Raises:
            RunError: the address cannot be listened on, or a certificate cannot be used.
        """
        self.server = grpc.aio.server(options=[*channel_options(self.largest), *LISTENING])
        handler: Any = grpc.stream_stream_rpc_method_handler(self._session)  # raw bytes both ways
        service, name = METHOD.strip("/").split("/")
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {name: handler}),))
        listen = self.settings.listen
        try:
            if self.settings.tls_cert is None:
                self.port = self.server.add_insecure_port(listen)
            else:
                self.port = self.server.add_secure_port(listen, self._credentials())
        except RuntimeError as error:
            raise RunError(f"cannot listen on {listen}: {error}") from error
        if not self.port:
            raise RunError(f"cannot listen on {listen}: the address is in use, or not this machine's")
        await self.server.start()
        self._watch = asyncio.create_task(self._look_for_the_silent())

    def _credentials(self) -> grpc.ServerCredentials:
        settings = self.settings

        def read(path: Path | None, what: str) -> bytes:
            assert path is not None
            try:
                return path.read_bytes()
            except OSError as error:
                raise RunError(f"{what}={path}: cannot be read: {error.strerror}") from error

        pair = read(settings.tls_key, "tls_key"), read(settings.tls_cert, "tls_cert")
        mutual = settings.tls_client_ca is not None
        authority = read(settings.tls_client_ca, "tls_client_ca") if mutual else None
        return grpc.ssl_server_credentials([pair], authority, require_client_auth=mutual)

    async def stop(self, code: Goodbye.Code, reason: str, grace: float = 5.0) -> None:
        """Send everybody away and stop listening."""
        await self.dismiss(code, reason, grace)
        if self._watch is not None:  # it has listened
            self._watch.cancel()
            await self.server.stop(0.5)

    async def dismiss(self, code: Goodbye.Code, reason: str, grace: float = 5.0) -> None:
        """Send everybody away, and whoever comes from now on."""
        if self.closing is None or self.closing.code != Goodbye.FINISHED:
            self.closing = goodbye(code, reason)
        self._over.set()
        sessions = list(self.sessions.values())
        for session in sessions:
            session.end(code, reason)
        if sessions:
            await asyncio.wait([asyncio.ensure_future(session.left.wait()) for session in sessions], timeout=grace)

    # One connection

    async def _session(self, _: Any, context: Any) -> None:
        """Handle a stream from the first to the last message."""
        address = host_of(context.peer())
        session = None
        try:
            self._may_knock(address)
            self._strangers += 1
            try:
                session = await asyncio.wait_for(self._admit(context), JOIN_SECONDS)
            except TimeoutError as error:
                self.counts["refused"] += 1
                raise Refused(Goodbye.BUSY, f"no join within {JOIN_SECONDS:g} s") from error
            finally:
                self._strangers -= 1
            await self._attend(session)
        except Refused as refusal:
            await self._refuse(context, address, session, refusal.goodbye)
        except Violation as error:
            await self._refuse(context, address, session, goodbye(Goodbye.VIOLATION, str(error)))
        except LOST as error:
            self.events("connection lost", address=address, client=session and session.client, why=str(error)[:200])
        finally:
            self._numbers.pop(context, None)
            if session is not None:
                self._let_go(session)
                if session.writer is not None:
                    session.writer.cancel()

    @property
    def taken(self) -> set[int]:
        """Numbers of the clients that are there, or about to be."""
        return set(self._numbers.values())

    def _may_knock(self, address: str) -> None:
        """Turn peers away before they have said anything, if there are too many or too many bad ones."""
        if self.closing is not None:
            raise Refused(self.closing.code, self.closing.reason)
        now, misses = time.monotonic(), self._misses.get(address, deque())
        while misses and now - misses[0] > MISSES_SECONDS:
            misses.popleft()
        if len(misses) >= MISSES:
            self.counts["limited"] += 1
            raise Refused(Goodbye.BUSY, "too many refused joins from this address; try again in a minute")
        if self._strangers >= STRANGERS:
            self.counts["limited"] += 1
            raise Refused(Goodbye.BUSY, "too many clients are joining at once; try again")

    async def _admit(self, context: Any) -> Session:
        """Find out who it is; a session that is not yet ready comes back."""
        nonce = secrets.token_bytes(16)
        await _say(context, ServerMessage(hello=Hello(protocol=PROTOCOL, nonce=nonce, software=__version__)))
        raw = await context.read()
        if raw is grpc.aio.EOF:
            raise Refused(Goodbye.REFUSED, "the stream ended before a join")
        if len(raw) > SLACK:
            raise Violation(f"{len(raw)} bytes before a join")
        message = from_client(raw)
        if message.WhichOneof("kind") != "join":
            raise Violation(f"expected a join, not {message.WhichOneof('kind')}")
        join = message.join
        if join.protocol != PROTOCOL:
            raise Refused(
                Goodbye.REFUSED,
                f"the server speaks protocol version {PROTOCOL}, the client version {join.protocol} (mocosfl "
                f"{__version__} and {join.software[:20]})",
            )
        if join.nonce != nonce:
            raise Refused(Goodbye.REFUSED, "the join does not answer this connection's hello")
        client = self._numbers[context] = self._identify(join)
        if not join.images:
            raise Refused(Goodbye.REFUSED, "the client holds no images")
        welcome = self.host.welcome(client, frozenset(join.capabilities))
        self._count_join(client)
        zstd = "zstd" in join.capabilities
        session = Session(client, str(context.peer()), context, images=join.images, zstd=zstd)
        await _say(context, ServerMessage(welcome=welcome))
        return session

    def _identify(self, join: Join) -> int:
        if self.registry is None:
            return join.client if join.HasField("client") else self.host.free_number()
        client = self.registry.admits(join.token)
        if client is None:
            raise Refused(Goodbye.REFUSED, "the token is not that of an enrolled client" if join.token else "no token")
        if join.HasField("client") and join.client != client:
            raise Refused(Goodbye.REFUSED, f"the token is not that of client {join.client}")
        return client

    def _count_join(self, client: int) -> None:
        now, joins = time.monotonic(), self._joins.setdefault(client, deque())
        while joins and now - joins[0] > JOINS_SECONDS:
            joins.popleft()
        if len(joins) >= JOINS:
            self.counts["limited"] += 1
            raise Refused(Goodbye.BUSY, f"client {client} has joined {JOINS} times in {JOINS_SECONDS:g} s")
        joins.append(now)

    async def _attend(self, session: Session) -> None:
        """Everything after the welcome, until the client leaves or is sent away."""
        await self._until_ready(session)
        if (older := self.sessions.get(session.client)) is not None:
            self.counts["replaced"] += 1
            older.end(Goodbye.REPLACED, f"client {session.client} has joined again from {session.address}")
            self._let_go(older)
        if self.closing is not None:
            raise Refused(self.closing.code, self.closing.reason)
        self.sessions[session.client] = session
        self.counts["joined"] += 1
        self.events("joined", client=session.client, address=session.address, images=session.images)
        self.host.entered(session)
        session.writer = asyncio.create_task(self._write(session))
        tasks = [session.writer, *map(asyncio.create_task, (self._read(session), session.ended.wait()))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._let_go(session)
            for task in tasks:
                if task is not session.writer or not session.writing:  # what is half sent is sent
                    task.cancel()
        if session.farewell is not None:
            raise Refused(session.farewell.code, session.farewell.reason)

    async def _until_ready(self, session: Session) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while True:
            patience = min(3 * self.settings.heartbeat, deadline - time.monotonic())
            reading, over = map(asyncio.ensure_future, (session.context.read(), self._over.wait()))
            try:
                await asyncio.wait((reading, over), timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                if self.closing is not None:
                    raise Refused(self.closing.code, self.closing.reason)
                if not reading.done():
                    raise Refused(Goodbye.BUSY, "the client was not ready in time")
                raw = reading.result()
            finally:
                reading.cancel()
                over.cancel()
            if raw is grpc.aio.EOF:
                raise Refused(Goodbye.REFUSED, "the client left before it was ready")
            if len(raw) > SLACK:
                raise Violation(f"{len(raw)} bytes before the client was ready")
            message = self._checked(session, raw)
            kind = message.WhichOneof("kind")
            if kind == "ready":
                self.host.check_ready(message.ready)
                session.images = message.ready.images
                session.sums, session.squares = tuple(message.ready.sums), tuple(message.ready.squares)
                return
            if kind == "goodbye":
                raise Refused(Goodbye.REFUSED, f"the client says: {message.goodbye.reason[:200]}")
            if kind != "heartbeat":
                raise Violation(f"{kind} before the client was ready")

    async def _read(self, session: Session) -> None:
        while (raw := await session.context.read()) is not grpc.aio.EOF:
            if session.ended.is_set():  # sent away, or replaced: it has no say any more
                return
            if len(raw) > SLACK and not session.asked and session.collecting is None:  # not worth reading
                raise Violation(f"{len(raw)} bytes that nobody asked for")
            message = self._checked(session, raw)
            kind = message.WhichOneof("kind")
            if kind == "goodbye":
                self.events("goodbye", client=session.client, why=message.goodbye.reason[:200])
                return
            if kind in ("join", "ready"):
                raise Violation(f"a second {kind}")
            if kind != "heartbeat":
                self.host.received(session, message)
            del raw, message  # not to be kept until the next one comes
        self.events("hung up", client=session.client)

    def _checked(self, session: Session, raw: bytes) -> ClientMessage:
        """Count a message, and look that it is not one of a flood."""
        session.heard = time.monotonic()
        session.received += len(raw)
        message = from_client(raw)
        if message.WhichOneof("kind") == "heartbeat":
            session.heartbeats += 1
            if session.heartbeats > 10 + 4 * (session.heard - session.joined) / self.settings.heartbeat:
                raise Violation("too many heartbeats")
        return message

    async def _write(self, session: Session) -> None:
        while not session.left.is_set():
            fill, message = await session.outbox.get(), ServerMessage()
            fill(message.order)
            raw = message.SerializeToString()
            del fill, message
            session.sent += len(raw)
            session.writing = True
            await session.context.write(raw)
            session.writing = False
            del raw

    async def _refuse(self, context: Any, address: str, session: Session | None, why: Goodbye) -> None:
        """Tell a peer why it is sent away, if it still listens; count it."""
        kind = {Goodbye.VIOLATION: "violations", Goodbye.REFUSED: "refused"}.get(why.code)
        if kind is not None:
            self.counts[kind] += 1
            if session is None:  # a client's own misdeeds must not keep its neighbours out
                self._note_miss(address)
        if kind is not None or session is not None:
            client = None if session is None else session.client
            self.events("sent away", client=client, address=address, code=Goodbye.Code.Name(why.code), why=why.reason)
        if session is not None and session.writer is not None:
            with suppress(TimeoutError):  # one thing is sent at a time
                await asyncio.wait_for(asyncio.gather(session.writer, return_exceptions=True), 2)
        with suppress(*LOST, TimeoutError):
            await asyncio.wait_for(_say(context, ServerMessage(goodbye=why)), 2)

    def _note_miss(self, address: str) -> None:
        misses = self._misses.setdefault(address, deque(maxlen=MISSES))
        misses.append(time.monotonic())
        self._misses.move_to_end(address)
        while len(self._misses) > 10_000:  # so many addresses are remembered, the latest ones
            self._misses.popitem(last=False)

    def _let_go(self, session: Session) -> None:
        if self.sessions.get(session.client) is session:
            del self.sessions[session.client]
            self.counts["left"] += 1
            self.host.gone(session)
        session.left.set()

    async def _look_for_the_silent(self) -> None:
        limit = 3 * self.settings.heartbeat
        while True:
            await asyncio.sleep(self.settings.heartbeat / 2)
            for session in list(self.sessions.values()):
                if time.monotonic() - session.heard > limit:
                    self.counts["silent"] += 1
                    session.end(Goodbye.BUSY, f"nothing was heard of the client for {limit:g} s")


def check_listenable(listen: str) -> None:
    """Find out, before any work is done, whether an address can be listened on.

    Raises:
        RunError: it cannot.
    """
    host, port = address(listen, "listen")
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as handle:
            handle.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does
            handle.bind(where)
    except OSError as error:
        raise RunError(f"cannot listen on {listen}: {error.strerror or error}") from error


def check_certificates(settings: ServeSettings) -> None:
    """Find out, before any work is done, whether certificates and keys can be used.

    Raises:
        RunError: they cannot; names them.
    """
    if settings.tls_cert is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password="")
    except OSError as error:  # SSLError too
        raise RunError(f"tls_cert={settings.tls_cert}, tls_key={settings.tls_key}: cannot be used: {error}") from error
    if settings.tls_client_ca is not None:
        try:
            context.load_verify_locations(settings.tls_client_ca)
        except OSError as error:
            raise RunError(f"tls_client_ca={settings.tls_client_ca}: cannot be used: {error}") from error


def registry_of(settings: ServeSettings) -> Registry | None:
    """Who may join; None for everybody.

    Raises:
        RunError: the clients' file cannot be read.
        SettingError: nobody is enrolled in it.
    """
    if settings.clients_file is None:
        return None
    registry = Registry(settings.clients_file)
    if not len(registry):
        raise SettingError(f"clients_file={settings.clients_file}: no client is enrolled there; mocosfl enroll does it")
    return registry


async def _say(context: Any, message: ServerMessage) -> None:
    await context.write(message.SerializeToString())


def host_of(peer: str) -> str:
    """``10.0.0.7`` of gRPC's ``ipv4:10.0.0.7:4711``; an IPv6 address by its first 64 bits, which one site shares."""
    kind, _, rest = peer.partition(":")
    host = rest.rpartition(":")[0].replace("%5B", "").replace("%5D", "").strip("[]").partition("%")[0]
    if kind != "ipv6":
        return host
    try:
        return str(ipaddress.ip_network((host, 64), strict=False))
    except ValueError:
        return host
