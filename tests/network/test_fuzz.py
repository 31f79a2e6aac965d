"""Whatever a peer sends, it is sent away for it at most, and nobody else notices."""

import asyncio
import os
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress

import grpc
import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peers import READY, SOAK, FakeWorker, Host, Member, Raw, eventually, join_of, latents_of
from workers import SPECIFICATION, learned_twice

from mocosfl.network import service
from mocosfl.network.service import Session
from mocosfl_device.protocol_pb2 import ClientMessage, Goodbye, Heartbeat, Hello, ServerMessage
from mocosfl_device.wire import Refused, Violation, from_client, from_server, pack_weights

MESSAGES = int(os.environ.get("MOCOSFL_FUZZ", 100_000 if SOAK else 2_000))
"""Messages for the parser; the live server gets fewer."""
LIVE = max(300, MESSAGES // 5)


def weights_of(number: int) -> ClientMessage:
    names = {
        f"{part}.{name}": np.ones(shape, np.float32)
        for part in ("online", "momentum")
        for name, shape in SPECIFICATION.items()
    }
    return ClientMessage(weights=pack_weights(names, number))


VALID = [
    message.SerializeToString()
    for message in (
        join_of(Hello(nonce=b"0123456789abcdef"), 1, token="1-" + 43 * "x"),
        join_of(Hello(nonce=b"0123456789abcdef"), 9),  # there is no client 9
        READY,
        latents_of(1),
        weights_of(1),
        ClientMessage(heartbeat=Heartbeat()),
        ClientMessage(goodbye=Goodbye(code=Goodbye.STOPPED, reason="the client stops")),
    )
]


def mutated(raw: bytes, chance: random.Random) -> bytes:
    """A message with some bytes changed, doubled, left out, or cut off."""
    content = bytearray(raw)
    for _ in range(chance.randint(1, 4)):
        at, kind = chance.randrange(len(content) + 1), chance.randrange(5)
        if kind == 0 and at < len(content):
            content[at] = chance.randrange(256)
        elif kind == 1 and at < len(content):
            content[at] ^= 1 << chance.randrange(8)
        elif kind == 2:
            content[at:at] = chance.randbytes(chance.randint(1, 8))
        elif kind == 3:
            del content[at : at + chance.randint(1, 8)]
        else:
            del content[at:]
    return bytes(content)


def anything() -> st.SearchStrategy[bytes]:
    """Random bytes, valid messages, valid messages cut short, changed, or joined together."""
    valid = st.sampled_from(VALID)
    return st.one_of(
        st.binary(max_size=200),
        valid,
        st.tuples(valid, st.integers(0, 400)).map(lambda pair: pair[0][: pair[1]]),
        st.tuples(valid, st.integers(0, 2**64)).map(lambda pair: mutated(pair[0], random.Random(pair[1]))),
        st.tuples(valid, valid).map(b"".join),
    )


fuzzed = settings(
    max_examples=MESSAGES, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=not SOAK
)


@pytest.fixture(scope="module")
def idle() -> Iterator[Host]:
    """A server that nobody has joined."""
    one = Host({"clients.number": 3})
    yield one
    one.stop()


OUTCOMES: dict[str, int] = {}


def handle(one: Host, raw: bytes) -> str:
    """What the server does with a message of a client that owes latents of step 1, and weights."""
    exchange = one.exchange
    session = Session(1, "ipv4:127.0.0.1:1", None)
    session.asked, session.collecting = deque([1]), 1
    batch = exchange._open(1)
    batch.awaited.add(1)
    exchange._batches[1] = batch
    exchange._collect_from = {1}
    try:
        message = from_client(raw)
        kind = message.WhichOneof("kind")
        if kind == "join":
            exchange.welcome(message.join.client, frozenset(message.join.capabilities))
        elif kind == "ready":
            exchange.check_ready(message.ready)
        elif kind in ("latents", "weights"):
            exchange.received(session, message)
            if kind == "latents":
                assert batch.delivered.tolist() == [False, True, False]
                assert batch.query[:, 2:4].isfinite().all()
                assert batch.key[:, 2:4].isfinite().all()
            else:
                assert all(np.isfinite(array).all() for array in exchange._collected[1].values())
        return kind
    except (Violation, Refused) as caught:
        error = caught
    finally:
        exchange._batches.clear()
        exchange._queue.clear()
        exchange._spare = [(batch.query, batch.key)]
        exchange._collected, exchange._collect_from, exchange._transit = {}, set(), 0
    assert str(error)
    assert not batch.delivered.any()
    return type(error).__name__


@fuzzed
@given(raw=anything())
def test_the_server_takes_any_bytes(idle: Host, raw: bytes) -> None:
    """A violation, a refusal, or a message that is as it should be: nothing else comes out."""
    outcome = handle(idle, raw)
    OUTCOMES[outcome] = OUTCOMES.get(outcome, 0) + 1


def test_the_fuzzer_reaches_every_handler() -> None:
    assert OUTCOMES.keys() >= {"Violation", "Refused", "join", "ready", "latents", "weights", "heartbeat", "goodbye"}


@fuzzed
@given(raw=anything())
def test_the_client_takes_any_bytes(raw: bytes) -> None:
    with suppress(Violation):
        assert from_server(raw).WhichOneof("kind")
    with suppress(DecodeError):
        ServerMessage.FromString(raw)


# A live server


class Fuzzer:
    """Connects again and again, as clients 1 and up, and says what it should not."""

    def __init__(self, host: Host, clients: list[int], seed: int) -> None:
        self.host, self.clients, self.chance, self.sent = host, clients, random.Random(seed), 0

    async def run(self, messages: int) -> None:
        while self.sent < messages:
            with suppress(grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError, TimeoutError):
                await self._talk(min(self.chance.randint(1, 6), messages - self.sent))

    async def _talk(self, count: int) -> None:
        """Go some way along a conversation that is as it should be, then leave it."""
        chance = self.chance
        if chance.random() < 0.02:
            await self._noise()
        async with Raw(self.host.port) as peer:
            stage = chance.randrange(4)
            step = 0
            if stage == 0:
                hello = (await peer.hear()).hello
            else:
                answer = await peer.join(chance.choice(self.clients))
                hello = peer.hello
                assert answer.HasField("welcome")
                if stage > 1:
                    await peer.say(READY)
                if stage > 2 and (message := await asyncio.wait_for(peer.hear(), 1)).HasField("order"):
                    step = message.order.draw.step
            for _ in range(count):
                self.sent += 1
                await peer.say(self._message(hello, step))
            if chance.random() < 0.5:
                await asyncio.wait_for(peer.hear(), 1)

    def _message(self, hello: Hello, step: int) -> bytes:
        chance = self.chance
        good = [join_of(hello, chance.choice(self.clients)), READY, latents_of(step), weights_of(1)]
        raw = chance.choice(VALID + [message.SerializeToString() for message in good])
        kind = chance.random()
        if kind < 0.1:
            return chance.randbytes(chance.randrange(300))
        if kind < 0.2:
            return raw[: chance.randrange(len(raw) + 1)]
        if kind < 0.23:
            return chance.randbytes(self.host.service.largest + chance.randint(-50, 50))  # too large, or just not
        return raw if kind < 0.5 else mutated(raw, chance)

    async def _noise(self) -> None:
        """Bytes that are not even HTTP/2."""
        _, writer = await asyncio.open_connection("127.0.0.1", self.host.port)
        writer.write(self.chance.randbytes(200))
        with suppress(OSError):
            await writer.drain()
        writer.close()


def test_a_good_client_trains_on_while_others_send_anything(
    host: Callable[..., Host], member: Callable[..., Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "MISSES", 10**9)  # else the fuzzers would be kept out
    monkeypatch.setattr(service, "JOINS", 10**9)
    one = host({"clients.number": 6}, min_clients=1, step_timeout=0.1, quorum=1.0)
    good = member(one.port, FakeWorker(), client=0)
    one.begin(1)
    stop = threading.Event()
    ended: list[Exception] = []

    def train() -> None:
        try:
            while not stop.is_set():
                one.step(sync=one.steps % 5 == 4)
        except Exception as error:
            ended.append(error)

    trainer = threading.Thread(target=train)
    trainer.start()
    fuzzers = [Fuzzer(one, [1, 2, 3, 4, 5], seed) for seed in range(8)]

    async def fuzz() -> None:
        await asyncio.gather(*(fuzzer.run(-(-LIVE // len(fuzzers))) for fuzzer in fuzzers))

    try:
        asyncio.run(fuzz())
        before = len(good.worker.steps("learn"))
        eventually(lambda: len(good.worker.steps("learn")) > before + 5, "training after the fuzz")
    finally:
        stop.set()
        trainer.join()
    assert not ended
    counts = one.counts
    print(f"{sum(f.sent for f in fuzzers):,} messages; {dict(counts)}")
    assert sum(fuzzer.sent for fuzzer in fuzzers) >= LIVE
    assert counts["violations"] > LIVE / 20
    assert counts["joined"] > LIVE / 50
    assert not one.events("left", client=0)
    assert not one.events("sent away", client=0)
    assert all(tensor.isfinite().all() for tensor in one.cohort.average().values())
    eventually(lambda: one.cohort.present == 1)
    assert 0 in one.step().clients
    one.stop()
    good.end()
    assert not learned_twice(good.worker.calls)
