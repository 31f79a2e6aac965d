"""Frozen clients under Flower: the same numbers as simulated ones, and what happens when they fail."""

import json
import re
import threading
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

import torch
from flwr.app import Array, Error, Message
from nodes import Nodes, figures, losses, parts, run
from rich.console import Console

import mocosfl
from mocosfl.config import Config
from mocosfl.data.federation import export, federate
from mocosfl.errors import RunError, SettingError
from mocosfl.flower.cohort import FlowerCohort
from mocosfl.flower.records import JOIN, LATENTS
from mocosfl.flower.serving import serve
from mocosfl.flower.settings import FlowerSettings
from mocosfl.trainer import Callback, Trainer
from tiny import digits

pytestmark = pytest.mark.usefixtures("quick")


def frozen(half: str, **changes: object) -> Config:
    return digits(**{"clients.frozen": True, "clients.init": half} | changes)


def assert_equal_runs(ours: Path, theirs: Path) -> None:
    one, two = losses(ours), losses(theirs)
    assert one.keys() == two.keys()
    assert len(one) > 10
    assert [one[step] for step in two] == pytest.approx(list(two.values()), rel=2e-5)


class At(Callback):
    """Does something after a step."""

    def __init__(self, step: int, what: Callable[[Trainer], None]) -> None:
        self.step, self.what = step, what

    def after_step(self, trainer: Trainer, metrics: dict[str, torch.Tensor]) -> None:
        if trainer.step == self.step:
            self.what(trainer)


POOL = {"clients.number": 6, "clients.pool": 3, "clients.round": 4}
RUNS: dict[str, dict[str, object]] = {
    "plain": {},
    "pool": POOL | {"clients.rich_share": 0.34, "clients.rich_batch_factor": 3},
    "int4": {"traffic.latents": "int4", "traffic.zstd": True},
    "cache": {"cache.views": 2, "clients.batch": 64, "train.epochs": 1.8},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_under_flower_equals_the_simulated_one(name: str, half: str, tmp_path: Path) -> None:
    config = frozen(half, **RUNS[name])
    nodes = Nodes(parts(config.clients.number))
    result = run(config, nodes, tmp_path, steps=5)
    mocosfl.train(config, tmp_path / "simulated")
    assert_equal_runs(tmp_path / "run", tmp_path / "simulated")
    assert result.finished
    assert json.loads((tmp_path / "run/data.json").read_text())["kind"] == "flower"
    told = figures(tmp_path / "run")
    assert told["failures"] == 0
    assert told["clients"] == config.clients.number
    steps = len(losses(tmp_path / "simulated"))
    if name == "cache":
        steps = json.loads((tmp_path / "run/result.json").read_text())["asked"]["upload"]
    chunks = -(-steps // (4 if name == "pool" else 5))
    assert told["chunks"] == chunks
    assert len(nodes.asked(LATENTS)) == chunks * config.pool
    if name in ("plain", "int4"):  # 2 latents of 4x8x8 numbers for 4 images of each client and step
        images = 2 * 12 * steps
        assert told["bytes_in"] == images * 1024 if name == "plain" else told["bytes_in"] < images * 144


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Each client's images."""
    return [str(path) for path in export(federate(digits(), lambda _: None), tmp_path / "parts")]


def test_clients_with_images_of_their_own_equal_simulated_ones(half: str, folders: list[str], tmp_path: Path) -> None:
    """Folders in place of the recipe's partition; one node leaves it to the server which client it is."""
    config = frozen(half)
    nodes = Nodes([{"data": folders[0], "client": 0}, {"data": folders[1], "client": 1}])

    def last(node: int, message: Message, reply: Message) -> Message:
        if len(nodes.asked(JOIN)) == 2:  # when the others have said who they are
            nodes.there[2000] = {"data": folders[2]}
        return reply

    nodes.spoil = last
    run(config, nodes, tmp_path, steps=6)
    mocosfl.train(config, tmp_path / "simulated")
    assert_equal_runs(tmp_path / "run", tmp_path / "simulated")


def test_who_comes_late_takes_part_from_the_next_chunk_on(half: str, tmp_path: Path) -> None:
    nodes = Nodes(parts(3))
    late = nodes.there.pop(1002)
    seen: list[tuple[int, int]] = []

    class Watch(Callback):
        def after_step(self, trainer: Trainer, metrics: dict[str, torch.Tensor]) -> None:
            current = trainer.cohort._current  # type: ignore[attr-defined]
            seen.append((trainer.step, len(current.clients)))
            if trainer.step == 1:
                nodes.there[1002] = late

    run(frozen(half, **{"train.epochs": 0.4}), nodes, tmp_path, steps=4, min_clients=2, callbacks=(Watch(),))
    assert [count for step, count in seen if step <= 4] == [2] * 4
    assert seen[-1][1] == 3
    assert figures(tmp_path / "run")["failures"] == 0


def test_a_node_that_dies_does_not_end_the_run(half: str, tmp_path: Path) -> None:
    nodes = Nodes(parts(3))
    run(frozen(half), nodes, tmp_path, steps=4, callbacks=(At(5, lambda trainer: nodes.there.pop(1001)),))
    told = figures(tmp_path / "run")
    assert told["clients"] == 2
    assert told["chunks"] == 6
    assert told["answers"] < 18
    assert len(losses(tmp_path / "run")) == 22


def test_a_node_that_comes_back_takes_its_client_over(half: str, tmp_path: Path) -> None:
    nodes = Nodes(parts(3))
    first: dict[int, list[int]] = {}

    def restart(trainer: Trainer) -> None:
        nodes.there[2000] = nodes.there.pop(1001)

    run(frozen(half), nodes, tmp_path, steps=4, callbacks=(At(5, restart),))
    for message in nodes.sent:
        if message.metadata.message_type == LATENTS:
            ask: Any = message.content["ask"]
            first.setdefault(ask["client"], []).append(ask["first"])
    assert 2000 in nodes.asked(LATENTS)
    assert figures(tmp_path / "run")["clients"] == 3
    draws = first[1]
    assert draws == sorted(draws)
    assert {later - earlier for earlier, later in pairwise(draws)} <= {0, 16}  # no image is skipped


def said_of(config: Config, nodes: Nodes, folder: Path, name: str = "run", **more: Any) -> str:
    """What a run prints, in one line."""
    path = folder / "said"
    with path.open("w") as file:
        run(config, nodes, folder, name, console=Console(file=file, width=200), **more)
    return " ".join(path.read_text().split())


def test_a_bad_answer_is_one_of_a_node_that_failed(half: str, tmp_path: Path) -> None:
    nodes = Nodes(parts(3))

    def cut_short(node: int, message: Message, reply: Message) -> Message:
        if node == 1001 and message.metadata.message_type == LATENTS:
            record: Any = reply.content["latents"]
            whole = record["query"]
            record["query"] = Array(whole.dtype, whole.shape, whole.stype, whole.data[:-4])
        return reply

    nodes.spoil = cut_short
    said = said_of(frozen(half, **{"train.epochs": 0.04}), nodes, tmp_path, steps=4)
    assert "client 1 has failed: query latents: 16380 bytes instead of 16384" in said
    told = figures(tmp_path / "run")
    assert (told["failures"], told["answers"]) == (2, 2)
    assert losses(tmp_path / "run").keys() == {1, 2, 3, 4}


def test_two_nodes_with_one_number_do_not_displace_each_other_for_ever(half: str, tmp_path: Path) -> None:
    nodes = Nodes([*parts(3), parts(3)[1]])

    def keep_back(node: int, message: Message, reply: Message) -> Message | None:
        assert len(nodes.asked(JOIN)) < 50
        return None if message.metadata.message_type == LATENTS and node in (1001, 1003) else reply

    nodes.spoil = keep_back
    run(frozen(half, **{"train.epochs": 0.04}), nodes, tmp_path, steps=2, timeout=0.3)
    assert sorted(nodes.asked(JOIN)) == [1000, 1001, 1002, 1003]


def test_a_client_that_is_asked_afresh_for_ever_does_not_keep_a_chunk_open(half: str, tmp_path: Path) -> None:
    nodes = Nodes(parts(3))

    def move(node: int, message: Message, reply: Message) -> Message | None:
        """Client 1 leaves whenever it is to compute, and is there again at once under another id."""
        assert len(nodes.sent) < 200
        if message.metadata.message_type != LATENTS or node in (1000, 1002):
            return reply
        if (own := nodes.there.pop(node, None)) is not None:
            nodes.there[node + 1000] = own
        return None

    nodes.spoil = move
    run(frozen(half, **{"train.epochs": 0.02}), nodes, tmp_path, steps=2, timeout=0.3)
    assert figures(tmp_path / "run")["answers"] == 2


def test_an_answer_that_cannot_be_put_together_is_one_of_a_node_that_failed(
    half: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mocosfl.flower.cohort.PULLS", 1)  # all answers are fetched together
    nodes, broken = Nodes(parts(3)), []

    def spoil(node: int, message: Message, reply: Message) -> Message:
        if node == 1001 and message.metadata.message_type == LATENTS and len(broken) < 2:
            broken.append(node)
            raise ValueError("no content")
        return reply

    nodes.spoil = spoil
    said = said_of(frozen(half, **{"train.epochs": 0.04}), nodes, tmp_path, steps=4)
    assert "client 1 has failed: an answer that cannot be read: ValueError('no content')" in said
    told = figures(tmp_path / "run")
    assert (told["failures"], told["answers"]) == (2, 3)  # that of client 0 was lost with it; both were asked again


def test_a_client_that_fails_once_is_asked_again_for_the_same_chunk(half: str, tmp_path: Path) -> None:
    nodes = Nodes(parts(3))
    nodes.spoil = lambda node, message, reply: (
        Message(Error(code=0, reason="a hiccup"), reply_to=message)
        if node == 1001 and nodes.asked(LATENTS).count(1001) == 1
        else reply
    )
    run(frozen(half), nodes, tmp_path)
    told = figures(tmp_path / "run")
    assert (told["chunks"], told["failures"], told["answers"]) == (1, 1, 3)


def test_whose_latents_the_server_keeps_must_say_who_it_is_and_is_missed(
    half: str, folders: list[str], tmp_path: Path
) -> None:
    nodes = Nodes([*parts(2), {"data": folders[2]}])
    nodes.spoil = lambda node, message, reply: (
        Message(Error(code=0, reason="no luck"), reply_to=message)
        if node == 1001 and message.metadata.message_type == LATENTS
        else reply
    )
    config = frozen(half, **RUNS["cache"] | {"train.epochs": 2.5})
    trainers: list[Trainer] = []
    said = said_of(config, nodes, tmp_path, min_clients=2, callbacks=(At(1, trainers.append),))
    assert trainers[0].cohort.cohort._current is None  # type: ignore[attr-defined]
    assert "node 1002 cannot join: the server keeps latents of each image, so a node must say which client" in said
    assert re.search(r"client 1: latents of (\d+) of its \1 images have not come", said), said


def test_a_client_that_fails_again_and_again_is_asked_less_often(half: str, tmp_path: Path) -> None:
    nodes = Nodes(parts(3))
    nodes.spoil = lambda node, message, reply: (
        Message(Error(code=0, reason="no luck"), reply_to=message)
        if node == 1001 and message.metadata.message_type == LATENTS
        else reply
    )
    run(frozen(half), nodes, tmp_path, steps=2)
    assert nodes.asked(LATENTS).count(1000) == 11
    # chunks 1, 1, 2, 4, 8: after n > 1 failures it is left out of the chunk and of the next 2^(n-2) - 1
    assert nodes.asked(LATENTS).count(1001) == 5


def test_a_client_that_is_late_is_left_out_until_it_has_answered(half: str, tmp_path: Path) -> None:
    nodes = Nodes(parts(3))

    def slow(node: int, message: Message, reply: Message) -> Message | None:
        late = node == 1001 and message.metadata.message_type == LATENTS and len(nodes.asked(LATENTS)) < 9
        return None if late else reply

    nodes.spoil = slow
    run(frozen(half), nodes, tmp_path, steps=2, timeout=1.0)
    told = figures(tmp_path / "run")
    assert (told["failures"], told["late"]) == (1, 1)  # it was not asked again before the answer was there
    assert told["answers"] == len(nodes.asked(LATENTS))  # and that served a later chunk
    assert nodes.asked(LATENTS).count(1000) == 11
    assert 5 < nodes.asked(LATENTS).count(1001) < 11
    assert told["waited_seconds"] >= 1


def test_without_a_quorum_the_run_waits_and_then_ends_with_a_checkpoint(half: str, tmp_path: Path) -> None:
    nodes = Nodes(parts(3))

    def vanish(trainer: Trainer) -> None:
        cohort: Any = trainer.cohort
        with cohort._changed:
            assert cohort._changed.wait_for(lambda: len(cohort._coming.answers) == 3, 60)
        for node in (1001, 1002):
            nodes.there.pop(node)

    expected = (
        r"1 of 3 clients have answered within 3 s \(give-up\), and 2 must; .*; the checkpoint of step 15 is safe in"
    )
    with pytest.raises(RunError, match=expected):  # when they left, steps 11 to 15 had come
        run(frozen(half), nodes, tmp_path, steps=5, give_up=3.0, callbacks=(At(6, vanish),))
    assert serve(FlowerSettings(out=str(tmp_path / "run"), resume=True, steps=4), Nodes(parts(3))).finished
    mocosfl.train(frozen(half), tmp_path / "simulated")
    assert_equal_runs(tmp_path / "run", tmp_path / "simulated")


def test_nobody_comes(half: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"1 of 3 clients have joined within 3 s \(give-up\); start more SuperNodes"):
        run(frozen(half), Nodes(parts(1)), tmp_path, give_up=3.0)


def test_a_resumed_run_equals_one_that_never_stopped(half: str, tmp_path: Path) -> None:
    def stop(trainer: Trainer) -> None:
        trainer.stop = True

    config = frozen(half, **POOL)
    # chunks are steps 1 to 3, 4, 5 to 7, 8 and so on: it stops within one
    result = run(config, Nodes(parts(6)), tmp_path, steps=3, evaluate_on="digits", callbacks=(At(6, stop),))
    assert not result.finished
    settings = FlowerSettings(out=str(tmp_path / "run"), resume=True, steps=4, changes="train.log_every=1")
    result = serve(settings, Nodes(parts(6)))
    assert result.finished
    assert "knn" in result.metrics  # evaluate-on is that of the beginning
    mocosfl.train(config, tmp_path / "simulated")
    assert_equal_runs(tmp_path / "run", tmp_path / "simulated")


def test_a_run_that_goes_on_knows_its_images_before_it_hears_clients(
    half: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(trainer: Trainer) -> None:
        trainer.stop = True

    config, known, start = frozen(half, **RUNS["cache"]), [], FlowerCohort.start
    assert not run(config, Nodes(parts(3)), tmp_path, steps=5, callbacks=(At(2, stop),)).finished

    def listen(cohort: FlowerCohort) -> None:
        known.append(cohort.images.tolist())
        start(cohort)

    monkeypatch.setattr(FlowerCohort, "start", listen)
    assert serve(FlowerSettings(out=str(tmp_path / "run"), resume=True), Nodes(parts(3))).finished
    assert known == [json.loads((tmp_path / "run/data.json").read_text())["client_images"]]


def test_a_node_that_could_not_join_is_asked_again(half: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mocosfl.flower.cohort.RETRY", 0.1)
    nodes = Nodes(parts(3))
    nodes.spoil = lambda node, message, reply: (
        Message(Error(code=0, reason="a hiccup"), reply_to=message) if nodes.asked(JOIN).count(1001) == 1 else reply
    )
    assert run(frozen(half, **{"train.epochs": 0.02}), nodes, tmp_path).finished


def test_nodes_that_cannot_join_are_told_of(half: str, tmp_path: Path) -> None:
    reasons: list[tuple[dict[str, Any], str]] = [
        ({}, "this node has no images; start it with --node-config"),
        ({"partition-id": 7}, r"partition-id=7: the run has 3 clients (clients.number)"),
        ({"partition-id": 2, "client": 9}, "there is no client 9: the run has 3"),
        ({"data": "/nowhere/at/all", "client": 2}, "/nowhere/at/all"),
        ({"partition-id": 2, "client": "two"}, "client='two' of --node-config"),
        ({"partition-id": 2, "threads": 0}, "threads=0 of --node-config"),
        ({"partition-id": 2, "device": "abacus"}, "train.device=abacus"),
    ]
    nodes = Nodes([config for config, _ in reasons])
    seen: set[int] = set()

    def good_ones_last(node: int, message: Message, reply: Message) -> Message:
        seen.add(node)
        if len(seen) == len(reasons):
            nodes.there |= dict(enumerate(parts(2)))
        return reply

    nodes.spoil = good_ones_last
    said = said_of(frozen(half, **{"train.epochs": 0.02}), nodes, tmp_path, min_clients=2)
    for number, (_, reason) in enumerate(reasons):
        assert re.search(f"node {1000 + number} cannot join: [^:]*{re.escape(reason)}", said), said


def test_a_node_lets_no_other_half_see_its_images(half: str, tmp_path: Path) -> None:
    config, nodes = frozen(half, **{"train.epochs": 0.02}), Nodes(parts(3))
    nodes.there[1002]["half"] = "0" * 64
    first = said_of(config, nodes, tmp_path, "one")
    found = re.search("SHA-256 ([0-9a-f]{64})", first)
    assert found
    assert f"client 2 has failed: half={'0' * 64}: the server hands out another, {found[1]}" in first
    nodes.there[1002]["half"] = found[1]
    assert "failed" not in said_of(config, nodes, tmp_path, "two")


REFUSED = [
    (
        {"clients.frozen": False},
        {},
        "mode=latents: clients that learn need a gradient.* mode=average and mocosfl serve",
    ),
    ({}, {"mode": "average"}, "mode=average: clients.frozen=true leaves nothing to average"),
    ({"clients.init": None}, {}, "clients.frozen=True: frozen clients need a trained half"),
    ({}, {"min_clients": 4}, r"min-clients=4: there are 3 clients \(clients.number\)"),
    ({"contrast.objective": "mocov3", "clients.batch": 1}, {"quorum": 0.3}, "quorum=0.3: one client .* two images"),
    ({"data.size": None}, {}, "data.size is not set"),
    ({}, {"evaluate_on": "digit"}, "did you mean digits"),
    ({"clients.frozen": False, "sync.own": "ema"}, {"mode": "average"}, "sync.own=ema"),
    ({"clients.frozen": False, "defence.kind": "nopeek"}, {"mode": "average"}, "defence.kind=nopeek"),
    ({"clients.frozen": False}, {"mode": "average", "steps": 5}, "steps=5: in mode=average .* set sync.every"),
    ({"clients.frozen": False}, {"mode": "average", "memory": 64}, "memory=64: in mode=average .* set sync.every"),
    ({"clients.frozen": False, "sync.every": 0}, {"mode": "average"}, "sync.every=0: mode=average cannot"),
    ({"clients.frozen": False, "sync.momentum": False}, {"mode": "average"}, "sync.momentum=false: mode=average"),
    ({"clients.frozen": False, "sync.average": "median"}, {"mode": "average"}, "accepted is fedavg"),
]


@pytest.mark.parametrize(("changes", "settings", "reason"), REFUSED, ids=str)
def test_what_cannot_work_is_refused(changes: dict, settings: dict, reason: str, half: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=reason):
        run(frozen(half, **changes), Nodes([]), tmp_path, **settings)
    assert not (tmp_path / "run/checkpoints").exists()


def test_several_processes_are_refused(half: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingError, match="flwr run is for one process; torchrun has started 2"):
        run(frozen(half), Nodes([]), tmp_path)


def test_a_folder_that_holds_a_run_is_left_alone(half: str, tmp_path: Path) -> None:
    config = frozen(half, **{"train.epochs": 0.02})
    run(config, Nodes(parts(3)), tmp_path)
    with pytest.raises(RunError, match="already holds a run; go on with it by resume=true, replace it by overwrite"):
        run(config, Nodes([]), tmp_path)
    with pytest.raises(RunError, match="is a run of `flwr run`"):
        mocosfl.train(config, tmp_path / "run", resume=True)
    assert run(config, Nodes(parts(3)), tmp_path, overwrite=True).finished


class Hesitant(Nodes):
    """Nodes behind a SuperLink that does something else with latents' messages, once.

    Attributes:
        instead: called with those messages, from the second chunk on; returns those that are pushed.
    """

    instead: Callable[[list[Message]], list[Message]]
    _has: bool = False

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        if not self._has and len(self.asked(LATENTS)) >= 3:
            self._has = True
            messages = self.instead(messages)
        return super().push_messages(messages)


def test_a_superlink_that_hangs_does_not_hold_up_who_stops_the_run(half: str, tmp_path: Path) -> None:
    nodes, trainers, gate, waited = Hesitant(parts(3)), [], threading.Event(), []  # type: ignore[var-annotated]

    class Watch(Callback):
        def before_training(self, trainer: Trainer) -> None:
            trainers.append(trainer)

    def hang(messages: list[Message]) -> list[Message]:
        trainers[0].stop = True
        waited.append(gate.wait(20))
        return messages

    nodes.instead = hang
    result = run(frozen(half), nodes, tmp_path, steps=2, callbacks=(Watch(),))
    assert not result.finished
    assert waited == []  # it hangs still
    gate.set()


def test_a_message_that_the_superlink_does_not_accept_is_told_of(half: str, tmp_path: Path) -> None:
    nodes = Hesitant(parts(3))
    nodes.instead = lambda messages: messages[1:]
    said = said_of(frozen(half), nodes, tmp_path, steps=11)
    assert said.count("the SuperLink has not accepted a message to node 1000; it is sent again") == 1
    told = figures(tmp_path / "run")
    assert (told["refused"], told["answers"]) == (1, 6)


def test_a_superlink_that_is_gone_is_told_of(half: str, tmp_path: Path) -> None:
    nodes = Nodes(parts(3))

    def unreachable() -> list[int]:
        raise OSError("connection refused")

    def cut(trainer: Trainer) -> None:
        nodes.get_node_ids = unreachable  # type: ignore[method-assign]

    expected = "Flower's nodes cannot be reached any more: OSError.*the checkpoint of step 0 is safe"
    with pytest.raises(RunError, match=expected):
        run(frozen(half), nodes, tmp_path, steps=2, callbacks=(At(1, cut),))
