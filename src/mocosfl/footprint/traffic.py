"""Bytes between one client and the server, by direction and kind, in a run in which nobody is late or away.

Tensors are counted exactly, by the codecs' own sizes; compressed ones (``traffic.zstd``) are as large before
compression, and what they are after it depends on the numbers. Messages are tensors with their names and shapes in
protobuf, and gRPC's frame of 5 bytes. What TLS and HTTP/2 add is estimated: 9 bytes a frame and 22 a record, of
16 KiB each. Greetings, heartbeats and the headers of TCP and IP are not counted.

Clients that hold the whole network (``clients.holds=network``) are only simulated. Counted is what their methods
exchange: the weights at every average, as a state dict.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from mocosfl.contrast import objective_of
from mocosfl.footprint.held import held
from mocosfl.footprint.plan import Plan
from mocosfl.models import build
from mocosfl.models.heads import WholeNetwork
from mocosfl_device.protocol_pb2 import ClientMessage, Collect, Draw, Gradients, Latents, Order, ServerMessage
from mocosfl_device.wire import Coder, pack_weights

UP = ("query latents", "key latents", "halves up")
DOWN = ("gradients", "halves down")
KINDS = (*UP, *DOWN)

GRPC, HTTP2, TLS, PIECE = 5, 9, 22, 16_384
"""Bytes around a message; around each ``PIECE`` bytes of it in HTTP/2 and TLS 1.3."""

Bytes = dict[str, float]
"""By kind, one of ``KINDS``."""


@dataclass(frozen=True)
class Traffic:
    """What passes between a client and the server.

    Attributes:
        step: bytes of tensors in a step in which the client takes part, without halves.
        average: those of one average: its half sent, and the average received.
        start: those that a client receives when it first takes part.
        epoch: in an epoch in which every step asks for latents.
        run: of the whole run; a mean over all clients where pools are sampled.
        messages: up and down, with protobuf and gRPC: of the run. None of clients that are only simulated.
        socket: the same with HTTP/2 and TLS, estimated.
    """

    step: Bytes
    average: Bytes
    start: Bytes
    epoch: Bytes
    run: Bytes
    messages: tuple[float, float] | None
    socket: tuple[float, float] | None


def way(amounts: Bytes, kinds: tuple[str, ...]) -> float:
    """Bytes of several kinds."""
    return sum(amounts[kind] for kind in kinds)


def of_client(plan: Plan, rich: bool = False) -> Traffic:
    """What passes between a client of a kind and the server, over the network (``mocosfl serve``)."""
    config = plan.config
    if config.clients.holds == "network":
        return _of_whole(plan, rich)
    model = build(config.model, config.data.channels, plan.size, config.seed)
    state = {name: tensor.numpy() for name, tensor in model.client.state_dict().items()}
    half = sum(array.nbytes for array in state.values())
    statistics = 2 * 4 * config.data.channels  # mean and deviation of each channel
    frozen, momentum, traffic = config.clients.frozen, config.sync.momentum, config.traffic
    shape = (2 if config.contrast.both_views else 1, plan.batch(rich), *model.latent_shape)
    latents, gradients = (Coder(name, traffic.topk) for name in (traffic.latents, traffic.gradients))

    none = dict.fromkeys(KINDS, 0.0)
    step = none | {"query latents": latents.size(shape), "key latents": latents.size(shape)}
    if not frozen:
        step["gradients"] = gradients.size(shape)
    halves = half * (2 if momentum else 1)
    average = none if frozen else none | {"halves up": halves, "halves down": halves + statistics}
    # The momentum half comes with the first order even where it is not averaged.
    start = none | {"halves down": half * (1 if frozen else 2) + statistics}

    number, active = plan.number(rich), plan.active(rich)
    intervals, collections = (count * active / number for count in (plan.averages, plan.collections))
    steps, ever = plan.client_steps(rich), plan.ever_active(rich) / number
    run = {kind: steps * amount for kind, amount in step.items()}
    run["halves up"] = collections * average["halves up"]
    # An interval begins with the average handed out, the first of each client with what it starts from.
    run["halves down"] = (intervals - (0 if frozen else ever)) * average["halves down"] + ever * start["halves down"]

    epoch_steps = plan.epoch_steps(rich)
    epoch = {kind: epoch_steps * amount for kind, amount in step.items()}
    each_epoch = intervals / config.train.epochs
    epoch |= {kind: each_epoch * average[kind] for kind in ("halves up", "halves down")}

    counts = (steps, collections, intervals, ever)
    ways = [
        [(count, message.ByteSize() + GRPC) for count, message in messages]
        for messages in (
            _from_client(plan, counts, shape, latents, state),
            _from_server(plan, counts, shape, gradients, state),
        )
    ]
    up, down = (sum(count * size for count, size in sizes) for sizes in ways)
    socket_up, socket_down = (sum(count * _framed(size) for count, size in sizes) for sizes in ways)
    return Traffic(step, average, start, epoch, run, (up, down), (socket_up, socket_down))


def _of_whole(plan: Plan, rich: bool) -> Traffic:
    """The same where a client holds the whole network.

    At an average an active client sends the weights and statistics of its online network with head and predictor, and
    is handed as many. With ``sync.momentum`` those of its target network travel too, if there is one; else it never
    does, as it starts as a copy of the online one. What clients keep of their own (``sync.own``) changes nothing: each
    needs the average to tell how far it is from it.
    """
    config, network = plan.config, held(plan)
    assert isinstance(network, WholeNetwork)
    targets = config.sync.momentum and objective_of(config.contrast).keys
    parts = [network, network.target] if targets else [network]
    weights = float(sum(tensor.nbytes for part in parts for tensor in part.state_dict().values()))
    none = dict.fromkeys(KINDS, 0.0)
    average = none | {"halves up": weights, "halves down": weights}
    # As many are handed out as are collected: what a client starts from in place of the average at the end.
    averages = plan.averages * plan.active(rich) / plan.number(rich)
    run = {kind: averages * amount for kind, amount in average.items()}
    epoch = {kind: amount / config.train.epochs for kind, amount in run.items()}
    start = none | {"halves down": weights}
    return Traffic(none, average, start, epoch, run, None, None)


Counts = tuple[float, float, float, float]
"""Of a client: steps, collections of its half, averages handed out, and whether it takes part at all."""

PLACES = 50
"""Steps of a run, at most, whose messages are measured for all: numbers in them take more bytes as they grow."""


def _places(plan: Plan, steps: float, batch: int) -> list[tuple[int, int]]:
    """Numbers of steps spread evenly over those in which a client takes part, and of its first draw in each."""
    count = max(1, round(steps))
    own = np.unique(np.linspace(0, count - 1, min(count, PLACES)).round().astype(int))
    return [(1 + int(k * plan.asked / count), int(k) * batch) for k in own]


def _from_client(
    plan: Plan, counts: Counts, shape: tuple[int, ...], coder: Coder, state: dict[str, NDArray]
) -> list[tuple[float, Message]]:
    """How often a client sends each message."""
    steps, collections, *_ = counts
    piece = coder.pack(np.zeros(shape, np.float32))
    places = _places(plan, steps, shape[1])
    messages: list[tuple[float, Message]] = [
        (steps / len(places), ClientMessage(latents=Latents(step=step, query=piece, key=piece))) for step, _ in places
    ]
    if collections:
        weights = pack_weights(_named(state, plan.config.sync.momentum), plan.collections // 2)
        messages.append((collections, ClientMessage(weights=weights)))
    return messages


def _from_server(
    plan: Plan, counts: Counts, shape: tuple[int, ...], coder: Coder, state: dict[str, NDArray]
) -> list[tuple[float, Message]]:
    """The same of the server's."""
    steps, collections, intervals, ever = counts
    frozen, places = plan.config.clients.frozen, _places(plan, steps, shape[1])
    draws = [Draw(step=step, first=first) for step, first in places]
    statistics = {name: np.zeros(plan.config.data.channels, np.float32) for name in ("mean", "std")}
    first = _order(draw=draws[0], weights=pack_weights(_named(state, not frozen) | statistics, restart=True))
    if frozen:
        later = draws[1:] or draws
        return [(ever, first), *(((steps - ever) / len(later), _order(draw=draw)) for draw in later)]
    average = pack_weights(_named(state, plan.config.sync.momentum) | statistics)
    query, middle = coder.pack(np.zeros(shape, np.float32)), draws[len(draws) // 2]
    gradients = [Gradients(step=draw.step, lr=1.0, query=query) for draw in draws]
    learning = [_order(gradients=gradient, draw=draw) for gradient, draw in zip(gradients, draws, strict=True)]
    collect = Collect(number=max(1, plan.collections // 2))
    return [
        *(((steps - collections) / len(learning), order) for order in learning),
        (collections, _order(gradients=gradients[len(draws) // 2], collect=collect)),
        (collections - intervals, _order(draw=middle)),
        (intervals - ever, _order(draw=middle, weights=average)),
        (ever, first),
    ]


def _named(state: dict[str, NDArray], both: bool) -> dict[str, NDArray]:
    """The weights of a half as they travel, or of both halves."""
    return {f"{part}.{name}": array for part in ("online", "momentum")[: 1 + both] for name, array in state.items()}


def _order(**parts: Message) -> ServerMessage:
    return ServerMessage(order=Order(**parts))  # type: ignore[arg-type]


def _framed(size: int) -> int:
    """Bytes of a message across the socket, estimated."""
    return size + math.ceil(size / PIECE) * (HTTP2 + TLS)
