"""What clients are asked for, and how much at a time."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from peers import FakeWorker, Host, Member, Raw, eventually, latents_of
from torch import nn
from workers import learned_twice

from mocosfl.clients import Stopped
from mocosfl.errors import RunError

FROZEN = {"clients.number": 2, "clients.frozen": True}


@contextmanager
def training(host: Host, steps: int) -> Iterator[threading.Thread]:
    """So many steps in a thread."""

    def train() -> None:
        try:
            for _ in range(steps):
                host.step()
        except Stopped:
            pass

    thread = threading.Thread(target=train)
    thread.start()
    try:
        yield thread
    finally:
        host.stopping = True
        thread.join()


@pytest.mark.parametrize("ahead", [1, 3])
def test_a_frozen_client_never_owes_more_than_it_may(
    ahead: int, host: Callable[..., Host], member: Callable[..., Member]
) -> None:
    two = host(FROZEN, ahead=ahead, quorum=1.0)
    fast = member(two.port, client=1)
    steps = 15

    async def slowly() -> list[int]:
        owed, answered = [], []
        async with Raw(two.port) as peer:
            await peer.enter(0)
            await asyncio.to_thread(two.begin, 2)
            two.follow(steps)
            with training(two, steps) as thread:
                while len(answered) < steps:
                    while len(owed) < min(ahead, steps - len(answered)):
                        owed.append(await peer.draw())
                    assert len(two.service.sessions[0].asked) <= ahead
                    answered.append(owed.pop(0))
                    await peer.say(latents_of(answered[-1]))
                await asyncio.to_thread(thread.join)
            await asyncio.to_thread(two.stop)
            told = await peer.goodbye()
            assert told.reason == "the run is over"
        return answered

    assert asyncio.run(slowly()) == list(range(1, steps + 1))
    fast.end()
    assert fast.worker.steps("draw") == list(range(1, steps + 1))
    assert not fast.worker.steps("learn")
    assert fast.worker.calls[0] == ("take", True)
    assert [call[0] for call in fast.worker.calls].count("take") == 1


def test_a_client_that_does_not_read_keeps_nobody_waiting(
    host: Callable[..., Host], member: Callable[..., Member]
) -> None:
    """Its orders do not pile up either."""
    names = {"weight": (500, 500), "bias": (500,)}
    three = host(half=nn.Linear(500, 500), step_timeout=0.3, heartbeat=0.5)
    members = [member(three.port, FakeWorker(names=names), client=number) for number in (0, 1)]

    async def deaf() -> None:
        async with Raw(three.port) as peer:
            await peer.enter(2)
            await asyncio.to_thread(three.begin, 3)
            for _ in range(6):
                latents = await asyncio.to_thread(three.step, True)
                assert latents.clients.tolist() == [0, 1]
            session = three.service.sessions.get(2)
            assert session is None or session.outbox.qsize() <= 1
            eventually(lambda: three.cohort.present == 2)  # it says nothing either

    asyncio.run(deaf())
    three.stop()
    for one in members:
        one.end()
        assert not learned_twice(one.worker.calls)
        assert one.worker.steps("learn") == [1, 2, 3, 4, 5, 6]


def test_who_hangs_does_not_keep_those_behind_from_being_asked(
    host: Callable[..., Host], member: Callable[..., Member]
) -> None:
    three = host(step_timeout=0.5, heartbeat=30.0)
    three.exchange._most_transit = three.exchange._message  # one at a time
    for number in (1, 2):
        member(three.port, client=number)

    async def hang() -> None:
        async with Raw(three.port) as peer:
            await peer.enter(0)
            await asyncio.to_thread(three.begin, 3)
            for _ in range(3):
                latents = await asyncio.to_thread(three.step)
                assert latents.clients.tolist() == [1, 2]

    asyncio.run(hang())
    assert three.counts["stragglers"] == 1


def test_latents_lie_where_their_clients_sit(host: Callable[..., Host], member: Callable[..., Member]) -> None:
    """Also with rich clients and some away; gradients come back to whom they belong."""
    rich = {"clients.number": 4, "clients.rich_share": 0.5, "clients.rich_batch_factor": 2}
    four = host(rich, step_timeout=0.5)
    got: dict[int, list[np.ndarray]] = {}

    class Marked(FakeWorker):
        def __init__(self, number: int) -> None:
            super().__init__((1, 4 if number > 1 else 2, 3))
            self.number = number
            self.drawing = lambda step: (np.full(self.shape, number + step / 100, np.float32),) * 2

        def learn(self, step: int, gradient: np.ndarray, lr: float) -> None:
            super().learn(step, gradient, lr)
            got.setdefault(self.number, []).append(gradient.copy())

    members = [member(four.port, Marked(number), client=number) for number in range(4)]
    four.begin(4)
    latents = four.step()
    assert latents.sizes.tolist() == [2, 2, 4, 4]
    expected = torch.tensor([0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]) + 0.01
    torch.testing.assert_close(latents.query[0, :, 0], expected)
    members[1].leave()
    eventually(lambda: four.cohort.present == 3)
    latents = four.step()
    assert latents.clients.tolist() == [0, 2, 3]
    expected = torch.tensor([0, 0, 2, 2, 2, 2, 3, 3, 3, 3]) + 0.02
    torch.testing.assert_close(latents.query[0, :, 0], expected)
    four.step(sync=True)
    for number in (0, 2, 3):
        assert [float(gradient.min()) for gradient in got[number]] == [
            pytest.approx(number + step / 100) for step in (1, 2, 3)
        ]
        assert all(gradient.min() == gradient.max() for gradient in got[number])


def test_draws_go_on_where_they_were(host: Callable[..., Host], member: Callable[..., Member]) -> None:
    """No image is left out or drawn twice by who is there, and a state tells where everybody is."""
    two = host({"clients.number": 2})
    members = [member(two.port, client=number) for number in range(2)]
    two.begin(2)
    for _ in range(3):
        two.step()
    state = two.cohort.state_dict()
    assert state["drawn"].tolist() == [6, 6]
    assert state["step"] == 3
    for one in members:
        assert [call[2] for call in one.worker.calls if call[0] == "draw"] == [0, 2, 4]


def test_a_state_of_frozen_clients_leaves_out_what_was_drawn_ahead(
    host: Callable[..., Host], member: Callable[..., Member]
) -> None:
    two = host(FROZEN, ahead=4)
    members = [member(two.port, client=number) for number in range(2)]
    two.begin(2)
    for _ in range(3):
        two.step()
    eventually(lambda: all(len(one.worker.steps("draw")) == 6 for one in members))
    assert two.cohort.state_dict()["drawn"].tolist() == [6, 6]


def test_sampled_pools_take_others_for_those_who_are_away(
    host: Callable[..., Host], member: Callable[..., Member]
) -> None:
    six = host({"clients.number": 6, "clients.pool": 3})
    members = [member(six.port, client=number) for number in (0, 2, 3, 5)]
    six.begin(4)
    six.cohort.activate(np.array([1, 3, 4]))
    for _ in range(3):
        clients = six.step().clients.tolist()
        assert len(clients) == 3
        assert 3 in clients
        assert set(clients) <= {0, 2, 3, 5}
    six.cohort.synchronise()
    six.cohort.activate(np.array([0, 2, 5]))
    assert six.step().clients.tolist() == [0, 2, 5]
    for one in members:
        assert not learned_twice(one.worker.calls)


def test_who_claims_more_images_than_there_is_room_for_is_refused(
    host: Callable[..., Host], member: Callable[..., Member]
) -> None:
    changes = {"clients.frozen": True, "clients.init": "a run", "cache.views": 2, "clients.number": 2}
    one = host(changes)
    member(one.port, client=0)
    one.begin(1)
    one.exchange.room = 15
    with pytest.raises(RunError, match="keeps latents of each image, and has no room for those of 10 more"):
        member(one.port, client=1).end()
    assert one.step().clients.tolist() == [0]
