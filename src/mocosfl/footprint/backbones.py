"""What each cut of a backbone leaves on the client: parameters, arithmetic, latents."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from mocosfl.config import BACKBONES, ModelSettings
from mocosfl.errors import SettingError
from mocosfl.footprint.arithmetic import IMAGES, counted, weightless
from mocosfl.models import Bottleneck
from mocosfl.models.foreign import is_foreign
from mocosfl.models.layers import seeded
from mocosfl.models.split import backbone_of

BYTES = 4
"""Of one number of a latent as float32."""


@dataclass(frozen=True)
class Cut:
    """One place where a backbone can be cut.

    Attributes:
        cut: ``model.cut``.
        after: name of the last layer on the client.
        client_parameters, server_parameters: of either half; projection head and running statistics are not counted.
        client_macs, server_macs: multiply-adds of either half's forward pass, for one image.
        latent_shape: of one image's latent.
        numbers: in one.
    """

    cut: int | str
    after: str
    client_parameters: int
    server_parameters: int
    client_macs: int
    server_macs: int
    latent_shape: tuple[int, ...]
    numbers: int


@dataclass(frozen=True)
class Cuts:
    """A backbone, and all its cuts.

    Attributes:
        settings: of the model.
        channels, size: of the images.
        features: width of the features.
        cuts: in order. With a bottleneck those where it fits.
    """

    settings: ModelSettings
    channels: int
    size: int
    features: int
    cuts: list[Cut]

    @property
    def parameters(self) -> int:
        """Of both halves together, at the first cut."""
        return self.cuts[0].client_parameters + self.cuts[0].server_parameters

    @property
    def macs(self) -> int:
        """Multiply-adds of both halves together, at the first cut."""
        return self.cuts[0].client_macs + self.cuts[0].server_macs

    def facts(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        return {
            "backbone": self.settings.backbone,
            "width": self.settings.width,
            "bottleneck": self.settings.bottleneck,
            "channels": self.channels,
            "size": self.size,
            "features": self.features,
            "parameters": self.parameters,
            "macs": self.macs,
            "cuts": [asdict(cut) | {"latent_bytes": BYTES * cut.numbers} for cut in self.cuts],
        }


def cuts_of(settings: ModelSettings, channels: int, size: int) -> Cuts:
    """Count all cuts of a backbone; nothing but those of backbones from elsewhere is computed.

    Args:
        settings: of the model; its cut decides nothing.
        channels: channels of the images.
        size: height and width of the images in pixels.

    Raises:
        SettingError: the backbone cannot be had, does not fit the images, or has no cut that the bottleneck fits.
    """
    bottleneck = Bottleneck.parse(settings.bottleneck)
    with seeded(0), nullcontext() if is_foreign(settings.backbone) else torch.device("meta"):
        # BatchNorm has as many parameters, and is counted in a third of the time
        plain = settings.model_copy(update={"client_norm": "batch", "server_norm": "batch"})
        backbone = backbone_of(plain, channels, size)
    shape: tuple[int, ...] = (channels, size, size)
    sizes: list[tuple[tuple[int, int], tuple[int, ...]]] = []
    for part in (*(piece.module for piece in backbone.pieces), nn.Sequential(*backbone.ending.values())):
        counts, shape = _counts(part, shape)
        sizes.append((counts, shape))
    found: list[Cut] = []
    misfit: SettingError | None = None
    for number, piece in enumerate(backbone.pieces, 1):
        latent = sizes[number - 1][1]
        client, server = ([counts for counts, _ in half] for half in (sizes[:number], sizes[number:]))
        if bottleneck is not None:
            try:
                bottleneck.check(latent)
            except SettingError as error:
                misfit = error
                continue
            narrow, widen = bottleneck.pair(piece.channels)
            counts, latent = _counts(narrow, latent)
            client.append(counts)
            server.append(_counts(widen, latent)[0])
        ours, theirs = ([sum(column) for column in zip(*half, strict=True)] for half in (client, server))
        cut = piece.name if backbone.unit is None else sum(p.convolutions for p in backbone.pieces[:number])
        found.append(Cut(cut, piece.name, ours[0], theirs[0], ours[1], theirs[1], latent, math.prod(latent)))
    if not found:
        assert misfit is not None
        raise misfit
    return Cuts(settings, channels, size, backbone.features, found)


def all_cuts(settings: ModelSettings, channels: int, size: int) -> list[Cuts]:
    """The cuts of every backbone that has a name.

    Args:
        settings: of the model; its backbone and cut decide nothing.
        channels, size: of the images. Backbones that do not take such images, or settings, are left out.
    """
    found = []
    for name in BACKBONES:
        try:
            one = ModelSettings(**settings.model_dump() | {"backbone": name})
            found.append(cuts_of(one, channels, size))
        except SettingError:
            continue
    return found


@torch.no_grad()
def _counts(part: nn.Module, shape: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Parameters, multiply-adds of an image, and the shape of the output."""
    network, images, made = weightless(part), torch.empty(IMAGES, *shape, device="meta"), []
    macs = counted(lambda: made.append(network(images))) // IMAGES
    return (sum(p.numel() for p in part.parameters()), macs), tuple(made[0].shape[1:])
