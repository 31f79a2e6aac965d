"""What a client and the server spend on a run, all in one, beside full federated learning and the paper."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mocosfl.config import Config
from mocosfl.footprint import arithmetic, memory, published, traffic
from mocosfl.footprint.devices import Device
from mocosfl.footprint.fl_byol import EPOCHS, EPOCHS_A_ROUND, FLBYOL
from mocosfl.footprint.held import held
from mocosfl.footprint.plan import Plan
from mocosfl.footprint.published import PAPER, Published
from mocosfl.footprint.traffic import KINDS, Bytes
from mocosfl.models import build, build_head

FL_CLIENTS = 5
"""Clients that hold all images in the paper's comparison with FL-BYOL."""


@dataclass(frozen=True)
class Cost:
    """What one client spends.

    Attributes:
        name: of the column.
        images, epochs, batch: that it holds, how often it uses each, and of a step.
        steps: in which it takes part; a mean where pools are sampled.
        averages: synchronisations in which it takes part, likewise.
        parameters: on it, of one copy.
        macs: multiply-adds for an image: forward, backward and momentum; and contrast, where the loss is its own.
        macs_of_run: of the whole run.
        memory: peak bytes of tensors with PyTorch, at its batch.
        memory_in_numpy: peak bytes of arrays with ``mocosfl_device.engine``; None where that cannot compute the half.
        step, average, epoch, run: bytes of tensors by kind, as ``traffic.Traffic``.
        messages, socket: bytes of the run, up and down, as there.
        seconds, seconds_to_send: on the device, of all multiply-adds and of all bytes.
        joules: of both.
        fits: whether the tensors fit into the device's memory.
        as_published, paper: in the paper's way of counting, and in the paper; None where the setting is another.
    """

    name: str
    images: float
    epochs: float
    batch: int
    steps: float
    averages: float
    parameters: int
    macs: dict[str, float]
    macs_of_run: float
    memory: int
    memory_in_numpy: int | None
    step: Bytes
    average: Bytes
    epoch: Bytes
    run: Bytes
    messages: tuple[float, float] | None
    socket: tuple[float, float] | None
    seconds: float
    seconds_to_send: float
    joules: float
    fits: bool
    as_published: Published | None
    paper: Published | None


@dataclass(frozen=True)
class ServerCost:
    """What the server spends.

    Attributes:
        parameters: of one copy, with the projection head.
        macs: multiply-adds for an image: forward, backward, momentum and contrast.
        macs_of_run: of the whole run.
        memory: peak bytes of tensors, at the concatenated batch.
        kept: bytes of the latents that it keeps to use them again (``cache.views``, ``traffic.loss_threshold``).
        batch: images of a step.
    """

    parameters: int
    macs: dict[str, float]
    macs_of_run: float
    memory: int
    kept: int
    batch: int


@dataclass(frozen=True)
class Comparison:
    """Columns of a table.

    Attributes:
        title: what they are of.
        device: that clients run on.
        columns: beside each other.
        server: of the first one; None where several recipes are compared, or all that it does is to average.
        notes: what each figure is.
    """

    title: str
    device: Device
    columns: list[Cost]
    server: ServerCost | None
    notes: list[str]

    def facts(self) -> dict[str, Any]:
        """All figures, ready for JSON: bytes, seconds, joules and multiply-adds."""
        return asdict(self)


def of_recipe(config: Config, device: Device, images: int | None = None) -> Comparison:
    """A recipe beside FL-BYOL: for a client with as many images, and for one of five clients that hold all of them.

    Args:
        config: the whole configuration.
        device: that clients run on.
        images: of all clients together. Unset: those of ``data.source``.

    Raises:
        SettingError: the images are not known, or the settings do not fit together.
        DataError: the folder cannot be used.
    """
    plan = Plan.of(config, images)
    whole = config.clients.holds == "network"
    scheme = None if whole else published.scheme_of(plan)
    kinds = [False, True] if config.rich else [False]
    columns = [_of_client(plan, device, config.recipe or "this recipe", rich, scheme) for rich in kinds]
    columns.append(_of_fl(plan, device, plan.each, "FL-BYOL, as many images"))
    columns.append(_of_fl(plan, device, plan.images / FL_CLIENTS, f"FL-BYOL, {FL_CLIENTS} clients"))
    title = (
        f"{config.recipe or 'recipe'}: {config.clients.number:,} clients, {plan.images:,} images, "
        f"{plan.steps:,} steps of {config.step_images:,}"
    )
    server = None if whole else of_server(plan)
    return Comparison(title, device, columns, server, _notes(plan, device, columns))


def of_paper(device: Device) -> Comparison:
    """The paper's table 1 and figure 7, from our counts."""
    plans = {scheme: published.plan_of(scheme) for scheme in list(PAPER)[1:]}
    columns = [_of_client(plan, device, scheme, False, scheme) for scheme, plan in plans.items()]
    plan = plans["MocoSFL-1"]
    columns.insert(0, _of_fl(plan, device, plan.images / FL_CLIENTS, "FL-SSL"))
    title = "table 1 and figure 7 of the paper: a client of each scheme, over the whole run"
    return Comparison(title, device, columns, None, _notes(plan, device, columns))


def _of_client(plan: Plan, device: Device, name: str, rich: bool, scheme: str | None) -> Cost:
    config = plan.config
    macs, bytes_ = arithmetic.of_client(plan, rich), traffic.of_client(plan, rich)
    steps, batch = plan.client_steps(rich), plan.batch(rich)
    peak = memory.of_client(plan, rich)
    array_peak = memory.of_client_in_numpy(plan, rich) if config.clients.holds == "half" else None
    across = sum(bytes_.run.values()) if bytes_.socket is None else sum(bytes_.socket)
    return Cost(
        name=f"{name}, rich client" if rich else name,
        images=plan.each,
        epochs=config.train.epochs,
        batch=batch,
        steps=steps,
        averages=plan.averages * plan.active(rich) / plan.number(rich),
        parameters=sum(p.numel() for p in held(plan).parameters()),
        macs=macs,
        memory=peak,
        memory_in_numpy=array_peak,
        step=bytes_.step,
        average=bytes_.average,
        epoch=bytes_.epoch,
        run=bytes_.run,
        messages=bytes_.messages,
        socket=bytes_.socket,
        **_spent(device, steps * batch * sum(macs.values()), across, peak),
        as_published=published.as_published(plan) if scheme else None,
        paper=PAPER[scheme] if scheme else None,
    )


def _of_fl(plan: Plan, device: Device, images: float, name: str) -> Cost:
    baseline = FLBYOL(plan, images)
    is_papers = plan.size == 32 and (images, plan.config.model.width) == (10_000, 64)
    is_papers &= plan.config.model.backbone == "resnet18" and plan.config.data.channels == 3
    none = dict.fromkeys(KINDS, 0.0)
    average = none | {"halves up": float(baseline.half), "halves down": float(baseline.half)}
    run = {kind: baseline.rounds * amount for kind, amount in average.items()}
    macs, peak = baseline.macs(), baseline.memory()
    return Cost(
        name=name,
        images=images,
        epochs=EPOCHS,
        batch=baseline.batch,
        steps=EPOCHS * images / baseline.batch,
        averages=baseline.rounds,
        parameters=baseline.parameters,
        macs=macs,
        memory=peak,
        memory_in_numpy=None,
        step=none,
        average=average,
        epoch={kind: amount / EPOCHS_A_ROUND for kind, amount in average.items()},
        run=run,
        messages=None,
        socket=None,
        **_spent(device, EPOCHS * images * sum(macs.values()), sum(run.values()), peak),
        as_published=published.fl_as_published(baseline, plan) if is_papers else None,
        paper=PAPER["FL-SSL"] if is_papers else None,
    )


def _spent(device: Device, macs: float, size: float, peak: int) -> dict[str, Any]:
    """What a device needs for so many multiply-adds and bytes."""
    seconds, sending = device.seconds(macs), device.seconds_to_send(size)
    return {
        "macs_of_run": macs,
        "seconds": seconds,
        "seconds_to_send": sending,
        "joules": device.joules(seconds + sending),
        "fits": peak <= device.memory.value,
    }


def of_server(plan: Plan) -> ServerCost:
    """What the server of a plan spends."""
    config = plan.config
    model = build(config.model, config.data.channels, plan.size, config.seed)
    head = build_head(config.model.head, model.features, config.seed)
    macs = arithmetic.of_server(plan)
    return ServerCost(
        parameters=sum(p.numel() for part in (model.server, head) for p in part.parameters()),
        macs=macs,
        macs_of_run=plan.steps * config.step_images * sum(macs.values()),
        memory=memory.of_server(plan),
        kept=memory.of_kept_latents(plan),
        batch=config.step_images,
    )


def _notes(plan: Plan, device: Device, columns: list[Cost]) -> list[str]:
    """What each figure is, and where it is from."""
    config = plan.config
    notes = [
        "Counted: parameters, multiply-adds of convolutions and matrices, peak memory of tensors (the interpreter and "
        "PyTorch, over 200 MB, come on top), bytes of tensors and messages. Estimated: what TLS and HTTP/2 add.",
        f"{device.name}: {device.flops.value / 1e9:g} GFLOP/s ({device.flops.basis}), {device.watts.value:g} W "
        f"({device.watts.basis}), {device.memory.value / 2**30:g} GiB ({device.memory.basis}), "
        f"{device.link.value / 1e6:g} Mbit/s ({device.link.basis}). {device.source}. Time and energy are the least to "
        "expect: small convolutions do not reach Linpack's rate, and waiting for others costs power too.",
        f"FL-BYOL: {EPOCHS} local epochs, a synchronisation every {EPOCHS_A_ROUND}, batch 128 or all images, both "
        "views through online and target network; online network and predictor travel both ways.",
    ]
    optional: list[tuple[bool, str]] = [
        (config.clients.holds == "network", WHOLE_NOTE),
        (
            config.clients.holds == "half" and any(column.memory_in_numpy is None for column in columns[:1]),
            "No figure for memory in numpy: mocosfl-client cannot compute this half (BatchNorm, a defence with a "
            "loss), or a step takes more than 10 G multiply-adds.",
        ),
        (plan.sampled, "Pools are sampled: steps, bytes and time are means over all clients."),
        (config.traffic.zstd, "traffic.zstd: bytes are those before compression; what it saves is up to the numbers."),
        (
            config.traffic.loss_threshold is not None,
            "traffic.loss_threshold: an upper bound, as if clients learned in every step; what it saves is up to the "
            "loss.",
        ),
        (
            bool(config.cache.views),
            f"cache.views: clients send in {plan.asked:,} of {plan.steps:,} steps; an epoch is one of those in which "
            "they do.",
        ),
        (any(column.paper for column in columns), PAPER_NOTE),
    ]
    return notes + [note for applies, note in optional if applies]


WHOLE_NOTE = (
    "clients.holds=network: forward and backward passes are of the online network with head and predictor, momentum is "
    "the target network's forward pass, contrast the client's own loss. At an average all weights and statistics of "
    "the online network travel both ways, those of the target network too with sync.momentum, and nothing else: such "
    "clients are only simulated, so nothing is said of messages and sockets. The server does no more than average."
)

PAPER_NOTE = (
    "The paper's figures are ours when counted as it did (rows 'as the paper counts'). They are lower because keys and "
    "their forward pass are left out, weights count one way, one backward pass counts as one forward pass (it is two, "
    "but for the stem's input), FL-SSL is without predictor, second view and target network, and memory is what was "
    "allocated after a forward pass of one view instead of the peak. G is 2**30 operations and MB 2**20 bytes there. "
    "Its 2.26 W are the mean of a run that waits most of the time: 9,100 mAh at 5 V are 20 hours."
)
