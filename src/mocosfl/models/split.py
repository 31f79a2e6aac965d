"""The cut: one backbone as a client half and a server half, with an optional bottleneck pair between them."""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mocosfl.config import ModelSettings
from mocosfl.errors import SettingError
from mocosfl.models.layers import seeded
from mocosfl.models.resnet import Piece, resnet, stem_for
from mocosfl_device.randomness import stream


@dataclass(frozen=True)
class Bottleneck:
    """CxSy: the client ends in a convolution to ``channels`` at ``stride``, the server starts by undoing it."""

    channels: int
    stride: int

    @classmethod
    def parse(cls, text: str) -> Bottleneck | None:
        """Read ``none`` or ``CxSy``.

        Raises:
            SettingError: the text is neither.
        """
        if text.lower() == "none":
            return None
        match = re.fullmatch(r"[Cc](\d+)[Ss](\d+)", text)
        if not match or not (int(match[1]) >= 1 and int(match[2]) in (1, 2, 4)):
            raise SettingError(
                f"model.bottleneck={text}: expected none, or CxSy with x channels at stride y = 1, 2 or 4, such as C4S2"
            )
        return cls(int(match[1]), int(match[2]))

    def pair(self, channels: int) -> tuple[nn.Sequential, nn.Sequential]:
        """The client's and the server's layer, for latents of this many channels at the cut."""
        narrow = nn.Conv2d(channels, self.channels, 3, stride=self.stride, padding=1)
        widen = nn.ConvTranspose2d(
            self.channels, channels, 3, stride=self.stride, padding=1, output_padding=self.stride - 1
        )
        for conv in (narrow, widen):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        return nn.Sequential(narrow, nn.ReLU(inplace=True)), nn.Sequential(widen, nn.ReLU(inplace=True))


@dataclass(frozen=True)
class SplitModel:
    """A backbone in two halves.

    Attributes:
        client: maps images (n, C, S, S) to latents (n, *``latent_shape``).
        server: maps latents to features (n, ``features``).
        latent_shape: shape of one image's latent.
        features: width of the features.
    """

    client: nn.Sequential
    server: nn.Sequential
    latent_shape: tuple[int, ...]
    features: int


def split(pieces: list[Piece], cut: int) -> tuple[list[Piece], list[Piece]]:
    """Cut a sequence of pieces after ``cut`` convolutions.

    Raises:
        SettingError: no piece ends there; names the cuts that exist.
    """
    ends = list(accumulate(piece.convolutions for piece in pieces))
    if cut not in ends:
        raise SettingError(f"model.cut={cut}: this backbone can be cut after {', '.join(map(str, ends))} convolutions")
    at = ends.index(cut) + 1
    return pieces[:at], pieces[at:]


def build(settings: ModelSettings, channels: int, size: int, seed: int) -> SplitModel:
    """Build and initialise both halves.

    Args:
        settings: backbone, width, cut, norms and bottleneck.
        channels: channels of the images.
        size: height and width of the images in pixels.
        seed: of the initial weights; the global generator is left as it was.

    Raises:
        SettingError: the cut or the bottleneck does not fit.
    """
    bottleneck = Bottleneck.parse(settings.bottleneck)
    with seeded(stream(seed, "backbone")):
        pieces = resnet(
            settings.backbone,
            settings.width,
            channels,
            settings.stem or stem_for(size),
            settings.cut,
            settings.client_norm,
            settings.server_norm,
        )
        ours, theirs = split(pieces, settings.cut)
        client = {piece.name.replace(".", "_"): piece.module for piece in ours}
        server = {piece.name.replace(".", "_"): piece.module for piece in theirs}
        latent_shape = _shape_after(_sequence(client), (channels, size, size))
        if bottleneck is not None:
            if latent_shape[1] % bottleneck.stride:
                raise SettingError(
                    f"model.bottleneck={settings.bottleneck}: stride {bottleneck.stride} does not divide the "
                    f"{latent_shape[1]}x{latent_shape[2]} pixels at the cut"
                )
            client["bottleneck"], widen = bottleneck.pair(ours[-1].channels)
            server = {"bottleneck": widen, **server}
            latent_shape = _shape_after(client["bottleneck"], latent_shape)
        server |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    return SplitModel(_sequence(client), _sequence(server), latent_shape, pieces[-1].channels)


def _sequence(modules: dict[str, nn.Module]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


@torch.no_grad()
def _shape_after(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one output, found on meta tensors: nothing is computed, no running statistic moves."""
    state = {name: value.to("meta") for name, value in module.state_dict(keep_vars=True).items()}
    output: Tensor = functional_call(module, state, (torch.empty(2, *shape, device="meta"),))
    return tuple(output.shape[1:])
