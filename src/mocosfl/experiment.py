"""From a configuration to a finished run: builds the parts, trains, evaluates, and keeps the results."""

from __future__ import annotations

import contextlib
import platform
import signal
import threading
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
from mocosfl.config import Config
from mocosfl.data.images import ImageSet, channel_statistics
from mocosfl.data.partition import Partition, partition
from mocosfl.data.sampler import ClientSampler
from mocosfl.data.sources import Splits, balanced, load
from mocosfl.encoder import Encoder, load_encoder
from mocosfl.errors import RunError, SettingError
from mocosfl.evaluation import extract, knn_accuracy, linear_probe
from mocosfl.models import build_head
from mocosfl.models.heads import WIDTHS
from mocosfl.reporting.curve import draw_curve
from mocosfl.run import Run
from mocosfl.server import Server
from mocosfl.trainer import Callback, Trainer

_HELD_OUT_STREAM, _BANK_STREAM = (
    0x68656C64,
    0x62616E6B,
)  # "held", "bank": keep their draws apart from all others


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
        say("data: no labels; the kNN monitor and the evaluation at the end are skipped")
    elif config.data.held_out > 0:
        count = round(config.data.held_out * len(rows))
        held_out = balanced(rows, labels, count, np.random.default_rng([config.seed, _HELD_OUT_STREAM]))
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
    return Federation(splits, rows, held_out, held)


def choose_device(name: str) -> torch.device:
    """The device that ``train.device`` means.

    Raises:
        SettingError: this machine does not have it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
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
        out: the run folder. It must not hold a run, unless one of the next two says so.
        resume: go on from the latest checkpoint in ``out``, whose settings must be the same.
        overwrite: delete the run in ``out`` first.
        callbacks: called after the built-in ones in every step.
        console: where progress is drawn. Unset: nowhere.

    Returns:
        The result; its folder is described in ``mocosfl.run``.

    Raises:
        SettingError: the settings do not fit together or with the data.
        DataError: the images cannot be used.
        RunError: the run folder cannot be used, or training had to stop; what was kept is named.
    """
    console = console or Console(quiet=True)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    device = choose_device(config.train.device)
    if resume:
        run = Run.open(out)
        run.check_resumable(config)
        run.check_writable()
    federation = federate(config, say)  # before the folder is made: bad data leaves nothing behind
    images = federation.splits.train.to(device)
    mean, std = channel_statistics(images, federation.train_rows)
    channels, size = images.shape[0], images.shape[-1]
    encoder = Encoder(config.model, channels, size, config.seed).to(device)
    encoder.mean.copy_(torch.tensor(mean))
    encoder.std.copy_(torch.tensor(std))
    head = build_head(config.model.head, encoder.features, config.seed)
    sampler = ClientSampler(federation.partition, config.seed)
    cohort = LocalCohort(encoder.client, config, images, sampler, encoder.mean, encoder.std, device)
    server = Server(encoder.server, head, config, WIDTHS[config.model.head], device)
    if not resume:
        run = Run.create(out, config, overwrite)

    log, line = MetricsLog(run), ProgressLine(console)
    built_in: list[Callback] = [log]
    if len(federation.held_out):
        built_in.append(Monitor(log, _monitor(config, federation, cohort, encoder)))
    built_in += [Checkpoints(run), line]
    trainer = Trainer(config, cohort, server, len(federation.train_rows), [*built_in, *callbacks])
    if resume and (state := run.load_checkpoint()) is not None:
        trainer.load_state_dict(state)
        say(f"resuming {run.path} at step {trainer.step} of {trainer.steps}")
    say(_describe(config, federation, encoder, trainer, device))
    try:
        with _stop_on_signal(trainer), contextlib.closing(line):
            trainer.run()
        encoder.client.load_state_dict(cohort.average())
        encoder.eval()
        metrics: dict[str, Any] = {"steps": trainer.step, "training_seconds": round(log.seconds, 1), **trainer.latest}
        if trainer.step < trainer.steps:
            return Result(run.path, encoder, metrics, finished=False)
        encoder.save(run.path, {"data": config.data.source, "recipe": config.recipe, "steps": trainer.step})
        draw_curve(list(run.metrics()), run.path / "curve.png", f"{config.recipe}: {config.clients.number} clients")
        if "knn" in metrics:
            metrics["knn_held_out"] = metrics.pop("knn")
        metrics |= _evaluate(config, federation.splits, encoder, device)
        metrics["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
        metrics["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        run.write_json("result.json", metrics)
    except (RunError, OSError) as error:
        kept = run.latest_step
        safe = "no checkpoint has been written" if kept is None else f"the checkpoint of step {kept} is safe"
        raise RunError(f"{error}; {safe} in {run.path}") from error
    return Result(run.path, encoder, metrics, finished=True)


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
    metrics = _evaluate(run.config, splits, encoder.to(chosen), chosen)
    if metrics:
        run.write_json("evaluation.json", metrics)
    return metrics


def _evaluate(config: Config, splits: Splits, encoder: Encoder, device: torch.device) -> dict[str, Any]:
    """kNN before and after training, and linear probe, with all training images as bank and the whole test set."""
    train, test = splits.train, splits.test
    if train.labels is None or test is None or test.labels is None or train.classes is None:
        return {}
    untrained = Encoder(config.model, encoder.channels, encoder.size, config.seed).to(device)
    untrained.mean.copy_(encoder.mean)
    untrained.std.copy_(encoder.std)
    settings, classes = config.evaluation, len(train.classes)
    labels = [torch.from_numpy(np.asarray(split.labels)).to(device) for split in (train, test)]
    metrics: dict[str, Any] = {"bank_images": len(train), "test_images": len(test)}
    for name, model in (("knn_untrained", untrained), ("knn", encoder)):
        bank, queries = (_features(model, split, np.arange(len(split)), settings.batch) for split in (train, test))
        metrics[name] = knn_accuracy(bank, labels[0], queries, labels[1], settings.k, settings.temperature, classes)
    if settings.probe_epochs:
        probe = linear_probe(
            bank,
            labels[0],
            queries,
            labels[1],
            classes,
            settings.probe_epochs,
            settings.probe_lr,
            config.seed,
        )
        metrics |= {"linear_probe": probe.accuracy, "linear_probe_train": probe.train_accuracy}
    return metrics


def _monitor(config: Config, federation: Federation, cohort: LocalCohort, encoder: Encoder) -> Callable[[], float]:
    """kNN accuracy, in percent, of the average client half and the server half as they stand.

    The queries are the held-out images, the bank is some of the clients' images, every class alike.
    """
    images, settings, device = federation.splits.train, config.evaluation, encoder.mean.device
    assert images.labels is not None
    assert images.classes is not None
    count = min(settings.monitor_bank, len(federation.train_rows))
    rng = np.random.default_rng([config.seed, _BANK_STREAM])
    rows = (balanced(federation.train_rows, images.labels, count, rng), federation.held_out)
    bank_labels, query_labels = (torch.from_numpy(images.labels[part]).to(device) for part in rows)
    classes = len(images.classes)

    def knn() -> float:
        encoder.client.load_state_dict(cohort.average())
        bank, queries = (_features(encoder, images, part, settings.batch) for part in rows)
        return knn_accuracy(bank, bank_labels, queries, query_labels, settings.k, settings.temperature, classes)

    return knn


def _features(encoder: Encoder, images: ImageSet, rows: NDArray[np.int64], batch: int) -> Tensor:
    """(len(rows), D) features."""
    device = encoder.mean.device
    batches = (images.take(rows[start : start + batch], device).float() / 255 for start in range(0, len(rows), batch))
    return extract(encoder, batches)


def _describe(config: Config, federation: Federation, encoder: Encoder, trainer: Trainer, device: torch.device) -> str:
    """What is about to run, in three lines."""
    model, sizes = config.model, federation.partition.sizes
    kind = {
        "iid": "IID",
        "classes": f"{config.partition.classes_per_client} classes each",
        "dirichlet": f"Dirichlet({config.partition.alpha:g})",
    }[config.partition.kind]
    images = f"{sizes.min()}" if sizes.min() == sizes.max() else f"{sizes.min()} to {sizes.max()}"
    pool = "" if config.pool == len(sizes) else f", {config.pool} active in a round"
    latent = "x".join(map(str, encoder.latent_shape))
    test = 0 if federation.splits.test is None else len(federation.splits.test)
    return (
        f"images:  {config.data.source}, {encoder.channels}x{encoder.size}x{encoder.size}; "
        f"{len(federation.train_rows)} for training, {len(federation.held_out)} held out, {test} for testing\n"
        f"clients: {len(sizes)}, {kind}, {images} images each, batch {config.clients.batch}{pool}; "
        f"latents {latent}\n"
        f"server:  {model.backbone} of width {model.width} cut after {model.cut}, {trainer.steps} steps of "
        f"{config.step_images} images on {device}"
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
