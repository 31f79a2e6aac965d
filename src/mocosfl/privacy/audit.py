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
from mocosfl.data.augment import Policy
from mocosfl.data.federation import Federation, federate
from mocosfl.data.images import ImageSet
from mocosfl.data.sources import load
from mocosfl.encoder import load_encoder
from mocosfl.errors import RunError, SettingError
from mocosfl.privacy.attacks import Training, Victim, decode, fuse_views, optimise, train_decoder, tuned_smoothness
from mocosfl.privacy.decoder import Decoder
from mocosfl.privacy.defences import defence_of
from mocosfl.privacy.mixture import fingerprints
from mocosfl.privacy.scores import identified, lpips, mse, psnr, ssim
from mocosfl.randomness import stream
from mocosfl.run import Run

WORST: dict[str, Callable[..., float]] = {"mse": min, "psnr": max, "ssim": max, "identified": max, "lpips": min}
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
    """Rows of the clients' training split, no image in two of them; and the auxiliary set."""

    attacked: NDArray[np.int64]
    small: NDArray[np.int64]
    large: NDArray[np.int64]
    distractors: NDArray[np.int64]
    train: ImageSet
    auxiliary: ImageSet
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
    client = config.pretrain.spare_client if settings.client is None else settings.client
    sets = _images(config, settings, client, run.fingerprints(), say)
    defence = defence_of(config, encoder.latent_shape, sets.train.shape, device)
    bf16 = config.train.precision == "bf16"
    victim = Victim(
        encoder.client, encoder.mean, encoder.std, Policy.of(config.augment), defence, config.seed, bf16=bf16
    )
    originals, small, large = (_floats(sets.train, rows, device) for rows in (sets.attacked, sets.small, sets.large))
    auxiliary = _floats(sets.auxiliary, np.arange(len(sets.auxiliary)), device)
    paper = Training(steps=settings.epochs * max(1, len(small) // Training.batch))
    strong = Training(
        settings.strong_blocks, settings.strong_channels, settings.strong_steps, 64, 2e-3, "both", views=True
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
        "auxiliary": (f"the same, {len(auxiliary)} images of {sets.source}", by_decoder("blind", auxiliary, strong)),
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
    say(f"attacking {len(originals)} images of client {client} of {path}")
    gallery = torch.cat([originals, _floats(sets.train, sets.distractors, device)])
    reconstructions: dict[str, Tensor] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, (what, attack) in attacks.items():
        began = time.monotonic()
        reconstructions[name] = attack()
        scores = _scores(originals, reconstructions[name], gallery)
        found[name] = {"what": what, **scores, "seconds": round(time.monotonic() - began, 1)}
        say(f"  {name}: MSE {scores['mse']:.4f}, SSIM {scores['ssim']:.3f} ({found[name]['seconds']:.0f} s)")
    report: dict[str, Any] = {
        "run": str(path),
        "client": client,
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
        ``ssim`` and ``identified`` with the attacks that reached them, and ``up`` and ``down``: bytes that a client
        sends and receives for an image and epoch, in fp32, without the average of the halves.

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
        row["down"] = 0 if run.config.clients.frozen or run.pretraining else views * latent
        row |= {name: result.get(name) for name in ("knn", "linear_probe")}
        for score in ("mse", "ssim", "identified"):
            row |= {score: report["worst"][score]["value"], f"{score}_attack": report["worst"][score]["attack"]}
        rows.append(row)
    return rows


def _images(
    config: Config, settings: AttackSettings, client: int, seen: NDArray[np.uint64], say: Callable[[str], None]
) -> _Images:
    """Who has which images. Equal pixels count as the same image."""
    if client >= config.clients.number:
        raise SettingError(f"attack.client={client}: the clients are 0 to {config.clients.number - 1}")
    federation: Federation = federate(config, say)
    train = federation.splits.train
    attacked = federation.partition.client(client)[: settings.images]
    marks = fingerprints(train.gather(attacked))
    if count := int(np.isin(marks, seen).sum()):
        raise SettingError(
            f"attack.client={client}: the server has seen {count} of these {len(attacked)} images in pre-training "
            f"(pretrain.target_share); attack client {config.pretrain.spare_client}, which it spared"
        )
    others = np.setdiff1d(federation.train_rows, federation.partition.client(client))
    others = others[~np.isin(fingerprints(train.gather(others)), marks)]
    order = np.random.default_rng(stream(settings.seed, "attackers")).permutation(others)
    counts = []
    for name in ("share", "strong_share"):
        counts.append(round(getattr(settings, name) * len(federation.train_rows)))
        if not 2 <= counts[-1] <= len(others):
            raise SettingError(
                f"attack.{name}={getattr(settings, name)}: that is {counts[-1]} of the clients' "
                f"{len(federation.train_rows)} images; an attacker needs 2 or more, and there are {len(others)} others"
            )
    small, large, rest = order[: counts[0]], order[: counts[1]], order[max(counts) :]
    distractors = rest[: max(0, settings.gallery - len(attacked))]

    source = settings.auxiliary or config.pretrain.source or ("cifar10" if "100" in config.data.source else "cifar100")
    channels, size, _ = train.shape
    own = DataSettings(source=source, size=size, channels=1 if channels == 1 else 3, memory=config.data.memory)
    auxiliary = load(own, config.seed, say).train
    if count := int(np.isin(fingerprints(auxiliary.gather(np.arange(len(auxiliary)))), marks).sum()):
        raise SettingError(
            f"attack.auxiliary={source}: {count} of the attacked images are in it; name a set that has none of them"
        )
    return _Images(attacked, small, large, distractors, train, auxiliary, source)


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
    value = WORST[score](attack[score] for attack in found.values())
    return {"value": value, "attack": next(name for name, attack in found.items() if attack[score] == value)}
