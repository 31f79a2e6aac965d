"""From a configuration to a finished run: builds the parts, trains, evaluates, and keeps the results."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from mocosfl.callbacks import Checkpoints, MetricsLog, Monitor, ProgressLine
from mocosfl.clients import LocalCohort
from mocosfl.compute import keep_freed_memory
from mocosfl.config import Config, EvaluationSettings
from mocosfl.data.images import ImageSet, channel_statistics, upload
from mocosfl.data.partition import Partition, partition
from mocosfl.data.sampler import ClientSampler
from mocosfl.data.sources import Splits, balanced, load
from mocosfl.distributed import World, joined
from mocosfl.encoder import Encoder, load_encoder
from mocosfl.errors import ReportedElsewhere, RunError, SettingError
from mocosfl.evaluation import extract, knn_accuracy, linear_probe
from mocosfl.models import build_head
from mocosfl.models.heads import WIDTHS
from mocosfl.randomness import stream
from mocosfl.reporting.curve import draw_curve
from mocosfl.run import Run
from mocosfl.server import Server
from mocosfl.trainer import Callback, Trainer


@dataclass(frozen=True)
class Federation:
    """The images of a run and who holds them.

    Attributes:
        splits: training and test images.
        train_rows: (n,) int64, rows of the training split that clients hold.
        held_out: (m,) int64, rows that no client holds; the monitor's queries.
        partition: which client holds which of ``train_rows``.
    """

    splits: Splits
    train_rows: NDArray[np.int64]
    held_out: NDArray[np.int64]
    partition: Partition


def federate(config: Config, say: Callable[[str], None]) -> Federation:
    """Load the images, set the held-out slice aside, and spread the rest over the clients.

    Raises:
        SettingError, DataError: the source or the partition is not possible.
    """
    splits = load(config.data, config.seed, say)
    labels, rows = splits.train.labels, np.arange(len(splits.train))
    held_out = rows[:0]
    if labels is None:
        say("data: the images have no labels; the kNN monitor is skipped")
    elif config.data.held_out > 0:
        count = round(config.data.held_out * len(rows))
        held_out = balanced(rows, labels, count, np.random.default_rng(stream(config.seed, "held out")))
        rows = np.setdiff1d(rows, held_out)
    classes = len(splits.train.classes) if splits.train.classes is not None else None
    held = partition(
        config.partition,
        config.clients.number,
        rows,
        None if labels is None else labels[rows],
        classes,
        config.seed,
        config.clients.batch,
    )
    batch = config.clients.batch * config.clients.rich_batch_factor
    if config.rich and (fewest := held.sizes[-config.rich :].min()) < batch:
        raise SettingError(
            f"clients.rich_batch_factor={config.clients.rich_batch_factor}: a rich client would use {batch} images "
            f"in a step, and one of them holds only {fewest}"
        )
    return Federation(splits, rows, held_out, held)


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
    device = choose_device(config.train.device)
    with joined(device) as world, prepared(device), contextlib.ExitStack() as stack:
        console = Console(quiet=True) if console is None or world.rank > 0 else console
        say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
        run = Run(Path(world.first(lambda: str(out))), config)

        def check() -> None:
            if resume:
                Run.open(out).check_resumable(config)
            else:
                Run.check_free(out, overwrite)

        def begin() -> None:
            if not resume:
                Run.create(out, config, overwrite)
            stack.enter_context(run.locked())
            run.check_data(_data_facts(federation, parts.encoder))

        world.first(check)
        federation = world.lead(lambda: federate(config, say))
        # what does not fit fails here, before the folder is touched
        parts = world.lead(lambda: build(config, federation, device, world))
        world.first(begin)
        return _train(run, federation, parts, callbacks, console, say)


@dataclass(frozen=True)
class Parts:
    encoder: Encoder
    cohort: LocalCohort
    server: Server
    device: torch.device
    world: World


def build(config: Config, federation: Federation, device: torch.device, world: World | None = None) -> Parts:
    """Models, clients and server in their initial state.

    Args:
        config: all settings.
        federation: the images and who holds them.
        device: where to compute.
        world: the processes of the run. Unset: this one alone.

    Raises:
        SettingError: the model does not fit the images.
    """
    world = world or World()
    if config.pool < world.size:
        raise SettingError(
            f"clients.pool={config.pool}: each of the run's {world.size} processes needs an active client; "
            "start fewer processes"
        )
    if config.train.compile != "off":
        torch.compiler.reset()  # or the shapes of earlier runs count against its limit of recompilations
    images = federation.splits.train.to(device)
    mean, std = channel_statistics(images, federation.train_rows)
    encoder = Encoder(config.model, images.shape[0], images.shape[-1], config.seed)
    encoder.mean.copy_(torch.tensor(mean))
    encoder.std.copy_(torch.tensor(std))
    encoder.to(device)
    head = build_head(config.model.head, encoder.features, config.seed)
    sampler = ClientSampler(federation.partition, config.seed)
    cohort = LocalCohort(encoder.client, config, images, sampler, encoder.mean, encoder.std, device, world)
    server = Server(encoder.server, head, config, WIDTHS[config.model.head], device, world)
    return Parts(encoder, cohort, server, device, world)


def _train(
    run: Run,
    federation: Federation,
    parts: Parts,
    callbacks: tuple[Callback, ...],
    console: Console,
    say: Callable[[str], None],
) -> Result:
    """From the initial state or the latest checkpoint to the end of the run."""
    config, encoder, cohort, world = run.config, parts.encoder, parts.cohort, parts.world
    first = world.rank == 0
    log, line = MetricsLog(run), ProgressLine(console)
    monitor = Monitor(log if first else None, _monitor(config, federation, parts))
    built_in: list[Callback] = [log] if first else []
    if len(federation.held_out):
        built_in.append(monitor)
    built_in += [Checkpoints(run), line] if first else [Checkpoints(run)]
    images = len(federation.train_rows)
    trainer = Trainer(config, cohort, parts.server, images, [*built_in, *callbacks], world)
    if (state := world.first(lambda: run.load_checkpoint(say))) is not None:
        trainer.load_state_dict(state)
        say(f"resuming {run.path} at step {trainer.step} of {trainer.steps}")
    say(_describe(config, federation, encoder, trainer))
    try:
        with _stop_on_signal(trainer), contextlib.closing(line):
            trainer.run()
        encoder.client.load_state_dict(cohort.average())
        encoder.eval()
        metrics: dict[str, Any] = {
            "steps": trainer.step,
            "training_seconds": round(log.seconds, 1),
            "monitor_seconds": round(monitor.seconds, 1),
            **trainer.latest,
        }
        if trainer.step < trainer.steps:
            return Result(run.path, encoder, world.first(lambda: metrics), finished=False)
        if first:
            encoder.save(run.path, {"data": config.data.source, "recipe": config.recipe, "steps": trainer.step})
            draw_curve(list(run.metrics()), run.path / "curve.png", f"{config.recipe}: {config.clients.number} clients")
        began = time.monotonic()
        metrics |= _evaluate(config, federation.splits, encoder, say, world)
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
        hint = "" if world.size == 1 or kept is None else f"; go on with: mocosfl train --resume {run.path}"
        raise RunError(f"{error}; {safe} in {run.path}{hint}") from error
    return Result(run.path, encoder, metrics, finished=True)


def _data_facts(federation: Federation, encoder: Encoder) -> dict[str, Any]:
    """What tells these images, and who holds them, from others."""
    held = federation.partition
    digest = hashlib.sha256(held.rows.tobytes() + held.offsets.tobytes())
    mean, std = encoder.mean.tolist(), encoder.std.tolist()
    return {"images": len(held.rows), "mean": mean, "std": std, "partition_sha256": digest.hexdigest()}


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


def evaluate(path: str | Path, console: Console | None = None, device: str = "auto") -> dict[str, Any]:
    """Evaluate the encoder of a finished run on its test set, and write the figures to evaluation.json.

    Args:
        path: the run folder.
        console: where messages go. Unset: nowhere.
        device: as ``train.device``.

    Returns:
        ``knn_untrained``, ``knn`` and ``linear_probe`` in percent; empty without labels.

    Raises:
        RunError: there is no finished run.
    """
    console = console or Console(quiet=True)
    run = Run.open(path)
    encoder = load_encoder(run.path)
    chosen = choose_device(device)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    splits = load(run.config.data, run.config.seed, say)
    metrics = _evaluate(run.config, splits, encoder.to(chosen), say, World())
    if metrics:
        run.write_json("evaluation.json", metrics)
    return metrics


def _evaluate(
    config: Config, splits: Splits, encoder: Encoder, say: Callable[[str], None], world: World
) -> dict[str, Any]:
    """kNN before and after training, and linear probe, with all training images as bank and the whole test set."""
    train, test = splits.train, splits.test
    if train.labels is None or train.classes is None or test is None or test.labels is None:
        say("evaluation: it needs training and test images with labels, and is skipped")
        return {}
    device, settings, classes = encoder.mean.device, config.evaluation, len(train.classes)
    untrained = Encoder(config.model, encoder.channels, encoder.size, config.seed).to(device)
    untrained.mean.copy_(encoder.mean)
    untrained.std.copy_(encoder.std)
    train_labels, test_labels = upload(train.labels, device), upload(test.labels, device)

    def features(model: Encoder) -> tuple[Tensor, Tensor]:
        bank, queries = (
            _features(model, split, np.arange(len(split)), settings.batch, world) for split in (train, test)
        )
        return bank, queries

    def knn(bank: Tensor, queries: Tensor) -> float:
        return _knn(bank, train_labels, queries, test_labels, settings, classes, world)

    bank, queries = features(encoder)
    metrics: dict[str, Any] = {
        "bank_images": len(train),
        "test_images": len(test),
        "knn_untrained": knn(*features(untrained)),
        "knn": knn(bank, queries),
    }
    if settings.probe_epochs:
        probe = world.first(
            lambda: linear_probe(
                bank,
                train_labels,
                queries,
                test_labels,
                classes,
                settings.probe_epochs,
                settings.probe_lr,
                stream(config.seed, "probe"),
            )
        )
        metrics |= {"linear_probe": probe.accuracy, "linear_probe_train": probe.train_accuracy}
    return metrics


def _monitor(config: Config, federation: Federation, parts: Parts) -> Callable[[], float]:
    """kNN accuracy, in percent, of the average client half and the server half as they stand.

    The queries are the held-out images, the bank is some of the clients' images, every class alike.
    """
    images, settings, encoder, world = federation.splits.train, config.evaluation, parts.encoder, parts.world
    if images.labels is None or images.classes is None:
        return lambda: float("nan")  # there are no held-out images either
    count = min(settings.monitor_bank, len(federation.train_rows))
    rng = np.random.default_rng(stream(config.seed, "bank"))
    rows = (balanced(federation.train_rows, images.labels, count, rng), federation.held_out)
    bank_labels, query_labels = (upload(images.labels[part], parts.device) for part in rows)
    classes = len(images.classes)

    def knn() -> float:
        encoder.client.load_state_dict(parts.cohort.average())
        bank, queries = (_features(encoder, images, part, settings.batch, world) for part in rows)
        return _knn(bank, bank_labels, queries, query_labels, settings, classes, world)

    return knn


def _features(encoder: Encoder, images: ImageSet, rows: NDArray[np.int64], batch: int, world: World) -> Tensor:
    """(len(rows), D) features; every process computes a share of them and has all of them."""
    device = encoder.mean.device
    own = rows[world.share(len(rows))]
    batches = (images.take(own[start : start + batch], device).float() / 255 for start in range(0, len(own), batch))
    features = extract(encoder, batches) if len(own) else torch.zeros(0, encoder.features, device=device)
    return world.gather(features, world.lengths(len(rows)))


def _knn(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    settings: EvaluationSettings,
    classes: int,
    world: World,
) -> float:
    """kNN accuracy in percent; every process asks for a share of the queries."""
    own = world.share(len(queries))
    correct = torch.zeros((), dtype=torch.float64)
    if count := own.stop - own.start:
        share = knn_accuracy(bank, bank_labels, queries[own], labels[own], settings.k, settings.temperature, classes)
        correct += round(share / 100 * count)
    world.add([correct])
    return 100 * float(correct) / len(queries)


def _describe(config: Config, federation: Federation, encoder: Encoder, trainer: Trainer) -> str:
    """What is about to run, in three lines."""
    model, sizes = config.model, federation.partition.sizes
    kind = {
        "iid": "IID",
        "classes": f"{config.partition.classes_per_client} classes each",
        "dirichlet": f"Dirichlet({config.partition.alpha:g})",
    }[config.partition.kind]
    images = f"{sizes.min()}" if sizes.min() == sizes.max() else f"{sizes.min()} to {sizes.max()}"
    pool = "" if config.pool == len(sizes) else f", {config.pool} active in a round"
    rich = f" ({config.rich} of them rich: batch {config.batches[-1]})" if config.rich else ""
    latent = "x".join(map(str, encoder.latent_shape))
    test = 0 if federation.splits.test is None else len(federation.splits.test)
    return (
        f"images:  {config.data.source}, {encoder.channels}x{encoder.size}x{encoder.size}; "
        f"{len(federation.train_rows)} for training, {len(federation.held_out)} held out, {test} for testing\n"
        f"clients: {len(sizes)}, {kind}, {images} images each, batch {config.clients.batch}{rich}{pool}; "
        f"latents {latent}\n"
        f"server:  {model.backbone} of width {model.width} cut after {model.cut}, {trainer.steps} steps of "
        f"{config.step_images} images on {trainer.server.device}"
    )


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
