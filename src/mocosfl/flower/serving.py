"""Training with clients under Flower."""

from __future__ import annotations

import contextlib
import time
from datetime import datetime
from functools import partial
from pathlib import Path

from flwr.serverapp import Grid
from rich.console import Console
from torch import Tensor

from mocosfl.callbacks import MetricsLog, let_follow
from mocosfl.config import Config
from mocosfl.distributed import World
from mocosfl.errors import RunError, SettingError
from mocosfl.experiment import Parts, Result, choose_device, networks, prepared
from mocosfl.flower.average import AveragingCohort
from mocosfl.flower.cohort import FlowerCohort
from mocosfl.flower.settings import FlowerSettings
from mocosfl.models.foreign import settled
from mocosfl.models.heads import WIDTHS
from mocosfl.run import Run
from mocosfl.server import Server
from mocosfl.serving import check_quorum, check_remote, conduct, folder_is_fresh, own_images, restore_images
from mocosfl.trainer import Callback, Trainer


def serve(
    settings: FlowerSettings, grid: Grid, callbacks: tuple[Callback, ...] = (), console: Console | None = None
) -> Result:
    """Train with clients that are Flower's nodes; their images stay with them.

    Args:
        settings: the Flower run config.
        grid: the nodes.
        callbacks, console: as for ``mocosfl.train``.

    Returns:
        The result; its folder is described in ``mocosfl.run``.

    Raises:
        SettingError: the settings do not fit together, or not with clients under Flower.
        DataError: the images of ``evaluate-on`` cannot be used.
        RunError: the run folder cannot be used, or training had to stop; what was kept is named.
    """
    config = settings.config()
    config = config.model_copy(update={"model": settled(config.model)})
    if settings.resume:
        settings = settings.going_on(config)
    _check(config, settings)
    device = choose_device(config.train.device)
    console = Console(quiet=True) if console is None else console
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    default = Path("runs") / f"{config.recipe}-flower-{datetime.now():%Y%m%d-%H%M%S}"
    out = Path(settings.out or default).absolute()
    if (out / "config.yaml").is_file() and not settings.resume and not settings.overwrite:
        raise RunError(
            f"out={out} already holds a run; go on with it by resume=true, replace it by overwrite=true, or choose "
            "another folder"
        )
    fresh = folder_is_fresh("flower", config, out, settings.resume, settings.overwrite)
    evaluate_on = settings.evaluate_on or None
    with prepared(device), contextlib.ExitStack() as stack:
        own = own_images(config, evaluate_on, say)
        channels, size, _ = own.train.shape
        encoder, head = networks(config, channels, size, fresh)
        run = Run(out, config) if settings.resume else Run.create(out, config, settings.overwrite)
        stack.enter_context(run.locked())
        say(f"run folder: {out}")
        server = Server(encoder.server, head, config, WIDTHS[config.model.head], device)
        kind = FlowerCohort if settings.mode == "latents" else AveragingCohort
        cohort = kind(encoder.client, config, settings, grid, encoder.latent_shape, channels, size, device, say)
        if isinstance(cohort, AveragingCohort):
            cohort.server = server
        stack.callback(cohort.stop)
        restore_images(config, run, cohort)
        cohort.start()
        parts = Parts(encoder, head, cohort, server, device, World(), ([], []), encoder.client)
        wanted = settings.min_clients or config.clients.number
        return conduct(
            "flower", config, run, own, parts, cohort, wanted, evaluate_on, (*callbacks, FlowerLog(cohort)), console
        )


class FlowerLog(Callback):
    """Tells the cohort how long the run is, and writes Flower's figures beside the metrics.

    Args:
        cohort: the clients.
    """

    def __init__(self, cohort: FlowerCohort) -> None:
        self.cohort = cohort

    def before_training(self, trainer: Trainer) -> None:
        """Begin to count."""
        let_follow(self.cohort, trainer)
        if isinstance(self.cohort, AveragingCohort):
            self.cohort.rates = lambda step: trainer.rates_of(step)[1]
        self.log = next(callback for callback in trainer.callbacks if isinstance(callback, MetricsLog))
        self.last, self.step = time.monotonic(), trainer.step

    def after_step(self, trainer: Trainer, metrics: dict[str, Tensor]) -> None:
        """Write when it is time."""
        if trainer.step % trainer.config.train.log_every and trainer.step != trainer.steps:
            return
        cohort, now = self.cohort, time.monotonic()
        values: dict[str, float] = {
            "clients": cohort.present,
            "steps_per_second": (trainer.step - self.step) / max(now - self.last, 1e-9),
            "waited_seconds": round(cohort.waited, 2),
        }
        values |= {
            name: cohort.counts[name] for name in ("chunks", "answers", "failures", "late", "refused", "bytes_in")
        }
        if cohort.round_trips:
            values["round_trip_seconds"] = round(cohort.round_trip_seconds / cohort.round_trips, 2)
        if isinstance(cohort, AveragingCohort):
            values["clients_loss"] = cohort.loss
        self.log.write(trainer, values)
        self.last, self.step = now, trainer.step


def _check(config: Config, settings: FlowerSettings) -> None:
    """Raises ``SettingError`` for what cannot be done under Flower."""
    check_remote("flwr run", config, settings.resume)
    if settings.min_clients > config.clients.number:
        raise SettingError(
            f"min-clients={settings.min_clients}: there are {config.clients.number} clients (clients.number)"
        )
    if settings.mode == "latents":
        if not config.clients.frozen:
            raise SettingError(
                "mode=latents: clients that learn need a gradient in every step, and a message takes seconds; accepted "
                "with clients.frozen=true. For clients that learn there are mode=average and mocosfl serve"
            )
        check_quorum(config, settings.quorum, settings.min_clients)
        return
    if config.clients.frozen:
        raise SettingError("mode=average: clients.frozen=true leaves nothing to average; use mode=latents")
    for key in ("steps", "memory"):
        if (value := getattr(settings, key)) != FlowerSettings.model_fields[key].default:
            raise SettingError(f"{key}={value:g}: in mode=average one message is a round; set sync.every")
    refused = {
        f"sync.every={config.sync.every}": config.sync.every == 0,
        f"sync.average={config.sync.average}": config.sync.average != "fedavg",
        "sync.momentum=false": not config.sync.momentum,
        "contrast.feature_sharing=false": not config.contrast.feature_sharing,
        f"contrast.objective={config.contrast.objective}": config.contrast.objective != "moco",
        "contrast.concatenate=false": not config.contrast.concatenate,
        "clients.keep_optimizer=true": config.clients.keep_optimizer,
        f"traffic.loss_threshold={config.traffic.loss_threshold}": config.traffic.loss_threshold is not None,
    }
    reasons = {
        "sync.every": "it is the steps of a round, of which there must be some",
        "sync.average": "Flower's FedAvg averages; accepted is fedavg",
        "sync.momentum": "clients keep nothing between two rounds, so the momentum copies are averaged too",
        "contrast.feature_sharing": "the clients' queues are the server's alone",
        "contrast.objective": "a client that learns by itself has its own images alone in a batch; accepted is moco",
        "contrast.concatenate": "there is no server that takes the clients' latents step by step",
        "clients.keep_optimizer": "clients keep nothing between two rounds",
        "traffic.loss_threshold": "clients learn in every round",
    }
    for setting, is_set in refused.items():
        if is_set:
            raise SettingError(f"{setting}: mode=average cannot do that: {reasons[setting.partition('=')[0]]}")
