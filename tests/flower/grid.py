"""Flower's nodes in this process: they run the real ClientApp, and what comes of it travels as Flower serialises it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from mocosfl.config import Config
from mocosfl.flower.app import client

DIGITS = {
    "data.source": "digits",
    "data.size": 8,
    "data.channels": 1,
    "data.held_out": 0.1,
    "partition.kind": "iid",
    "model.width": 4,
    "model.head": "v1",
    "contrast.queue": 64,
    "clients.number": 3,
    "clients.batch": 4,
    "sync.every": 4,
    "train.lr": 0.01,
    "train.epochs": 0.2,
    "train.log_every": 1,
    "train.checkpoint_every": 5,
    "evaluation.every": 0,
    "evaluation.probe_epochs": 0,
}
"""A real but tiny run on digits: 22 steps."""


def digits(**changes: object) -> Config:
    return Config().updated(DIGITS | changes)


class Nodes(Grid):
    """A grid whose nodes answer when they are asked for what they have.

    Attributes:
        there: node config of each node, by id.
        asked: types of the messages so far, with node, in order.
        spoil: what becomes of an answer; called with node, message and reply; None keeps it back.
    """

    def __init__(self, configs: Iterable[dict[str, Any]]) -> None:
        self.there = {1000 + place: config for place, config in enumerate(configs)}
        self.asked: list[tuple[int, str]] = []
        self.sent: list[Message] = []
        self.spoil: Callable[[int, Message, Message], Message | None] = lambda node, message, reply: reply
        self._waiting: dict[str, Message] = {}
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1  # as Flower does in an app's process

    def get_node_ids(self) -> Iterable[int]:
        return list(self.there)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        identifiers = []
        for message in messages:
            identifier = str(uuid4())
            message.metadata.__dict__["_message_id"] = identifier
            self.asked.append((message.metadata.dst_node_id, message.metadata.message_type))
            self.sent.append(message)
            self._waiting[identifier] = message
            identifiers.append(identifier)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for identifier in message_ids:
            message = self._waiting[identifier]
            node = message.metadata.dst_node_id
            if node not in self.there:
                continue
            reply = self.spoil(node, message, self._compute(node, message))
            if reply is not None:
                del self._waiting[identifier]
                replies.append(reply)
        return replies

    def _compute(self, node: int, message: Message) -> Message:
        context = Context(run_id=1, node_id=node, node_config=self.there[node], state=RecordDict(), run_config={})
        try:
            reply = client(message, context)
        except Exception as error:  # as Flower does
            return Message(Error(code=0, reason=str(error)), reply_to=message)
        content = reply.content
        for name, record in list(content.array_records.items()):
            content[name] = type(record).inflate(record.deflate(), children=_children(record))
        return reply

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **more: Any) -> Message:
        raise NotImplementedError


def _children(record: Any) -> Any:
    return record.children


def parts(number: int) -> list[dict[str, Any]]:
    """Nodes that stand for the clients of the recipe's partition."""
    return [{"partition-id": place, "num-partitions": number} for place in range(number)]
