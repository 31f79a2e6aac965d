"""Training with clients that are elsewhere."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from mocosfl.clients import Cohort
from mocosfl.config import COMPARING, Config
from mocosfl.data.federation import Guests, set_aside
from mocosfl.data.images import ImageSet
from mocosfl.data.partition import Partition
from mocosfl.data.sources import Splits, load
from mocosfl.distributed import World
from mocosfl.errors import SettingError
from mocosfl.experiment import Parts, Result, check_frozen, choose_device, networks, prepared, run_to_end, seen
from mocosfl.latent_cache import RecallingCohort, UploadFirst
from mocosfl.models.foreign import settled
from mocosfl.models.heads import WIDTHS
from mocosfl.network.cohort import RemoteCohort
from mocosfl.network.observe import event_log
from mocosfl.network.service import check_certificates, check_listenable, registry_of
from mocosfl.network.settings import ServeSettings
from mocosfl.reporting.dashboard import Dashboard
from mocosfl.run import Run
from mocosfl.server import Server
from mocosfl.trainer import Callback


def serve(
    config: Config,
    settings: ServeSettings,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: tuple[Callback, ...] = (),
    console: Console | None = None,
) -> Result:
    """Train with clients that join over the network; their images stay with them.

    Args:
        config: all settings. ``data.size`` has to be set, or ``settings.evaluate_on``; of how images are read and
            spread over clients nothing else is used.
        settings: how to listen and wait.
        out, resume, overwrite, callbacks, console: as for ``train``.

    Returns:
        The result; its folder is described in ``mocosfl.run``.

    Raises:
        SettingError: the settings do not fit together, or not with clients over the network.
        DataError: the images of ``settings.evaluate_on`` cannot be used.
        RunError: the run folder, the address or a certificate cannot be used, or training had to stop; what was kept is
            named.
    """
    config = config.model_copy(update={"model": settled(config.model)})
    _check_servable(config, settings, resume)
    device = choose_device(config.train.device)
    console = Console(quiet=True) if console is None else console
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    fresh = folder_is_fresh("serve", config, out, resume, overwrite)
    check_certificates(settings)
    check_listenable(settings.listen)
    if settings.metrics_port is not None:
        check_listenable(f"127.0.0.1:{settings.metrics_port}")
    with prepared(device), contextlib.ExitStack() as stack:
        own = own_images(config, settings.evaluate_on, say)
        channels, size, _ = own.train.shape
        encoder, head = networks(config, channels, size, fresh)
        run = Run(Path(out), config) if resume else Run.create(out, config, overwrite)
        stack.enter_context(run.locked())
        events = stack.enter_context(event_log(run.path / "events.jsonl"))
        cohort = RemoteCohort(encoder.client, config, settings, encoder.latent_shape, channels, size, device, events)
        finished = False
        stack.callback(lambda: cohort.stop(finished))
        restore_images(config, run, cohort)
        cohort.start()
        for callback in callbacks:
            if isinstance(callback, Dashboard):
                callback.observe(cohort)
        host = settings.listen.rpartition(":")[0]
        say(f"listening on {host}:{cohort.exchange.service.port}" + ("" if settings.tls_cert else " without TLS"))
        server = Server(encoder.server, head, config, WIDTHS[config.model.head], device)
        parts = Parts(encoder, head, cohort, server, device, World(), ([], []), encoder.client)
        wanted = settings.min_clients or config.clients.number
        result = conduct(
            "serve",
            config,
            run,
            own,
            parts,
            cohort,
            wanted,
            settings.evaluate_on,
            callbacks,
            console,
            settings.metrics_port,
        )
        finished = result.finished
    return result


class ElsewhereCohort(Cohort, Protocol):
    """Clients that are not in this process, of whom nothing is known before they come.

    Attributes:
        images: (N,) int64, of each client; 0 if it has not been there. It fills as clients come.
    """

    @property
    def images(self) -> NDArray[np.int64]: ...

    @property
    def present(self) -> int:
        """Clients that are there."""

    def gather(self, count: int, say: Callable[[int], None]) -> tuple[int, NDArray, NDArray]:
        """Wait for so many clients; returns their images, and mean and standard deviation of each channel."""

    def begin(self, mean: NDArray, std: NDArray) -> None:
        """Let the clients start; images are normalised with these, (C,)."""

    def admit(self, images: float) -> None:
        """So many images may all clients have together."""

    def fingerprint(self) -> str:
        """Of the half that frozen clients are handed (``mocosfl_device.wire.fingerprint``)."""


def folder_is_fresh(command: str, config: Config, out: str | Path, resume: bool, overwrite: bool) -> bool:
    """Whether nothing is kept yet in a run folder, before any work is done.

    Raises:
        RunError: the folder cannot be used.
    """
    if not resume:
        Run.check_free(out, overwrite)
        return True
    earlier = Run.open(out)
    earlier.check_resumable(config, command)
    return earlier.latest_step is None


def restore_images(config: Config, run: Run, cohort: ElsewhereCohort) -> None:
    """Tell clients that are elsewhere, before they can be heard, how many images each had if the run goes on.

    Args:
        config: all settings.
        run: its folder.
        cohort: the clients.
    """
    facts = run.data_facts() or {}
    if config.recalls and "client_images" in facts:
        cohort.images[:] = facts["client_images"]


def conduct(
    command: str,
    config: Config,
    run: Run,
    own: Splits,
    parts: Parts,
    cohort: ElsewhereCohort,
    wanted: int,
    evaluate_on: str | None,
    callbacks: tuple[Callback, ...],
    console: Console,
    metrics_port: int | None = None,
) -> Result:
    """Wait for clients that are elsewhere, and train with them to the end of the run.

    Args:
        command: that the run is of.
        config: all settings.
        run: its folder, locked.
        own: the server's own images; may be none.
        parts: in their initial state, on the CPU but for the server; their cohort and statistics are found here.
        cohort: the clients, who can be heard; of a run that goes on, after ``restore_images``.
        wanted: clients to wait for before the run begins.
        evaluate_on: where ``own`` is from.
        callbacks, console, metrics_port: as for ``run_to_end``.
    """
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    encoder, device = parts.encoder, parts.device
    facts = run.data_facts() or {"kind": command}
    run.write_json("data.json", facts)
    if not _all_is_here(config, run, facts):
        images, mean, std = cohort.gather(wanted, lambda there: say(f"waiting for clients: {there} of {wanted}"))
    if "images" not in facts:
        own_mean, own_std = (encoder.mean, encoder.std) if config.clients.init else map(torch.tensor, (mean, std))
        facts |= {"images": images, "mean": own_mean.tolist(), "std": own_std.tolist()}
        facts["evaluate_on"] = evaluate_on
        if config.recalls:
            facts["client_images"] = cohort.images.tolist()
        run.write_json("data.json", facts)
        run.write_fingerprints(seen(config, None))
    encoder.mean.copy_(torch.tensor(facts["mean"]))
    encoder.std.copy_(torch.tensor(facts["std"]))
    encoder.to(device)
    own.train.to(device)
    cohort.begin(encoder.mean.cpu().numpy(), encoder.std.cpu().numpy())
    if config.clients.frozen:
        say(f"half:    SHA-256 {cohort.fingerprint()}")
    clients: Cohort = cohort
    if config.recalls:
        begun = np.array(facts["client_images"])
        clients = RecallingCohort(cohort, config, cohort.images, encoder.latent_shape, device, begun)
        cohort.admit(clients.store.room / 2)  # to make room for more takes twice the memory for a moment
    rows, held_out = set_aside(config.data.held_out, np.arange(len(own.train)), own.train.labels, config.seed)
    nobody = Partition(np.zeros(0, np.int64), np.zeros(1, np.int64))
    guests = Guests(own, rows, held_out, nobody, facts["images"], cohort.present)
    parts = replace(parts, cohort=clients, statistics=(facts["mean"], facts["std"]))
    try:
        return run_to_end(command, config, run, guests, parts, callbacks, console, say, metrics_port)
    finally:
        run.write_partition(cohort.images)  # by now those who came late are known too


def _all_is_here(config: Config, run: Run, facts: dict[str, Any]) -> bool:
    """Whether a run that goes on needs no latents any more."""
    if not config.cache.views or config.cache.refresh or "client_images" not in facts:
        return False
    return (run.latest_step or 0) >= UploadFirst.of(config, np.array(facts["client_images"])).first


def _check_servable(config: Config, settings: ServeSettings, resume: bool) -> None:
    """Raises ``SettingError`` for what cannot be done over the network."""
    check_remote("mocosfl serve", config, resume)
    registry_of(settings)
    if (settings.min_clients or 0) > config.clients.number:
        raise SettingError(
            f"min_clients={settings.min_clients}: there are {config.clients.number} clients (clients.number)"
        )
    check_quorum(config, settings.quorum, settings.min_clients)


def check_quorum(config: Config, quorum: float, min_clients: int | None) -> None:
    """Raises ``SettingError`` where a quorum of the clients may be too few images for a step."""
    batches = config.contrast.objective in COMPARING
    config.check_left(config.needed(quorum, min_clients), f"quorum={quorum:g}", batches)


def check_remote(command: str, config: Config, resume: bool) -> None:
    """Raises ``SettingError`` for what cannot be done with clients elsewhere, whatever way they are reached."""
    check_frozen(config, resume)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise SettingError(f"{command} is for one process; torchrun has started {os.environ['WORLD_SIZE']}")
    if config.clients.holds == "network":
        raise SettingError(
            "clients.holds=network: that is for the baselines, which are only simulated; accepted over the network is "
            "half"
        )
    if config.defence.kind in ("nopeek", "ressfl"):
        raise SettingError(
            f"defence.kind={config.defence.kind}: its loss needs all clients' latents beside their images, and is only "
            "simulated; accepted over the network are none, noise and dropout"
        )
    if config.clients.drop:
        raise SettingError(
            f"clients.drop={config.clients.drop:g}: clients elsewhere drop out by themselves; accepted over the "
            "network is 0"
        )
    if config.sync.own != "none":
        raise SettingError(
            f"sync.own={config.sync.own}: clients elsewhere take the average as it is, and what they keep of their own "
            "is only simulated; accepted over the network is none"
        )


def own_images(config: Config, evaluate_on: str | None, say: Callable[[str], None]) -> Splits:
    """The server's own images; none, but of the right shape, if it has none."""
    if evaluate_on is not None:
        return load(config.data.model_copy(update={"source": evaluate_on}), config.seed, say)
    size, channels = config.data.size, config.data.channels
    if size is None:
        raise SettingError(
            "data.size is not set: the server does not see the clients' images, so it has to be told their height and "
            "width in pixels, or evaluate_on, images of its own"
        )
    return Splits(ImageSet(np.zeros((0, channels, size, size), np.uint8)), None)
