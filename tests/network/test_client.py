"""A client obeys its server as far as the rules go, and comes back when it is gone."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from peers import FakeWorker, Loop, Member, eventually
from workers import SHAPE

from mocosfl.errors import RunError
from mocosfl_device import client
from mocosfl_device.protocol_pb2 import (
    ClientMessage,
    Draw,
    Goodbye,
    Gradients,
    Hello,
    Order,
    ServerMessage,
    Welcome,
)
from mocosfl_device.wire import METHOD, PROTOCOL, Coder, goodbye

SETTINGS = '{"sync": {"momentum": true}, "data": {"size": 8, "channels": 1}}'

Script = Callable[["Talk"], Coroutine[Any, Any, None]]


class Talk:
    """What a server that keeps to a script says and hears on one stream."""

    def __init__(self, context: Any) -> None:
        self.context = context

    async def say(self, message: ServerMessage | bytes) -> None:
        await self.context.write(message if isinstance(message, bytes) else message.SerializeToString())

    async def hear(self, kind: str) -> Any:
        """The next message that is no heartbeat."""
        while (raw := await asyncio.wait_for(self.context.read(), 100)) is not grpc.aio.EOF:
            message = ClientMessage.FromString(raw)
            if message.WhichOneof("kind") != "heartbeat":
                assert message.WhichOneof("kind") == kind
                return getattr(message, kind)
        raise AssertionError("the client hung up")

    async def let_in(self) -> None:
        await self.say(ServerMessage(hello=Hello(protocol=PROTOCOL, nonce=b"nonce")))
        assert (await self.hear("join")).nonce == b"nonce"
        await self.say(ServerMessage(welcome=Welcome(client=0, settings=SETTINGS, heartbeat=0.2)))
        await self.hear("ready")

    async def draw(self, step: int, **more: Any) -> None:
        await self.say(ServerMessage(order=Order(draw=Draw(step=step), **more)))
        assert (await self.hear("latents")).step == step


def gradient(step: int, number: float = 1.0, shape: tuple[int, ...] = (1, 2, *SHAPE)) -> Gradients:
    return Gradients(step=step, lr=0.1, query=Coder().pack(np.full(shape, number, np.float32)))


@pytest.fixture
def scripted(loop: Loop) -> Iterator[Callable[[Script], int]]:
    """Starts servers that keep to a script, over and over; returns the port."""
    servers = []

    def make(script: Script) -> int:
        async def begin() -> tuple[Any, int]:
            server = grpc.aio.server()
            service, name = METHOD.strip("/").split("/")

            async def handle(_: Any, context: Any) -> None:
                await script(Talk(context))

            methods = {name: grpc.stream_stream_rpc_method_handler(handle)}
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, methods),))
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            return server, port

        server, port = loop.run(begin())
        servers.append(server)
        return port

    yield make
    for server in servers:
        loop.run(server.stop(0))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "LONGEST_WAIT", 0.5)


FINISHED = ServerMessage(goodbye=goodbye(Goodbye.FINISHED, "the run is over"))


def test_a_conversation_that_keeps_to_the_rules(
    scripted: Callable[[Script], int], member: Callable[..., Member]
) -> None:
    async def script(talk: Talk) -> None:
        await talk.let_in()
        await talk.draw(1)
        await talk.draw(2, gradients=gradient(1))
        await talk.say(FINISHED)

    one = member(scripted(script))
    one.end()
    assert [call[:2] for call in one.worker.calls] == [("draw", 1), ("learn", 1), ("draw", 2)]
    assert one.client.steps == 2
    assert one.client.traffic.tensors_sent == 2 * 2 * 6 * 4
    assert one.client.traffic.tensors_received == 6 * 4


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ([gradient(2)], "a gradient of step 2, which is not the last one"),
        ([gradient(0)], "a gradient of step 0, which is not the last one"),
        ([gradient(1), gradient(1)], "a gradient of step 1, which is not the last one"),
        ([gradient(1, number=np.nan)], "a gradient that is not finite"),
        ([gradient(1, shape=(1, 3, *SHAPE))], "gradient: shape [1, 3, 3] instead of [1, 2, 3]"),
    ],
    ids=str,
)
def test_gradients_that_are_not_of_the_last_step_are_refused(
    wrong: list[Gradients], reason: str, scripted: Callable[[Script], int], member: Callable[..., Member]
) -> None:
    visits: list[int] = []

    async def script(talk: Talk) -> None:
        visits.append(1)
        await talk.let_in()
        if len(visits) > 1:
            await talk.say(FINISHED)
            return
        await talk.draw(1)
        for one in wrong:
            await talk.say(ServerMessage(order=Order(gradients=one)))
        await talk.context.read()

    one = member(scripted(script))
    one.end()
    assert any(reason in text for text in one.said), one.said
    assert one.worker.steps("learn") == [1] * (len(wrong) - 1)
    assert len(visits) == 2  # it came back


def test_a_gradient_before_any_latents_is_refused(
    scripted: Callable[[Script], int], member: Callable[..., Member]
) -> None:
    async def script(talk: Talk) -> None:
        await talk.let_in()
        await talk.say(ServerMessage(order=Order(gradients=gradient(0))))
        await talk.context.read()

    one = member(scripted(script), give_up=0.01)
    eventually(lambda: any("which is not the last one" in text for text in one.said))
    assert not one.worker.steps("learn")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([b"\xff\xff\xff"], "the server sent 3 bytes that cannot be read"),
        ([b""], "the server sent a message of no known kind"),
        ([ServerMessage(welcome=Welcome())], "the server sent a welcome instead of a hello"),
        ([ServerMessage(hello=Hello(protocol=PROTOCOL))] * 2, "the server sent a hello instead of a welcome"),
        ([], "the server hung up"),
        ([ServerMessage(goodbye=goodbye(Goodbye.BUSY, "come back later"))], "come back later"),
    ],
    ids=str,
)
def test_a_server_that_breaks_the_rules_is_tried_again_until_the_client_gives_up(
    words: list, reason: str, scripted: Callable[[Script], int], member: Callable[..., Member]
) -> None:
    async def script(talk: Talk) -> None:
        for word in words:
            await talk.say(word)
        while words and await talk.context.read() is not grpc.aio.EOF:
            pass

    with pytest.raises(RunError, match=r"no run at 127\.0\.0\.1:\d+ for \d+ s: " + reason):
        member(scripted(script), give_up=0.2).end()


def test_a_server_of_another_version_is_named(scripted: Callable[[Script], int], member: Callable[..., Member]) -> None:
    async def script(talk: Talk) -> None:
        await talk.say(ServerMessage(hello=Hello(protocol=PROTOCOL + 2, software="9.9")))
        await talk.context.read()

    with pytest.raises(RunError, match=rf"protocol version {PROTOCOL + 2}, this client version {PROTOCOL} \(mocosfl 9"):
        member(scripted(script)).end()


def test_a_server_that_says_nothing(
    scripted: Callable[[Script], int], member: Callable[..., Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "HELLO_SECONDS", 0.3)

    async def script(talk: Talk) -> None:
        await talk.context.read()

    with pytest.raises(RunError, match=r"the server says nothing for 0\.3 s"):
        member(scripted(script), give_up=0.1).end()


def test_a_client_that_is_sent_away_while_it_computes_hears_why(
    scripted: Callable[[Script], int], member: Callable[..., Member]
) -> None:
    async def script(talk: Talk) -> None:
        await talk.let_in()
        await talk.say(ServerMessage(order=Order(draw=Draw(step=1))))
        await talk.say(ServerMessage(goodbye=goodbye(Goodbye.VIOLATION, "enough of that")))

    worker = FakeWorker()
    worker.drawing = lambda step: time.sleep(0.5)
    with pytest.raises(RunError, match="says: enough of that"):
        member(scripted(script), worker).end()
    assert worker.steps("draw") == [1]


def test_a_server_that_vanishes_while_a_client_computes(
    scripted: Callable[[Script], int], member: Callable[..., Member]
) -> None:
    visits: list[int] = []

    async def script(talk: Talk) -> None:
        visits.append(1)
        await talk.let_in()
        if len(visits) > 1:
            await talk.say(FINISHED)
            return
        await talk.say(ServerMessage(order=Order(draw=Draw(step=1))))
        await talk.context.abort(grpc.StatusCode.UNAVAILABLE, "power cut")

    worker = FakeWorker()
    worker.drawing = lambda step: time.sleep(0.5)
    one = member(scripted(script), worker)
    one.end()
    assert any("UNAVAILABLE: power cut; trying again" in text for text in one.said)


@pytest.mark.parametrize("busy", [False, True])
def test_a_client_that_is_stopped_tells_the_server(
    busy: bool, scripted: Callable[[Script], int], member: Callable[..., Member]
) -> None:
    told: list[Goodbye] = []
    worker = FakeWorker()
    worker.drawing = lambda step: time.sleep(0.5)

    async def script(talk: Talk) -> None:
        await talk.let_in()
        if busy:
            await talk.say(ServerMessage(order=Order(draw=Draw(step=1))))
        told.append(await talk.hear("goodbye"))

    one = member(scripted(script), worker)
    eventually(lambda: worker.steps("draw") if busy else one.said)
    one.leave()
    eventually(lambda: told)
    assert told[0].code == Goodbye.STOPPED
    assert told[0].reason == "the client stops"
