"""From a configuration to a finished run: builds the parts, trains, evaluates, and keeps the results."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import nn

from mocosfl.baselines import held_by_clients
from mocosfl.callbacks import Checkpoints, CollapseGuard, MetricsLog, Monitor, NetworkLog, ProgressLine
from mocosfl.clients import Cohort, FrozenCohort, LocalCohort
from mocosfl.compute import keep_freed_memory
from mocosfl.config import CacheSettings, ClientSettings, Config, SyncSettings, TrafficSettings
from mocosfl.data.federation import Federation, Guests, federate
from mocosfl.data.images import channel_statistics
from mocosfl.distributed import World, joined
from mocosfl.encoder import Encoder, load_encoder, load_head, save_weights
from mocosfl.errors import ReportedElsewhere, RunError, SettingError
from mocosfl.latent_cache import LossWatch, RecallingCohort
from mocosfl.models import build_head
from mocosfl.models.foreign import is_foreign, settled
from mocosfl.models.heads import WIDTHS
from mocosfl.models.layers import has_batch_norm
from mocosfl.models.pieces import stem_for
from mocosfl.network.cohort import RemoteCohort
from mocosfl.privacy.defences import defence_of
from mocosfl.privacy.mixture import Mixture, fingerprints, mix
from mocosfl.reporting.curve import draw_curve
from mocosfl.run import Run
from mocosfl.scoring import final_figures, held_out_knn
from mocosfl.server import Server
from mocosfl.trainer import Callback, Trainer


def choose_device(name: str) -> torch.device:
    """The device that ``train.device`` means.

    Raises:
        SettingError: this machine does not have it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # of torchrun
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # pinned memory and collectives go there too
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SettingError(
            f"train.device={name}: not available here ({reason}); auto takes the fastest there is"
        ) from error
    return device


@dataclass(frozen=True)
class Result:
    """What a run ended with.

    Attributes:
        run: the run folder.
        encoder: the trained encoder, in eval mode.
        metrics: figures at the end, as in result.json.
        finished: False if the run was stopped; then ``encoder`` is the state so far and ``metrics`` the latest.
    """

    run: Path
    encoder: Encoder
    metrics: dict[str, Any]
    finished: bool


def train(
    config: Config,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: tuple[Callback, ...] = (),
    console: Console | None = None,
) -> Result:
    """Train an encoder with MocoSFL, and evaluate it.

    Args:
        config: all settings.
        out: the run folder. It must not hold a run, unless one of the next two says so. Only the first of several
            processes (torchrun) writes to it.
        resume: go on from the latest checkpoint in ``out``, whose settings must be the same.
        overwrite: delete the run in ``out`` first.
        callbacks: called after the built-in ones in every step, on every process.
        console: where progress is drawn. Unset: nowhere.

    Returns:
        The result; its folder is described in ``mocosfl.run``.

    Raises:
        SettingError: the settings do not fit together or with the data.
        DataError: the images cannot be used.
        RunError: the run folder cannot be used, or training had to stop; what was kept is named.
    """
    check_frozen(config, resume)
    return _start("train", config, out, federate, resume, overwrite, callbacks, console)


def pretrain(
    config: Config,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: tuple[Callback, ...] = (),
    console: Console | None = None,
) -> Result:
    """Train both halves on the server, so that the client half resists inversion (TAResSFL).

    The same loop as ``train``, with one client, the server itself, which holds ``pretrain.source`` and a share of the
    clients' images, and learns under ``ressfl``. Start clients from the run by ``clients.init``.

    Args:
        config: all settings; of those that only concern clients none is used.
        out, resume, overwrite, callbacks, console: as for ``train``.

    Returns:
        The result; its folder is described in ``mocosfl.run``.

    Raises:
        SettingError: the settings do not fit together or with the data.
        DataError: the images cannot be used.
        RunError: the run folder cannot be used, or training collapsed or had to stop; what was kept is named.
    """
    return _start("pretrain", config, out, mix, resume, overwrite, callbacks, console)


def check_frozen(config: Config, resume: bool) -> None:
    """Raises ``SettingError`` where frozen clients have nothing to start from."""
    if config.clients.frozen and config.clients.init is None and not resume:
        raise SettingError(
            "clients.frozen=True: frozen clients need a trained half to start from; name the run that has it by "
            "clients.init (mocosfl pretrain makes one)"
        )


def pretraining(config: Config) -> Config:
    """The settings of the loop that ``pretrain`` runs."""
    settings = config.pretrain
    return config.updated(
        {
            "clients": ClientSettings(number=1, batch=settings.batch).model_dump(),
            "sync": SyncSettings(every=0).model_dump(),
            "cache": CacheSettings().model_dump(),
            "traffic": TrafficSettings().model_dump(),
            "contrast.feature_sharing": True,
            "contrast.concatenate": True,
            "defence.kind": "ressfl",
            "pretrain.spare_client": 0,
            "train.epochs": settings.epochs,
            "train.lr": settings.lr,
        }
    )


def _start(
    command: str,
    config: Config,
    out: str | Path,
    gather: Callable[[Config, Callable[[str], None]], Federation],
    resume: bool,
    overwrite: bool,
    callbacks: tuple[Callback, ...],
    console: Console | None,
) -> Result:
    """Gather the images, build the parts, and begin or go on."""
    config = config.model_copy(update={"model": settled(config.model)})
    device = choose_device(config.train.device)
    with joined(device) as world, prepared(device), contextlib.ExitStack() as stack:
        console = Console(quiet=True) if console is None or world.rank > 0 else console
        say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
        run = Run(Path(world.first(lambda: str(out))), config)

        def check() -> None:
            if command == "pretrain" and world.size > 1:
                raise SettingError(f"mocosfl pretrain is for one process; torchrun has started {world.size}")
            if resume:
                Run.open(out).check_resumable(config, command)
            else:
                Run.check_free(out, overwrite)

        def begin() -> None:
            if not resume:
                Run.create(out, config, overwrite)
            stack.enter_context(run.locked())
            run.check_data(_data_facts(command, config, federation, parts))
            if command == "train":
                run.write_partition(federation.partition.sizes, *federation.counts)
            if started is None:
                run.write_fingerprints(seen(config, federation))

        world.first(check)
        federation = world.lead(lambda: gather(config, say))
        own = pretraining(config) if isinstance(federation, Mixture) else config
        started = run.data_facts() if resume and run.latest_step is not None else None
        # what does not fit fails here, before the folder is touched
        parts = world.lead(lambda: build(own, federation, device, world, started))
        world.first(begin)
        return run_to_end(command, own, run, federation, parts, callbacks, console, say)


@dataclass(frozen=True)
class Parts:
    encoder: Encoder
    head: nn.Module
    cohort: Cohort
    server: Server
    device: torch.device
    world: World
    statistics: tuple[list[float], list[float]]
    """Mean and standard deviation of the training images' channels."""
    held: nn.Module
    """What each client holds, in the initial state: the client half, or all of encoder, head and predictor."""


def build(
    config: Config,
    federation: Federation,
    device: torch.device,
    world: World | None = None,
    facts: dict[str, Any] | None = None,
) -> Parts:
    """Models, clients and server in their initial state.

    Args:
        config: all settings.
        federation: the images and who holds them.
        device: where to compute.
        world: the processes of the run. Unset: this one alone.
        facts: of data.json, for a run that goes on: its checkpoint holds what ``clients.init`` gave it.

    Raises:
        SettingError: the model does not fit the images, or the run that ``clients.init`` names.
        RunError: that run cannot be read.
    """
    world = world or World()
    if config.pool < world.size:
        raise SettingError(
            f"clients.pool={config.pool}: each of the run's {world.size} processes needs an active client; "
            "start fewer processes"
        )
    if world.size > 1 and config.clients.drop and not config.contrast.feature_sharing:
        raise SettingError(
            f"clients.drop={config.clients.drop:g}: with queues of the clients' own (contrast.feature_sharing=False) "
            f"it needs one process, as all clients of one may be away; torchrun has started {world.size}"
        )
    if config.train.compile != "off":
        torch.compiler.reset()  # or the shapes of earlier runs count against its limit of recompilations
    images = federation.splits.train.to(device)
    mean, std = channel_statistics(images, federation.train_rows)
    of_input = (mean, std) if not facts or "input" not in facts else facts["input"]
    encoder, head = networks(config, images.shape[0], images.shape[-1], fresh=not facts, of_input=of_input)
    encoder.to(device)
    held, rest = held_by_clients(config, encoder.client, encoder.server, head)
    held.to(device)
    sampler, shapes = federation.sampler(config.seed), (encoder.latent_shape, images.shape)
    kind = FrozenCohort if config.clients.frozen else LocalCohort
    cohort: Cohort = kind(
        held,
        config,
        images,
        sampler,
        encoder.mean,
        encoder.std,
        device,
        world,
        defence_of(config, *shapes, device, world),
    )
    if config.recalls:
        if world.size > 1:
            name = "cache.views" if config.cache.views else "traffic.loss_threshold"
            raise SettingError(f"{name}: latents are kept by one process only; torchrun has started {world.size}")
        cohort = RecallingCohort(cohort, config, federation.partition.sizes, encoder.latent_shape, device)
    if not config.contrast.concatenate and world.size > 1:
        raise SettingError(
            f"contrast.concatenate=False: the server takes the clients one by one; torchrun has started {world.size} "
            "processes, and one is accepted"
        )
    server = Server(*rest, config, WIDTHS[config.model.head], device, world)
    return Parts(encoder, head, cohort, server, device, world, (list(mean), list(std)), held)


def networks(
    config: Config,
    channels: int,
    size: int,
    fresh: bool,
    of_input: tuple[Sequence[float], Sequence[float]] | None = None,
) -> tuple[Encoder, nn.Module]:
    """Encoder and head in their initial state, or that of ``clients.init`` if the run is a fresh one."""
    encoder = Encoder(config.model, channels, size, config.seed, pretrained=config.model.pretrained and fresh)
    alone = config.clients.batch == 1 and not config.clients.frozen
    if alone and is_foreign(config.model.backbone) and has_batch_norm(encoder.client):
        raise SettingError(
            f"clients.batch=1: the client half of {config.model.backbone} has BatchNorm, whose statistics would be "
            "those of a single image; use a larger batch, or a network with GroupNorm"
        )
    if of_input is not None:
        for buffer, numbers in zip((encoder.mean, encoder.std), of_input, strict=True):
            buffer.copy_(torch.tensor(numbers))
    head = build_head(config.model.head, encoder.features, config.seed)
    if config.clients.init is not None and fresh:
        _start_from(config, encoder, head)
    return encoder, head


def _start_from(config: Config, encoder: Encoder, head: nn.Module) -> None:
    """Load the run that ``clients.init`` names into an encoder: client half and normalisation, server half and head.

    Raises:
        RunError: there is no trained encoder.
        SettingError: its model is another.
    """
    run = Run.open(str(config.clients.init))
    start = load_encoder(run.path)
    used = ["backbone", "architecture", "width", "cut", "bottleneck", "client_norm"]
    if config.train.init_server:
        used += ["server_norm", "pooling", "head"]

    def facts(model: Encoder) -> dict[str, Any]:
        values = {f"model.{name}": getattr(model.settings, name) for name in used}
        stem = model.settings.stem or stem_for(model.size)
        return values | {"model.stem": stem, "size of the images": model.size, "their channels": model.channels}

    ours, theirs = facts(encoder), facts(start)
    if differ := [
        f"{name} is {theirs[name]} there and {ours[name]} here" for name in ours if ours[name] != theirs[name]
    ]:
        raise SettingError(f"clients.init={config.clients.init}: {'; '.join(differ)}")
    encoder.client.load_state_dict(start.client.state_dict())
    encoder.mean.copy_(start.mean)
    encoder.std.copy_(start.std)
    if config.train.init_server:
        encoder.server.load_state_dict(start.server.state_dict())
        head.load_state_dict(load_head(run.path))


def seen(config: Config, federation: Federation | None) -> NDArray[np.uint64]:
    """Fingerprints of the images that the server has seen when the clients start: those of its pre-training."""
    if isinstance(federation, Mixture):
        train = federation.splits.train
        return fingerprints(train, np.arange(len(train)))
    return np.zeros(0, np.uint64) if config.clients.init is None else Run.open(config.clients.init).fingerprints()


def run_to_end(
    command: str,
    config: Config,
    run: Run,
    federation: Federation,
    parts: Parts,
    callbacks: tuple[Callback, ...],
    console: Console,
    say: Callable[[str], None],
    metrics_port: int | None = None,
) -> Result:
    """From the initial state or the latest checkpoint to the end of the run.

    Args:
        command: that the run is of.
        config: all settings.
        run: its folder, locked.
        federation: the images, and who holds them.
        parts: in their initial state.
        callbacks: called after the built-in ones.
        console, say: where progress and messages go.
        metrics_port: of Prometheus, for clients over the network.
    """
    encoder, cohort, world = parts.encoder, parts.cohort, parts.world
    first = world.rank == 0
    log, line = MetricsLog(run), ProgressLine(console)

    def average() -> None:
        parts.held.load_state_dict(cohort.average())

    monitor = Monitor(log if first else None, held_out_knn(config, federation, encoder, average, world))
    built_in: list[Callback] = [log] if first else []
    if len(federation.held_out):
        built_in.append(monitor)
    if command == "pretrain":
        built_in.append(CollapseGuard())  # before a checkpoint is written
    if isinstance(cohort, RecallingCohort):
        built_in.append(LossWatch(cohort))
    clients = cohort.cohort if isinstance(cohort, RecallingCohort) else cohort
    network = NetworkLog(log, clients, console, metrics_port) if isinstance(clients, RemoteCohort) else None
    if network is not None:
        built_in.append(network)
    built_in += [Checkpoints(run), line] if first else [Checkpoints(run)]
    trainer = Trainer(config, cohort, parts.server, federation.epoch_images, [*built_in, *callbacks], world)
    if (state := world.first(lambda: run.load_checkpoint(say))) is not None:
        if isinstance(cohort, RecallingCohort):
            cohort.store.load_state_dict(state["apart"])
        trainer.load_state_dict(state)
        say(f"resuming {run.path} at step {trainer.step} of {trainer.steps}")
    say(_describe(config, federation, encoder, trainer))
    if isinstance(cohort, RecallingCohort):
        say(cohort.describe(trainer.steps))
    try:
        with _stop_on_signal(trainer), contextlib.closing(line), contextlib.closing(network or line):
            trainer.run()
        average()
        encoder.eval()
        metrics: dict[str, Any] = {
            "steps": trainer.step,
            "training_seconds": round(log.seconds, 1),
            "monitor_seconds": round(monitor.seconds, 1),
            **{name: value for name, value in trainer.latest.items() if not name.startswith("seconds/")},
        }
        if isinstance(cohort, RecallingCohort):
            metrics["asked"] = {ask.value: count for ask, count in cohort.asked.items()}
        if trainer.step < trainer.steps:
            return Result(run.path, encoder, world.first(lambda: metrics), finished=False)
        if first:
            encoder.save(run.path, {"data": config.data.source, "recipe": config.recipe, "steps": trainer.step})
            save_weights(parts.head, run.path / "head.safetensors")
            what = "pre-training" if isinstance(federation, Mixture) else f"{config.clients.number} clients"
            draw_curve(list(run.metrics()), run.path / "curve.png", f"{config.recipe}: {what}")
        began = time.monotonic()
        metrics |= final_figures(config, federation.scored, encoder, say, world)
        metrics["evaluation_seconds"] = round(time.monotonic() - began, 1)
        cuda = parts.device.type == "cuda"
        metrics["device"] = torch.cuda.get_device_name(parts.device) if cuda else platform.machine()
        metrics["processes"] = world.size
        metrics["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
        if first:
            run.write_json("result.json", metrics)
        metrics = world.first(lambda: metrics)
    except ReportedElsewhere:
        raise
    except (RunError, OSError) as error:
        kept = run.latest_step
        safe = "no checkpoint has been written" if kept is None else f"the checkpoint of step {kept} is safe"
        hint = "" if world.size == 1 or kept is None else f"; go on with: mocosfl {command} --resume {run.path}"
        raise RunError(f"{error}; {safe} in {run.path}{hint}") from error
    return Result(run.path, encoder, metrics, finished=True)


def _data_facts(command: str, config: Config, federation: Federation, parts: Parts) -> dict[str, Any]:
    """What tells these images, and who holds them, from others."""
    held = federation.partition
    digest = hashlib.sha256(held.rows.tobytes() + held.offsets.tobytes())
    mean, std = (torch.tensor(numbers).tolist() for numbers in parts.statistics)  # in float32
    facts: dict[str, Any] = {"images": len(held.rows), "mean": mean, "std": std, "partition_sha256": digest.hexdigest()}
    if command == "pretrain":
        facts["kind"] = command
    if config.clients.init is not None:  # what the clients' half takes its input to be
        facts["input"] = [parts.encoder.mean.tolist(), parts.encoder.std.tolist()]
    return facts


@contextlib.contextmanager
def prepared(device: torch.device) -> Iterator[None]:
    """On a GPU: kernels that add in a fixed order, and no TF32 where fp32 is asked for. On a CPU: memory is kept."""
    if device.type != "cuda":
        keep_freed_memory()
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        torch.backends.cudnn.allow_tf32 = before[1]


def _describe(config: Config, federation: Federation, encoder: Encoder, trainer: Trainer) -> str:
    """What is about to run, in three lines."""
    model, sizes = config.model, federation.partition.sizes
    if isinstance(federation, Mixture):
        return (
            f"images:  {_sources(config, sizes)}; none of client {federation.spare_client}\n"
            f"server:  {model.title} cut after {model.cut}, latents "
            f"{'x'.join(map(str, encoder.latent_shape))}, {trainer.steps} steps of {config.step_images} images on "
            f"{trainer.server.device}"
        )
    if isinstance(federation, Guests):
        return (
            f"clients: {federation.joined} of at most {config.clients.number} have joined, with "
            f"{federation.images:,} images; batch {config.clients.batch}; latents "
            f"{'x'.join(map(str, encoder.latent_shape))}\n"
            f"server:  {model.title} cut after {model.cut}, {trainer.steps} steps of "
            f"up to {config.step_images} images on {trainer.server.device}"
        )
    kind = {
        "iid": "IID",
        "classes": f"{config.partition.classes_per_client} classes each",
        "dirichlet": f"Dirichlet({config.partition.alpha:g})",
    }[config.partition.kind]
    if config.partition.quantity_skew is not None:
        kind += f", volumes Dirichlet({config.partition.quantity_skew:g})"
    images = f"{sizes.min()}" if sizes.min() == sizes.max() else f"{sizes.min()} to {sizes.max()}"
    pool = "" if config.pool == len(sizes) else f", {config.pool} active in a round"
    pool += f", {config.clients.drop:.0%} drop out between averages" if config.clients.drop else ""
    rich = f" ({config.rich} of them rich: batch {config.batches[-1]})" if config.rich else ""
    latent = "x".join(map(str, encoder.latent_shape))
    test = 0 if federation.splits.test is None else len(federation.splits.test)
    steps = f"{trainer.steps} steps of {config.step_images} images on {trainer.server.device}"
    clients = f"{len(sizes)}, {kind}, {images} images each, batch {config.clients.batch}{rich}{pool}"
    if config.clients.holds == "network":
        halves = f"clients: {clients}; each with the whole network\nnetwork: {model.title}, {steps}"
    else:
        halves = f"clients: {clients}; latents {latent}\nserver:  {model.title} cut after {model.cut}, {steps}"
    return (
        f"images:  {config.data.source}, {encoder.channels}x{encoder.size}x{encoder.size}; "
        f"{len(federation.train_rows)} for training, {len(federation.held_out)} held out, {test} for testing\n{halves}"
    )


def _sources(config: Config, sizes: NDArray[np.int64]) -> str:
    named = [config.pretrain.source] if config.pretrain.source else []
    named += [f"the clients' {config.data.source}"] * (config.pretrain.target_share > 0)
    pieces = [f"{size} of {name}" for size, name in zip(sizes, named, strict=True)]
    return " and ".join(pieces) + ", half and half in a batch" * (len(pieces) == 2)


@contextlib.contextmanager
def _stop_on_signal(trainer: Trainer) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the run after the step under way; a second Ctrl-C ends it at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        if trainer.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        trainer.stop = True

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
