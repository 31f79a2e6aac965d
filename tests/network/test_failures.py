"""Clients, servers and networks fail: the run goes on, and no update is applied twice."""

import asyncio
import json
import random
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peers import (
    SOAK,
    Commands,
    FakeWorker,
    Host,
    Loop,
    Member,
    Proxy,
    Raw,
    eventually,
    lines,
    losses,
    saved_step,
)
from workers import learned_twice

from mocosfl.models import build
from mocosfl.network import service
from mocosfl_device import client
from tiny import digits

ROUNDS = 20 if SOAK else 1
"""How often what happens at random moments is repeated."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes back does so at once; the tests cut more connections than the rate limits allow."""
    monkeypatch.setattr(client, "LONGEST_WAIT", 0.5)
    monkeypatch.setattr(service, "JOINS", 10_000)
    monkeypatch.setattr(service, "MISSES", 10_000)


def present(host: Host, count: int) -> None:
    eventually(lambda: host.cohort.present == count, f"{count} clients")


def test_a_third_of_the_clients_is_killed_and_comes_back(host: Callable[..., Host], start: Commands) -> None:
    six = host({"clients.number": 6})
    stay, leave = start.fakes(six.port, 0, 1, 2, 3), start.fakes(six.port, 4, 5)
    six.begin(6)
    for _ in range(3):
        assert six.step().clients.tolist() == [0, 1, 2, 3, 4, 5]
    for number in range(ROUNDS):
        leave.kill()
        for _ in range(5):
            assert set(six.step(sync=True).clients.tolist()) >= {0, 1, 2, 3}
        present(six, 4)
        assert six.step().clients.tolist() == [0, 1, 2, 3]
        leave = start.fakes(six.port, 4, 5)
        present(six, 6)
        assert six.step().clients.tolist() == [0, 1, 2, 3, 4, 5]
        assert six.counts["joined"] == 8 + 2 * number
    assert {event["client"] for event in six.events("left")} == {4, 5}
    assert six.counts["stragglers"] == six.counts["violations"] == 0
    six.stop()
    for crew in (stay, leave):
        crew.ends_well()


def test_a_killed_client_that_never_returns(
    host: Callable[..., Host], member: Callable[..., Member], start: Commands
) -> None:
    three = host()
    members = [member(three.port, client=number) for number in (0, 1)]
    third = start.fakes(three.port, 2)
    three.begin(3)
    three.step()
    third.kill()
    for _ in range(20):
        three.step(sync=True)
    assert three.step().clients.tolist() == [0, 1]
    three.stop()
    for one in members:
        one.end()
        assert not learned_twice(one.worker.calls)
        assert len(one.worker.steps("draw")) == 22


def test_a_client_that_vanishes_in_a_step_is_not_waited_for(
    host: Callable[..., Host], member: Callable[..., Member]
) -> None:
    """If it is back before the step ends, it is asked for the same images."""
    three = host(step_timeout=3600.0)
    hold = threading.Event()
    slow = FakeWorker()
    slow.drawing = lambda step: hold.wait(150) and None
    member(three.port, client=0)
    member(three.port, slow, client=1)

    async def vanish() -> None:
        asked = []
        async with Raw(three.port) as peer:
            await peer.enter(2)
            await asyncio.to_thread(three.begin, 3)
            step = asyncio.ensure_future(asyncio.to_thread(three.step))
            asked.append((await peer.hear()).order)
        async with Raw(three.port) as peer:
            await peer.enter(2)
            asked.append((await peer.hear()).order)
        assert [order.draw.step for order in asked] == [1, 1]
        assert [order.draw.first for order in asked] == [0, 0]
        assert all(order.weights.restart for order in asked)
        await asyncio.to_thread(eventually, lambda: three.cohort.present == 2)
        hold.set()
        assert (await step).clients.tolist() == [0, 1]

    asyncio.run(vanish())
    assert three.step().clients.tolist() == [0, 1]
    assert three.counts["stragglers"] == three.counts["late"] == 0


def test_a_stopped_client_is_waited_for_then_sent_away_then_comes_back(
    host: Callable[..., Host], member: Callable[..., Member], start: Commands
) -> None:
    three = host(heartbeat=0.7, step_timeout=0.5)
    for number in (0, 1):
        member(three.port, client=number)
    third = start.fakes(three.port, 2)
    three.begin(3)
    assert len(three.step().clients) == 3
    third.signal(signal.SIGSTOP)
    began = time.monotonic()
    assert three.step().clients.tolist() == [0, 1]
    assert time.monotonic() - began >= 0.5  # it was waited for
    assert three.counts["stragglers"] == 1
    assert three.events("straggler", client=2)
    eventually(lambda: three.counts["silent"] == 1)
    present(three, 2)
    assert three.events("sent away", client=2, code="BUSY")
    third.signal(signal.SIGCONT)
    present(three, 3)
    assert eventually(lambda: three.step().clients.tolist() == [0, 1, 2])
    assert not [event for event in three.events("left") if event["client"] != 2]
    three.stop()
    assert "nothing was heard" in third.ends_well()


def test_connections_are_reset_at_random_moments(
    host: Callable[..., Host], member: Callable[..., Member], proxy: Callable[[int], Proxy]
) -> None:
    """Steps go on with the quorum, and no gradient is applied twice."""
    four = host({"clients.number": 4}, quorum=0.25, step_timeout=2.0)
    unsafe = proxy(four.port)
    members = [member(four.port if number == 0 else unsafe.port, client=number) for number in range(4)]
    four.begin(4)
    chance = random.Random(0)
    for round_ in range(40 * ROUNDS):
        if round_ % 8 == 2:  # in the middle of a step, somewhere
            unsafe.loop.loop.call_soon_threadsafe(
                unsafe.loop.loop.call_later, chance.uniform(0, 0.02), lambda: unsafe.cut(chance)
            )
        if round_ % 8 == 7:
            present(four, 4)
        latents = four.step(sync=round_ % 3 == 0)
        assert 0 in latents.clients
        assert torch.isfinite(latents.query).all()
    present(four, 4)
    assert eventually(lambda: four.step().clients.tolist() == [0, 1, 2, 3])
    assert unsafe.connections > 3 + 2 * ROUNDS
    assert four.counts["violations"] == 0
    assert not [event for event in four.events("left") if event["client"] == 0]
    four.stop()
    for one in members:
        one.end()
        assert not learned_twice(one.worker.calls)
        assert one.worker.steps("learn")


def test_half_open_connections(
    host: Callable[..., Host],
    member: Callable[..., Member],
    proxy: Callable[[int], Proxy],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is sent vanishes and nobody is told: either side finds out by itself."""
    options = client.channel_options

    def impatient(largest: int) -> list[tuple[str, int]]:
        quick = {"grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms"}
        slow = dict(options(largest))
        pings = {"grpc.http2.min_recv_ping_interval_without_data_ms": 500}
        return list((slow | dict.fromkeys(quick & slow.keys(), 1000) | pings).items())

    monkeypatch.setattr(client, "HELLO_SECONDS", 3)
    monkeypatch.setattr(client, "channel_options", impatient)
    monkeypatch.setattr(service, "channel_options", impatient)
    two = host({"clients.number": 2}, heartbeat=1.0, step_timeout=0.5)
    unsafe = proxy(two.port)
    member(two.port, client=0)
    lost = member(unsafe.port, client=1)
    two.begin(2)
    assert len(two.step().clients) == 2
    unsafe.hole = True
    for _ in range(3):
        assert two.step().clients.tolist() == [0]
    present(two, 1)
    eventually(lambda: any("trying again" in text for text in lost.said))
    unsafe.hole = False
    present(two, 2)
    assert eventually(lambda: two.step().clients.tolist() == [0, 1])
    assert not learned_twice(lost.worker.calls)


def test_late_messages_are_counted_and_change_nothing(host: Callable[..., Host], member: Callable[..., Member]) -> None:
    """5 % of the latents come seconds late."""
    steps = 1000 if SOAK else 40
    five = host({"clients.number": 5}, step_timeout=0.3)
    members, slow = [], random.Random(1)
    for number in range(5):
        worker = FakeWorker()
        late = {step for step in range(2, steps) if number and slow.random() < 0.05} | ({5} if number == 1 else set())
        worker.drawing = lambda step, late=late: time.sleep(1.5) if step in late else None
        members.append(member(five.port, worker, client=number))
    five.begin(5)
    for step in range(steps):
        assert 0 in five.step(sync=step % 4 == 3).clients
    eventually(lambda: five.counts["late"] >= five.counts["stragglers"])
    assert five.counts["stragglers"] == len(five.events("straggler")) >= 1
    assert five.counts["late"] >= len(five.events("late")) >= 1
    assert five.counts["violations"] == five.counts["left"] == 0
    five.stop()
    for one in members:
        one.end()
        assert not learned_twice(one.worker.calls)


def test_a_client_at_rest_is_called_when_nobody_else_is_there(
    host: Callable[..., Host], member: Callable[..., Member]
) -> None:
    """Who was late again and again rests for many steps, but not where the quorum needs it."""
    three = host(step_timeout=0.2)
    slow = FakeWorker()
    slow.drawing = lambda step: time.sleep(1.0) if step < 40 else None
    members = [member(three.port, client=0), member(three.port, client=1), member(three.port, slow, client=2)]
    three.begin(3)
    while three.steps < 60 and three.counts["stragglers"] < 4:
        three.step()
        time.sleep(0.1)
    resting = three.service.sessions[2]
    assert resting.sits_out > three.steps + 1
    eventually(lambda: not resting.asked)
    members[1].leave()
    present(three, 2)
    assert three.step().clients.tolist() == [0, 2]


# The server


@pytest.fixture
def crew(loop: Loop) -> Callable[..., list[Member]]:
    """Clients that compute nothing, of a run on digits."""

    def make(port: int, config: object) -> list[Member]:
        model = build(config.model, 1, 8, config.seed)
        names = {name: tuple(tensor.shape) for name, tensor in model.client.state_dict().items()}
        shape = (1, config.clients.batch, *model.latent_shape)
        workers = [FakeWorker(shape, names, images=431) for _ in range(config.clients.number)]
        return [Member(loop, port, worker, client=number) for number, worker in enumerate(workers)]

    return make


def assert_ended(members: list[Member], run: Path, steps: int) -> None:
    """The run has ended with a result, and every client learned what it should, once."""
    for one in members:
        one.end()
        assert not learned_twice(one.worker.calls)
        assert one.worker.steps("learn")
    assert json.loads((run / "result.json").read_text())["steps"] == steps
    assert sorted(losses(run)) == list(range(1, steps + 1))


def test_a_server_killed_in_a_step_and_in_a_checkpoint_goes_on(
    start: Commands, crew: Callable[..., list[Member]], tmp_path: Path
) -> None:
    epochs = 6.0 if SOAK else 0.6
    config = digits(**{"train.epochs": epochs, "train.checkpoint_every": 1, "sync.every": 3})
    run = tmp_path / "run"
    server = start.serve(config)
    port = server.port()
    members = crew(port, config)
    eventually(lambda: saved_step(run) > 3)

    # in a step: a client is computing its latents
    for _ in range(ROUNDS):
        inside: list[int] = []

        def computes(step: int, inside: list[int] = inside) -> None:
            if not inside:
                inside.append(step)
                time.sleep(0.5)

        members[0].worker.drawing = computes
        eventually(lambda inside=inside: inside, "a step")
        before = len(members[0].worker.calls)
        server.kill()
        assert saved_step(run) == inside[0] - 1
        server = start.serve(None, port=port)
        server.until(r"resuming .* at step")
        eventually(lambda before=before: len(members[0].worker.calls) > before + 2, "a step after the resume")

    # in a checkpoint: its file is there under another name
    for _ in range(ROUNDS):
        kept = saved_step(run)
        eventually(lambda kept=kept: saved_step(run) > kept, "a checkpoint")

        def half_written(server: object = server) -> bool:
            if not list(run.glob("checkpoints/.*.tmp")):
                return False
            server.signal(signal.SIGSTOP)
            if list(run.glob("checkpoints/.*.tmp")):
                return True
            server.signal(signal.SIGCONT)
            return False

        deadline = time.monotonic() + 150
        while not half_written():
            assert time.monotonic() < deadline
            assert server.process.poll() is None, server.said[-2000:]
        server.kill()
        assert list(run.glob("checkpoints/.*.tmp"))
        server = start.serve(None, port=port)
        server.until(r"resuming .* at step")
    server.ends_well()
    assert not list(run.glob("checkpoints/.*.tmp"))
    assert_ended(members, run, round(epochs * (3 * 431 / 12)))


@pytest.mark.soak
def test_a_full_disk_ends_the_server_with_a_clear_error(
    start: Commands, crew: Callable[..., list[Member]], tmp_path: Path
) -> None:
    config = digits(**{"model.width": 16, "model.head": "small", "train.epochs": 0.1})

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    server = start.serve(config, preexec_fn=full)
    port = server.port()
    members = crew(port, config)
    assert server.end() == 1
    assert "cannot write a checkpoint" in server.said
    assert "no checkpoint has been written in" in server.said
    assert "Traceback" not in server.said
    assert not list((tmp_path / "run/checkpoints").iterdir())
    again = start.serve(None, port=port)
    again.ends_well()
    assert_ended(members, tmp_path / "run", 11)
    assert any("the server is stopping" in text for text in members[0].said)


def test_a_server_that_is_asked_to_stop_is_waited_for(
    start: Commands, crew: Callable[..., list[Member]], tmp_path: Path
) -> None:
    config = digits(**{"train.epochs": 0.6})
    server = start.serve(config)
    port = server.port()
    members = crew(port, config)
    eventually(lambda: len(losses(tmp_path / "run")) > 3)
    server.signal(signal.SIGTERM)
    assert server.end() == 130
    assert "everything up to here is saved" in server.said
    again = start.serve(None, port=port)
    again.ends_well()
    assert_ended(members, tmp_path / "run", 65)
    left = [line for line in lines(tmp_path / "run/events.jsonl") if line["event"] == "sent away"]
    assert {line["code"] for line in left} == {"STOPPED", "FINISHED"}


def test_a_step_that_is_learned_twice_is_found() -> None:
    good = [("take", True), ("draw", 1, 0), ("learn", 1), ("take", False), ("draw", 1, 0), ("learn", 1)]
    assert not learned_twice(good)
    assert learned_twice([*good, ("learn", 1)]) == [1]
    assert learned_twice([("draw", 1, 0), ("draw", 2, 2), ("learn", 1)]) == [1]
