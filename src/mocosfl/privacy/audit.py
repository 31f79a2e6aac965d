"""The audit of a run: every attack on its client half, on images that no attacker has seen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mocosfl.config import AttackSettings, Config, DataSettings
from mocosfl.data.augment import policy_of
from mocosfl.data.federation import Federation, federate
from mocosfl.data.images import ImageSet
from mocosfl.data.sources import load
from mocosfl.encoder import load_encoder
from mocosfl.errors import MocosflError, RunError, SettingError
from mocosfl.privacy.attacks import Training, Victim, decode, fuse_views, optimise, train_decoder, tuned_smoothness
from mocosfl.privacy.decoder import Decoder
from mocosfl.privacy.defences import defence_of
from mocosfl.privacy.mixture import fingerprints
from mocosfl.privacy.scores import identified, lpips, mse, psnr, ssim
from mocosfl.run import Run
from mocosfl_device.randomness import stream

STRONG_BATCH = 64
"""Images of a step of the stronger decoders."""

ORDER = ("decoder", "strong", "auxiliary", "whitebox", "views")
"""The attacks."""

WORST: dict[str, Callable[..., str]] = {"mse": min, "psnr": max, "ssim": max, "identified": max, "lpips": min}
"""The scores, and which of several attacks' is the worst for the client."""


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        report: as in privacy.json.
        originals: (n, C, S, S) float32 in [0, 1].
        reconstructions: of every attack, of the same shape.
    """

    report: dict[str, Any]
    originals: Tensor
    reconstructions: dict[str, Tensor]


@dataclass(frozen=True)
class _Images:
    """Who has which images.

    Attributes:
        client: whose images are attacked.
        attacked, small, large, distractors: rows of ``train``. No image of the first is in the others, by its pixels;
            ``small`` is a part of ``large`` (or the other way round), and they have none of the last.
        train: the clients' training split.
        auxiliary, its_rows, source: another data set, those of its images that may be used, and its name; None where
            it cannot be had.
    """

    client: int
    attacked: NDArray[np.int64]
    small: NDArray[np.int64]
    large: NDArray[np.int64]
    distractors: NDArray[np.int64]
    train: ImageSet
    auxiliary: ImageSet | None
    its_rows: NDArray[np.int64]
    source: str


def audit(path: str | Path, settings: AttackSettings, device: torch.device, say: Callable[[str], None]) -> Audit:
    """Attack the client half of a run, in five ways.

    Args:
        path: the run folder; one of `mocosfl pretrain` will do too.
        settings: the attacks.
        device: where to compute.
        say: told how it goes on.

    Returns:
        Scores and pictures. Nothing is written.

    Raises:
        RunError: there is no trained client half.
        SettingError: an attacker would hold images that are attacked, or none at all.
        DataError: the images cannot be used.
    """
    run = Run.open(path)
    config, encoder = run.config, load_encoder(run.path, device)
    if config.clients.holds == "network":
        raise SettingError(
            f"clients.holds=network: the clients of {path} send no latents that could be attacked; accepted is half"
        )
    sets = _images(config, settings, run.fingerprints(), say)
    defence = defence_of(config, encoder.latent_shape, sets.train.shape, device)
    bf16 = config.train.precision == "bf16"
    victim = Victim(
        encoder.client, encoder.mean, encoder.std, policy_of(config.augment), defence, config.seed, bf16=bf16
    )
    originals, small, large = (_floats(sets.train, rows, device) for rows in (sets.attacked, sets.small, sets.large))
    paper = Training(steps=settings.epochs * max(1, len(small) // Training.batch))
    strong = Training(
        settings.strong_blocks, settings.strong_channels, settings.strong_steps, STRONG_BATCH, 2e-3, "both", views=True
    )
    sent, seed = victim.send(originals), settings.seed
    decoders: dict[str, Decoder] = {}

    def by_decoder(name: str, images: Tensor, training: Training) -> Callable[[], Tensor]:
        def run() -> Tensor:
            decoders[name] = train_decoder(victim, images, training, seed)
            return decode(decoders[name], sent)

        return run

    descent, others = settings.iterations, "images of other clients"
    attacks: dict[str, tuple[str, Callable[[], Tensor]]] = {
        "decoder": (f"the paper's decoder, {len(small)} {others}", by_decoder("decoder", small, paper)),
        "strong": (f"a larger decoder, {len(large)} {others}", by_decoder("strong", large, strong)),
        "whitebox": (
            f"gradient descent on the image, best of {settings.restarts}",
            lambda: optimise(
                victim,
                sent,
                tuple(originals.shape[1:]),
                settings.restarts,
                descent,
                seed,
                tuned_smoothness(victim, large[:16], descent, seed),
            ),
        ),
        "views": (
            f"{settings.views} views of each, decoded and put together",
            lambda: fuse_views(victim, decoders["strong"], originals, settings.views, descent),
        ),
    }
    if sets.auxiliary is not None:
        blind = by_decoder("auxiliary", _floats(sets.auxiliary, sets.its_rows, device), strong)
        attacks["auxiliary"] = (f"the same, {len(sets.its_rows)} images of {sets.source}", blind)
    say(f"attacking {len(originals)} images of client {sets.client} of {path}")
    gallery = torch.cat([originals, _floats(sets.train, sets.distractors, device)])
    reconstructions: dict[str, Tensor] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, (what, attack) in ((name, attacks[name]) for name in ORDER if name in attacks):
        began = time.monotonic()
        reconstructions[name] = attack()
        scores = _scores(originals, reconstructions[name], gallery)
        found[name] = {"what": what, **scores, "seconds": round(time.monotonic() - began, 1)}
        say(f"  {name}: MSE {scores['mse']:.4f}, SSIM {scores['ssim']:.3f} ({found[name]['seconds']:.0f} s)")
    report: dict[str, Any] = {
        "run": str(path),
        "client": sets.client,
        "images": len(originals),
        "gallery": len(gallery),
        "attacks": found,
        "worst": {score: _worst(found, score) for score in WORST if score in found["decoder"]},
        "mean image": _scores(originals, large.mean(dim=0).expand_as(originals), gallery),
        "settings": settings.model_dump(),
    }
    return Audit(report, originals, reconstructions)


def compare(paths: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Accuracy, the worst scores, and the bytes of several runs that have been attacked.

    Args:
        paths: run folders.

    Returns:
        For each run its ``name``, ``knn`` and ``linear_probe`` in percent (None without labels), the worst ``mse``,
        ``ssim`` and ``identified`` with the attacks that reached them, ``up`` and ``down``: bytes that a client sends
        and receives for an image and epoch, in fp32, without the average of the halves, and ``audit``, what was
        attacked and how.

    Raises:
        RunError: a run has not been attacked, or has not finished.
    """
    rows = []
    for path in paths:
        run = Run.open(path)
        report, result = (run.read_json(name) for name in ("privacy.json", "result.json"))
        if report is None:
            raise RunError(f"{path} has not been attacked: run mocosfl attack {path}")
        if result is None:
            raise RunError(f"{path} has no result.json: it has not finished")
        encoder = load_encoder(path)
        latent, contrast = 4 * math.prod(encoder.latent_shape), run.config.contrast
        views = 2 if contrast.both_views else 1
        row: dict[str, Any] = {"name": Path(path).name, "up": 2 * views * latent}
        row["down"] = 0 if run.config.clients.frozen or run.command in ("pretrain", "flower") else views * latent
        row["audit"] = [report["settings"], report["images"], report["gallery"]]
        row |= {name: result.get(name) for name in ("knn", "linear_probe")}
        for score in ("mse", "ssim", "identified"):
            row |= {score: report["worst"][score]["value"], f"{score}_attack": report["worst"][score]["attack"]}
        rows.append(row)
    return rows


def _images(config: Config, settings: AttackSettings, seen: NDArray[np.uint64], say: Callable[[str], None]) -> _Images:
    """Choose whose images are attacked, and what attackers have. Equal pixels count as the same image."""
    federation = federate(config, say)
    train, held = federation.splits.train, federation.partition
    client = _client(settings, config, federation, seen)
    attacked = held.client(client)[: settings.images]
    marks = fingerprints(train, attacked)
    others = np.setdiff1d(federation.train_rows, held.client(client))
    others = others[~np.isin(fingerprints(train, others), marks)]
    order = np.random.default_rng(stream(settings.seed, "attackers")).permutation(others)
    counts = []
    for name in ("share", "strong_share"):
        counts.append(round(getattr(settings, name) * len(federation.train_rows)))
        if not 2 <= counts[-1] <= len(others):
            raise SettingError(
                f"{name}={getattr(settings, name)}: that is {counts[-1]} of the clients' "
                f"{len(federation.train_rows)} images; an attacker needs 2 or more, and there are {len(others)} others"
            )
    small, large, rest = order[: counts[0]], order[: counts[1]], order[max(counts) :]
    distractors = rest[: max(0, settings.gallery - len(attacked))]
    auxiliary, rows, source = _auxiliary(settings, config, train, marks, say)
    return _Images(client, attacked, small, large, distractors, train, auxiliary, rows, source)


def _client(settings: AttackSettings, config: Config, federation: Federation, seen: NDArray[np.uint64]) -> int:
    """The client to attack: none of its images may have been seen in pre-training."""
    held, train = federation.partition, federation.splits.train
    if settings.client is not None and settings.client >= len(held):
        raise SettingError(f"client={settings.client}: the clients are 0 to {len(held) - 1}")

    def known(client: int) -> int:
        return int(np.isin(fingerprints(train, held.client(client)), seen).sum()) if len(seen) else 0

    spared = (c for c in (config.pretrain.spare_client, *range(len(held))) if not known(c))
    if settings.client is None:
        client = next(spared, None)
        if client is None:
            raise SettingError("client: the server has seen images of every client in pre-training")
        return client
    if count := known(settings.client):
        other = next(spared, None)
        hint = "" if other is None else f"; attack client {other}, of which it has seen none"
        raise SettingError(
            f"client={settings.client}: the server has seen {count} of its {held.sizes[settings.client]} images in "
            f"pre-training (pretrain.target_share){hint}"
        )
    return settings.client


def _auxiliary(
    settings: AttackSettings, config: Config, train: ImageSet, marks: NDArray[np.uint64], say: Callable[[str], None]
) -> tuple[ImageSet | None, NDArray[np.int64], str]:
    """Another data set, as many of its images as a decoder will see, and its name."""
    clients = config.data.source.lower()
    other = "cifar10" if clients in ("cifar100", "uoft-cs/cifar100") else "cifar100"
    source = settings.auxiliary or config.pretrain.source or other
    channels, size, _ = train.shape
    own = DataSettings(source=source, size=size, channels=1 if channels == 1 else 3, memory=config.data.memory)
    try:
        images = load(own, config.seed, say).train
    except MocosflError as error:
        if settings.auxiliary is not None:
            raise type(error)(str(error).replace("data.source=", "auxiliary=")) from error
        say(f"the attack with auxiliary images is left out: {source} cannot be had; name other images by --auxiliary")
        return None, np.zeros(0, np.int64), source
    rows = np.random.default_rng(stream(settings.seed, "auxiliary")).permutation(len(images))
    mine = np.isin(fingerprints(images, rows), marks)
    if mine.any() and settings.auxiliary is not None:
        raise SettingError(
            f"auxiliary={source}: {mine.sum()} of the attacked images are in it; name a set that has none of them"
        )
    return images, rows[~mine][: STRONG_BATCH * settings.strong_steps], source


def _floats(images: ImageSet, rows: NDArray[np.int64], device: torch.device) -> Tensor:
    """(k, C, S, S) float32 in [0, 1]."""
    return images.take(rows, device).float() / 255


def _scores(originals: Tensor, made: Tensor, gallery: Tensor) -> dict[str, float]:
    """Means over the images; ``identified`` in percent."""
    truth = torch.arange(len(originals), device=originals.device)
    scores = {
        "mse": mse(originals, made).mean(),
        "psnr": psnr(originals, made).mean(),
        "ssim": ssim(originals, made).mean(),
        "identified": 100 * identified(made, gallery, truth).double().mean(),
    }
    if (distance := lpips(originals, made)) is not None:
        scores["lpips"] = distance.mean()
    return {name: float(score) for name, score in scores.items()}


def _worst(found: dict[str, dict[str, Any]], score: str) -> dict[str, Any]:
    values = {name: attack[score] for name, attack in found.items() if not math.isnan(attack[score])}
    name = WORST[score](values, key=lambda name: values[name])
    return {"value": values[name], "attack": name}
