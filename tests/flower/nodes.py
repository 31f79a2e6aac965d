"""Flower's nodes in this process: they run the real ClientApp, and what comes of it travels as Flower serialises it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from rich.console import Console

from mocosfl.config import Config
from mocosfl.experiment import Result
from mocosfl.flower.app import client
from mocosfl.flower.serving import serve
from mocosfl.flower.settings import FlowerSettings
from mocosfl.trainer import Callback

CALM = {"train.lr": 3e-5, "train.epochs": 0.13, "contrast.momentum": 0.5}
"""14 steps in which rounding does not grow."""


class Nodes(Grid):
    """Nodes that answer when their answers are fetched.

    Attributes:
        there: node config of each node, by id.
        sent: messages so far.
        spoil: makes of a node's answer what arrives; None keeps it back.
    """

    def __init__(self, configs: Iterable[dict[str, Any]]) -> None:
        self.there = {1000 + place: config for place, config in enumerate(configs)}
        self.sent: list[Message] = []
        self.spoil: Callable[[int, Message, Message], Message | None] = lambda node, message, reply: reply
        self._open: dict[str, Message] = {}
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1  # as Flower does in an app's process

    def get_node_ids(self) -> Iterable[int]:
        return list(self.there)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            self._open[message.metadata.message_id] = message
        self.sent += messages
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for identifier in message_ids:
            message = self._open[identifier]
            if (node := message.metadata.dst_node_id) in self.there:
                reply = self.spoil(node, message, self._compute(node, message))
                if reply is not None:
                    del self._open[identifier]
                    replies.append(reply)
        return replies

    def _compute(self, node: int, message: Message) -> Message:
        context = Context(run_id=1, node_id=node, node_config=self.there[node], state=RecordDict(), run_config={})
        try:
            reply = client(message, context)
        except Exception as error:  # as Flower does
            return Message(Error(code=0, reason=str(error)), reply_to=message)
        reply.content = travelled(reply.content)
        return reply

    def asked(self, kind: str) -> list[int]:
        """Nodes that were sent messages of a type, in order."""
        return [message.metadata.dst_node_id for message in self.sent if message.metadata.message_type == kind]

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **more: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError


def travelled(content: RecordDict) -> RecordDict:
    """What arrives of a content that is sent: taken apart, and put together again."""
    return RecordDict.inflate(content.deflate(), children=_children(content))


def _children(thing: Any) -> dict[str, Any]:
    """The objects that a Flower object is made of, each inflated from its bytes."""
    return {
        identifier: type(child).inflate(child.deflate(), children=_children(child) or None)
        for identifier, child in (thing.children or {}).items()
    }


def parts(number: int) -> list[dict[str, Any]]:
    """Nodes that stand for the clients of the recipe's partition."""
    return [{"partition-id": place, "num-partitions": number} for place in range(number)]


def run(
    config: Config,
    nodes: Nodes,
    folder: Path,
    name: str = "run",
    callbacks: tuple[Callback, ...] = (),
    console: Console | None = None,
    **more: Any,
) -> Result:
    """A whole run with these nodes, in ``folder/name``."""
    path = folder / f"{name}.yaml"
    path.write_text(config.to_yaml())
    settings = FlowerSettings(recipe=str(path), out=str(folder / name), **{"give_up": 60.0} | more)
    return serve(settings, nodes, callbacks, console)


def written(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics so far; the last may be half-written."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in (path.read_text() if path.exists() else "").split("\n")[:-1]]


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in written(run) if "loss" in line}


def figures(run: Path) -> dict[str, float]:
    """Flower's figures at the end of a run."""
    return [line for line in written(run) if "failures" in line][-1]
