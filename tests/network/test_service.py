"""Who is let in, and who is sent away; the others notice nothing."""

import asyncio
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import trustme
from peers import READY, FakeWorker, Host, Member, Raw, eventually, join_of, latents_of
from workers import SHAPE

from mocosfl.errors import RunError, SettingError
from mocosfl.network import service
from mocosfl.network.enrolment import Registry
from mocosfl.network.service import host_of
from mocosfl_device.protocol_pb2 import ClientMessage, Goodbye, Heartbeat, Hello, Latents, Ready, Tensor
from mocosfl_device.wire import PROTOCOL, Coder, pack_weights


@pytest.fixture
def tokens(tmp_path: Path) -> dict[int, str]:
    return Registry(tmp_path / "clients.json").enrol(range(3))


@pytest.fixture
def guarded(host: Callable[..., Host], tokens: dict[int, str], tmp_path: Path) -> Host:
    """A server that asks for tokens."""
    return host(clients_file=tmp_path / "clients.json")


def refusal(port: int, client: int | None = 0, **changes: Any) -> Goodbye:
    """What a join that must not succeed is told."""

    async def attempt() -> Goodbye:
        async with Raw(port) as peer:
            answer = await peer.join(client, **changes)
            assert answer.HasField("goodbye"), "an unauthenticated peer was told more"
            assert await peer.hear() is None
            return answer.goodbye

    return asyncio.run(attempt())


def test_a_good_token_is_let_in_under_its_own_number(
    guarded: Host, tokens: dict[int, str], member: Callable[..., Member]
) -> None:
    for number in (2, 0, 1):
        member(guarded.port, token=tokens[number])
    guarded.begin(3)
    assert guarded.step().clients.tolist() == [0, 1, 2]


def test_bad_tokens_are_refused_and_told_nothing(guarded: Host, tokens: dict[int, str], tmp_path: Path) -> None:
    unknown = tokens[1].replace("1-", "7-", 1)
    stolen = tokens[1].replace("1-", "0-", 1)
    for client, token in ((0, "wrong"), (0, tokens[0][:-1]), (7, unknown), (0, stolen), (0, tokens[0] + "\n")):
        told = refusal(guarded.port, client, token=token)
        assert told.code == Goodbye.REFUSED
        assert told.reason == "the token is not that of an enrolled client"
    assert refusal(guarded.port).reason == "no token"
    assert "not that of client 1" in refusal(guarded.port, 1, token=tokens[0]).reason
    Registry(tmp_path / "clients.json").strike_off([2])
    assert refusal(guarded.port, 2, token=tokens[2]).code == Goodbye.REFUSED
    assert guarded.counts["refused"] == 8
    assert guarded.counts["joined"] == 0
    assert not any(token in str(guarded.told) for token in tokens.values())


def test_a_client_with_a_wrong_token_ends_with_the_reason(guarded: Host, member: Callable[..., Member]) -> None:
    with pytest.raises(RunError, match="the token is not that of an enrolled client"):
        member(guarded.port, token="wrong").end()


def test_a_recorded_join_is_refused(guarded: Host, tokens: dict[int, str]) -> None:
    async def replay() -> Goodbye:
        async with Raw(guarded.port) as first:
            hello = (await first.hear()).hello
            recorded = join_of(hello, 0, token=tokens[0]).SerializeToString()
            await first.say(recorded)
            assert (await first.hear()).HasField("welcome")
        async with Raw(guarded.port) as second:
            assert (await second.hear()).hello.nonce != hello.nonce
            await second.say(recorded)
            answer = await second.hear()
            assert await second.hear() is None
            return answer.goodbye

    told = asyncio.run(replay())
    assert told.code == Goodbye.REFUSED
    assert "does not answer this connection's hello" in told.reason


def test_a_second_join_replaces_the_first(host: Callable[..., Host], member: Callable[..., Member]) -> None:
    two = host({"clients.number": 2})
    member(two.port, client=1)

    async def twice() -> None:
        async with Raw(two.port) as first, Raw(two.port) as second:
            await first.enter(0)
            await asyncio.to_thread(two.begin, 2)
            step = asyncio.ensure_future(asyncio.to_thread(two.step))
            number = await first.draw()
            await second.enter(0)
            told = await first.goodbye()
            assert told.code == Goodbye.REPLACED
            assert "client 0 has joined again" in told.reason
            assert await second.draw() == number
            await second.say(latents_of(number))
            assert (await step).clients.tolist() == [0, 1]

    asyncio.run(twice())
    assert two.counts["replaced"] == 1
    assert not [event for event in two.events("left") if event["client"] == 1]


def test_clients_that_join_at_once_get_numbers_of_their_own(host: Callable[..., Host]) -> None:
    three = host()

    async def together() -> list[int]:
        async with Raw(three.port) as a, Raw(three.port) as b, Raw(three.port) as c, Raw(three.port) as d:
            numbers = [(await peer.join(None)).welcome.client for peer in (a, b, c)]
            full = (await d.join(None)).goodbye
            assert full.code == Goodbye.BUSY
            assert "all 3 clients are there" in full.reason
            return numbers

    assert asyncio.run(together()) == [0, 1, 2]
    eventually(lambda: not three.service.taken)
    assert refusal(three.port, 3).reason == "there is no client 3: the run has 3 (clients.number)"


def test_a_client_that_joins_again_and_again_is_put_off(host: Callable[..., Host]) -> None:
    one = host({"clients.number": 2})

    async def enter(client: int) -> Any:
        async with Raw(one.port) as peer:
            return await peer.join(client)

    for _ in range(service.JOINS):
        assert asyncio.run(enter(0)).HasField("welcome")
    told = asyncio.run(enter(0)).goodbye
    assert told.code == Goodbye.BUSY
    assert "has joined 10 times" in told.reason
    assert asyncio.run(enter(1)).HasField("welcome")
    assert one.counts["limited"] == 1


def test_an_address_of_bad_joins_is_put_off_and_its_clients_train_on(
    guarded: Host, tokens: dict[int, str], member: Callable[..., Member]
) -> None:
    for number in range(3):
        member(guarded.port, token=tokens[number])
    guarded.begin(3)
    for _ in range(service.MISSES):
        assert refusal(guarded.port, token="wrong").code == Goodbye.REFUSED

    async def knock() -> Goodbye:
        async with Raw(guarded.port) as peer:
            return (await peer.hear()).goodbye

    told = asyncio.run(knock())
    assert told.code == Goodbye.BUSY
    assert "try again" in told.reason
    assert guarded.step().clients.tolist() == [0, 1, 2]


def test_a_stranger_who_says_nothing_is_sent_away(host: Callable[..., Host], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "JOIN_SECONDS", 1.0)
    monkeypatch.setattr(service, "STRANGERS", 2)
    one = host()

    async def wait() -> None:
        async with Raw(one.port) as first, Raw(one.port) as second:
            assert (await first.hear()).HasField("hello")
            assert (await second.hear()).HasField("hello")
            async with Raw(one.port) as third:
                told = await third.hear()
                assert told.goodbye.code == Goodbye.BUSY
                assert "too many clients are joining" in told.goodbye.reason
            for peer in (first, second):
                told = await peer.hear()
                assert told.goodbye.code == Goodbye.BUSY  # it may come again
                assert "no join within 1 s" in told.goodbye.reason
                assert await peer.hear() is None

    asyncio.run(wait())
    assert one.counts["refused"] == 2
    assert one.counts["limited"] == 1


def test_a_client_that_is_never_ready_is_sent_away(host: Callable[..., Host], monkeypatch: pytest.MonkeyPatch) -> None:
    one = host(heartbeat=0.2)

    async def dawdle(beating: bool) -> Goodbye:
        async with Raw(one.port) as peer:
            assert (await peer.join()).HasField("welcome")
            answer = asyncio.ensure_future(peer.hear())
            while beating and not answer.done():
                await peer.say(ClientMessage(heartbeat=Heartbeat()))
                await asyncio.wait([answer], timeout=0.2)
            return (await answer).goodbye

    assert "was not ready in time" in asyncio.run(dawdle(beating=False)).reason  # not a word
    monkeypatch.setattr(service, "READY_SECONDS", 1.0)
    assert "was not ready in time" in asyncio.run(dawdle(beating=True)).reason  # heartbeats alone


def test_a_client_that_is_not_ready_hears_that_the_run_is_over(host: Callable[..., Host]) -> None:
    one = host()

    async def decode() -> tuple[Any, Any]:
        async with Raw(one.port) as peer:
            answer = await peer.join()
            await asyncio.to_thread(one.stop)
            return answer, await peer.goodbye()

    answer, told = asyncio.run(decode())
    assert answer.HasField("welcome")
    assert told.code == Goodbye.FINISHED


def test_other_versions_of_the_protocol_are_named(
    host: Callable[..., Host], member: Callable[..., Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = host()
    told = refusal(one.port, protocol=PROTOCOL + 6)
    assert told.code == Goodbye.REFUSED
    assert f"the server speaks protocol version {PROTOCOL}, the client version {PROTOCOL + 6}" in told.reason
    monkeypatch.setattr(service, "PROTOCOL", PROTOCOL + 4)
    with pytest.raises(RunError, match=f"protocol version {PROTOCOL + 4}, this client version {PROTOCOL}"):
        member(one.port).end()


def test_a_client_that_does_not_know_the_codecs_is_refused(host: Callable[..., Host]) -> None:
    one = host({"traffic.latents": "int4", "traffic.gradients": "int8"})
    told = refusal(one.port, capabilities=["learn", "int8"])
    assert told.reason == "latents and gradients of this run travel as int4, which the client does not know"


def test_a_client_that_cannot_learn_is_refused(host: Callable[..., Host]) -> None:
    one = host()
    assert "needs clients that learn" in refusal(one.port, capabilities=["forward"]).reason
    assert "holds no images" in refusal(one.port, images=0).reason


# Violations


def nan() -> ClientMessage:
    wrong = np.ones((1, 2, *SHAPE), np.float32)
    wrong[0, 1, 2] = np.nan
    return latents_of(1, key=wrong)


GOOD = np.ones((1, 2, *SHAPE), np.float32)
BAD = {
    "nan": (nan, "key latents: a number is not finite"),
    "infinite": (lambda: latents_of(1, query=GOOD * np.inf), "query latents: a number is not finite"),
    "overflow": (lambda: latents_of(1, query=GOOD * 1e30), "query latents: a number is not finite, or far too large"),
    "huge": (lambda: latents_of(1, query=GOOD * 1e4), "the root mean square of an image's latent is 1e+04"),
    "shape": (
        lambda: latents_of(1, query=np.ones((1, 3, *SHAPE), np.float32)),
        r"shape [1, 3, 3] instead of [1, 2, 3]",
    ),
    "codec": (
        lambda: ClientMessage(latents=Latents(step=1, query=Coder("int8").pack(GOOD))),
        "query latents: codec 'int8' instead of fp32",
    ),
    "short": (
        lambda: ClientMessage(latents=Latents(step=1, query=Tensor(dtype="fp32", shape=[1, 2, 3], data=b"1234"))),
        "4 bytes instead of 24",
    ),
    "empty": (lambda: ClientMessage(latents=Latents(step=1)), "query latents: codec ''"),
    "step": (lambda: latents_of(2), "latents of step 2, and step 1 comes first"),
    "weights": (lambda: ClientMessage(weights=pack_weights({})), "weights that nobody asked for"),
    "join": (lambda: join_of(Hello(), 0), "a second join"),
    "ready": (lambda: READY, "a second ready"),
    "garbage": (lambda: b"\xff\xff\xff\xff", "a message of 4 bytes that cannot be read"),
    "nothing": (lambda: b"", "a message of no known kind"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_violation_ends_that_client_alone(
    name: str, host: Callable[..., Host], member: Callable[..., Member]
) -> None:
    make, reason = BAD[name]
    three = host()
    for number in (0, 1):
        member(three.port, client=number)

    async def misbehave() -> Goodbye:
        async with Raw(three.port) as peer:
            await peer.enter(2)
            await asyncio.to_thread(three.begin, 3)
            step = asyncio.ensure_future(asyncio.to_thread(three.step))
            assert await peer.draw() == 1
            await peer.say(make())
            told = await peer.goodbye()
            assert (await step).clients.tolist() == [0, 1]
            return told

    told = asyncio.run(misbehave())
    assert told.code == Goodbye.VIOLATION
    assert reason in told.reason
    for _ in range(3):
        assert three.step(sync=True).clients.tolist() == [0, 1]
    assert three.counts["violations"] == 1
    assert three.events("sent away", client=2, code="VIOLATION")
    assert [event["client"] for event in three.events("left")] == [2]


def test_latents_that_nobody_asked_for(host: Callable[..., Host], member: Callable[..., Member]) -> None:
    three = host()

    async def early() -> Goodbye:
        async with Raw(three.port) as peer:
            await peer.enter(2)
            await peer.say(latents_of(1))
            return await peer.goodbye()

    assert "latents that nobody asked for" in asyncio.run(early()).reason


def test_weights_that_are_not_as_asked_for(host: Callable[..., Host], member: Callable[..., Member]) -> None:
    three = host(heartbeat=60)  # the peer gives no sign of life between two messages
    for number in (0, 1):
        member(three.port, client=number)

    async def misbehave(tensors: dict[str, np.ndarray]) -> Goodbye:
        async with Raw(three.port) as peer:
            await peer.enter(2)
            if not three.steps:
                await asyncio.to_thread(three.begin, 3)
            work = asyncio.ensure_future(asyncio.to_thread(three.step, True))
            while (order := (await peer.hear()).order).HasField("draw") or not order.HasField("collect"):
                if order.HasField("draw"):
                    await peer.say(latents_of(order.draw.step))
            await peer.say(ClientMessage(weights=pack_weights(tensors, order.collect.number)))
            told = await peer.goodbye()
            assert (await work).clients.tolist() == [0, 1, 2]
            return told

    good = FakeWorker()
    good.momentum = True
    right = dict(good.weights())
    for tensors, reason in (
        (right | {"online.weight": right["online.weight"] * np.nan}, "weights online.weight: a number is not finite"),
        ({name: right[name] for name in list(right)[1:]}, "1 names are missing or unknown, such as 'online.weight'"),
        (right | {"online.more": np.ones(3, np.float32)}, "1 names are missing or unknown, such as 'online.more'"),
        (right | {"momentum.bias": np.ones(4, np.float32)}, "weights momentum.bias: shape [4] instead of [3]"),
        (right | {"momentum.bias": np.full(3, -1e6, np.float32)}, "weights momentum.bias: 1e+06 is far from those"),
    ):
        told = asyncio.run(misbehave(tensors))
        assert told.code == Goodbye.VIOLATION
        assert reason in told.reason
        after = three.cohort.average()
        assert all(tensor.eq(1).all() for tensor in after.values())  # of the two good ones


@pytest.mark.parametrize(
    ("ready", "reason"),
    [
        (Ready(images=0, sums=[1], squares=[1]), "0 images"),
        (Ready(images=2**40, sums=[1], squares=[1]), "images; accepted are 1 to"),
        (Ready(images=10, sums=[1, 1], squares=[1, 1]), "statistics of 2 channels; the images have 1"),
        (Ready(images=10, sums=[64_000], squares=[0]), "statistics that no images have"),
        (Ready(images=10, sums=[640_000], squares=[2**60]), "statistics that no images have"),
        (Ready(images=1, sums=[2**50], squares=[2**57]), "statistics that no images have"),
    ],
    ids=str,
)
def test_statistics_that_cannot_be(ready: Ready, reason: str, host: Callable[..., Host]) -> None:
    one = host()

    async def enter() -> Goodbye:
        async with Raw(one.port) as peer:
            assert (await peer.join()).HasField("welcome")
            await peer.say(ClientMessage(ready=ready))
            return (await peer.hear()).goodbye

    told = asyncio.run(enter())
    assert told.code == Goodbye.VIOLATION
    assert reason in told.reason
    assert one.cohort.present == 0


def test_too_many_heartbeats(host: Callable[..., Host]) -> None:
    one = host(heartbeat=30.0)

    async def flood() -> Goodbye:
        async with Raw(one.port) as peer:
            await peer.enter()
            for _ in range(11):  # after the last of these nobody listens
                await peer.say(ClientMessage(heartbeat=Heartbeat()))
            return await peer.goodbye()

    assert asyncio.run(flood()).reason == "too many heartbeats"


def test_a_message_larger_than_any_that_is_due_ends_the_connection(
    host: Callable[..., Host], member: Callable[..., Member]
) -> None:
    two = host({"clients.number": 2})
    member(two.port, client=0)

    async def flood() -> grpc.StatusCode:
        async with Raw(two.port) as peer:
            await peer.enter(1)
            await asyncio.to_thread(two.begin, 2)
            await peer.say(b"\0" * (two.service.largest + 1))
            with pytest.raises(grpc.RpcError) as caught:
                await peer.hear()
            return caught.value.code()

    assert asyncio.run(flood()) == grpc.StatusCode.RESOURCE_EXHAUSTED
    eventually(lambda: two.cohort.present == 1)
    assert two.step().clients.tolist() == [0]


def test_a_compressed_message_is_not_inflated(host: Callable[..., Host]) -> None:
    one, zeros = host(), bytes(2**20)
    assert len(zeros) > one.service.largest  # inflated; compressed, it would pass

    async def send() -> Any:
        async with Raw(one.port, compression=grpc.Compression.Gzip) as peer:
            assert (await peer.hear()).HasField("hello")
            await peer.say(zeros)
            return await peer.goodbye()

    told = asyncio.run(send())
    assert told.code == Goodbye.VIOLATION
    assert "cannot be read" in told.reason


def test_bytes_before_a_join(host: Callable[..., Host]) -> None:
    one = host()

    async def first(message: ClientMessage | bytes) -> Goodbye:
        async with Raw(one.port) as peer:
            await peer.hear()
            await peer.say(message)
            return (await peer.hear()).goodbye

    assert "bytes before a join" in asyncio.run(first(b"\0" * 65_537)).reason
    assert "expected a join, not heartbeat" in asyncio.run(first(ClientMessage(heartbeat=Heartbeat()))).reason
    big = ClientMessage(latents=Latents(step=1, query=Coder().pack(np.ones(3, np.float32))))
    assert "expected a join, not latents" in asyncio.run(first(big)).reason
    assert one.counts["violations"] == 3


# TLS


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def secured(host: Callable[..., Host], authority: trustme.CA, tmp_path: Path) -> Callable[..., Host]:
    """Makes servers with TLS."""
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")

    def make(not_after: datetime.datetime | None = None, **settings: Any) -> Host:
        own = authority.issue_cert("127.0.0.1", not_after=not_after)
        own.private_key_pem.write_to_path(tmp_path / "key.pem")
        (tmp_path / "cert.pem").write_bytes(b"".join(blob.bytes() for blob in own.cert_chain_pems))
        return host({"clients.number": 1}, tls_cert=tmp_path / "cert.pem", tls_key=tmp_path / "key.pem", **settings)

    return make


def test_tls(secured: Callable[..., Host], member: Callable[..., Member], tmp_path: Path) -> None:
    one = secured()
    member(one.port, tls_ca=tmp_path / "ca.pem")
    one.begin(1)
    assert one.step().clients.tolist() == [0]


def test_a_server_of_another_authority_is_not_trusted(
    secured: Callable[..., Host], member: Callable[..., Member], tmp_path: Path
) -> None:
    one = secured()
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    with pytest.raises(RunError, match="the server's certificate is not accepted"):
        member(one.port, tls_ca=tmp_path / "other.pem").end()
    assert not one.told


def test_an_expired_certificate(secured: Callable[..., Host], member: Callable[..., Member], tmp_path: Path) -> None:
    one = secured(not_after=datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))
    with pytest.raises(RunError, match="the server's certificate is not accepted"):
        member(one.port, tls_ca=tmp_path / "ca.pem").end()


def test_without_tls_nobody_talks_to_a_server_with_it(
    secured: Callable[..., Host], member: Callable[..., Member]
) -> None:
    one = secured()
    with pytest.raises(RunError, match=r"no run at 127\.0\.0\.1:\d+ for \d+ s: UNAVAILABLE"):
        member(one.port, plain=True, give_up=0.1).end()
    assert not one.told


def test_mutual_tls(
    secured: Callable[..., Host], member: Callable[..., Member], authority: trustme.CA, tmp_path: Path
) -> None:
    one = secured(tls_client_ca=tmp_path / "ca.pem")
    with pytest.raises(RunError, match="no run at"):
        member(one.port, tls_ca=tmp_path / "ca.pem", give_up=0.1).end()
    for name, ca in (("wrong", trustme.CA()), ("right", authority)):
        own = ca.issue_cert("client-0")
        own.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        own.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.pem")
    settings = {"tls_ca": tmp_path / "ca.pem", "give_up": 0.1}
    with pytest.raises(RunError, match="no run at"):
        member(one.port, tls_cert=tmp_path / "wrong.pem", tls_key=tmp_path / "wrong.key", **settings).end()
    assert not one.told
    member(one.port, tls_cert=tmp_path / "right.pem", tls_key=tmp_path / "right.key", **settings)
    one.begin(1)
    assert one.step().clients.tolist() == [0]


def test_what_the_server_cannot_use_is_named(host: Callable[..., Host], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"tls_key=.*missing\.pem: cannot be read"):
        host(tls_cert=tmp_path / "missing.pem", tls_key=tmp_path / "missing.pem")
    with pytest.raises(SettingError, match="no client is enrolled there"):
        host(clients_file=tmp_path / "nobody.json")
    one = host()
    with pytest.raises(RunError, match=r"cannot listen on 127\.0\.0\.1:\d+"):
        host(listen=f"127.0.0.1:{one.port}")


def test_hosts_of_peers() -> None:
    assert host_of("ipv4:10.0.0.7:4711") == "10.0.0.7"
    assert host_of("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:4711") == "2001:db8:1:2::/64"
    assert host_of("ipv6:[2001:db8:1:2:9:9:9:9]:1") == "2001:db8:1:2::/64"
    assert host_of("ipv6:%5B2001:db8::a:b%5D:4711") == host_of("ipv6:%5B2001:db8::c:d%5D:1") == "2001:db8::/64"
