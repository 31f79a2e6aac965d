"""The cut: one backbone as a client half and a server half, with an optional bottleneck pair between them."""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from mocosfl.config import ModelSettings
from mocosfl.errors import SettingError
from mocosfl.models.foreign import foreign, is_foreign
from mocosfl.models.layers import seeded
from mocosfl.models.mobilenet import mobilenetv2
from mocosfl.models.pieces import Backbone, Piece, stem_for
from mocosfl.models.resnet import BLOCKS, resnet
from mocosfl.models.vgg import CONVOLUTIONS, vgg
from mocosfl.models.vit import HEADS, vit
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

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ``SettingError`` where latents of this shape cannot be narrowed so."""
        named = f"model.bottleneck=C{self.channels}S{self.stride}"
        if len(shape) != 3:
            tokens = f"{shape[0]} tokens of {shape[1]}" if len(shape) == 2 else f"{shape[0]}"
            raise SettingError(
                f"{named}: a convolution needs pixels, and the latents at this cut are {tokens} numbers; use none"
            )
        if shape[1] % self.stride or shape[2] % self.stride:
            raise SettingError(
                f"{named}: stride {self.stride} does not divide the {shape[1]}x{shape[2]} pixels at the cut"
            )

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


def split(pieces: list[Piece], cut: int | str, unit: str | None = "convolutions") -> tuple[list[Piece], list[Piece]]:
    """Cut a sequence of pieces.

    Args:
        pieces: the sequence.
        cut: convolutions before the cut, or the name of the layer before it.
        unit: what a number counts; None where pieces go by their names.

    Raises:
        SettingError: no piece ends there; names the cuts that exist.
    """
    if unit is None:
        before = [number for number, piece in enumerate(pieces, 1) if f"{piece.name}.".startswith(f"{cut}.")]
        if not before:
            names = ", ".join(piece.name for piece in pieces)
            raise SettingError(f"model.cut={cut}: this backbone can be cut after one of its layers: {names}")
        return pieces[: before[-1]], pieces[before[-1] :]
    ends = list(accumulate(piece.convolutions for piece in pieces))
    if cut not in ends:
        raise SettingError(f"model.cut={cut}: this backbone can be cut after {', '.join(map(str, ends))} {unit}")
    at = ends.index(int(cut)) + 1
    return pieces[:at], pieces[at:]


def backbone_of(settings: ModelSettings, channels: int, size: int, pretrained: bool = False) -> Backbone:
    """Build a whole backbone; its initial weights are drawn from the global generator.

    Args:
        settings: backbone, width, stem, cut, norms and pooling.
        channels: channels of the images.
        size: height and width of the images in pixels.
        pretrained: of Hugging Face's, with the weights of its source.

    Raises:
        SettingError: it does not fit the images, or cannot be had.
    """
    name, width, stem = settings.backbone, settings.width, settings.stem or stem_for(size)
    if is_foreign(name):
        return foreign(settings, channels, size, pretrained)
    if name in HEADS:
        return vit(name, width, channels, size, stem, settings.pooling or "token")
    cut = settings.cut if isinstance(settings.cut, int) else 0
    norms = settings.client_norm, settings.server_norm
    if name in BLOCKS:
        pieces = resnet(name, width, channels, stem, cut, *norms)
    elif name in CONVOLUTIONS:
        pieces = vgg(name, width, channels, size, cut, *norms)
    else:
        pieces = mobilenetv2(width, channels, stem, cut, *norms)
    return Backbone(pieces, pieces[-1].channels)


def build(settings: ModelSettings, channels: int, size: int, seed: int, pretrained: bool = False) -> SplitModel:
    """Build and initialise both halves.

    Args:
        settings: of the model.
        channels: channels of the images.
        size: height and width of the images in pixels.
        seed: of the initial weights; the global generator is left as it was.
        pretrained: of a Hugging Face backbone, start from the weights of its source.

    Raises:
        SettingError: the backbone cannot be had, or the cut or the bottleneck does not fit.
    """
    bottleneck = Bottleneck.parse(settings.bottleneck)
    with seeded(stream(seed, "backbone")):
        backbone = backbone_of(settings, channels, size, pretrained)
        ours, theirs = split(backbone.pieces, settings.cut, backbone.unit)
        client = {piece.name.replace(".", "_"): piece.module for piece in ours}
        server = {piece.name.replace(".", "_"): piece.module for piece in theirs}
        latent_shape = _shape_after(_sequence(client), (channels, size, size))
        if bottleneck is not None:
            bottleneck.check(latent_shape)
            narrow, widen = bottleneck.pair(ours[-1].channels)
            client[_free("bottleneck", client)] = narrow
            server = {_free("bottleneck", server): widen, **server}
            latent_shape = _shape_after(narrow, latent_shape)
        for name, module in backbone.ending.items():
            server[_free(name, server)] = module
    return SplitModel(_sequence(client), _sequence(server), latent_shape, backbone.features)


def _free(name: str, modules: dict[str, nn.Module]) -> str:
    """The name, or where a layer of the half has it already, as networks of others may, one like it."""
    while name in modules:
        name += "_"
    return name


def _sequence(modules: dict[str, nn.Module]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


@torch.no_grad()
def _shape_after(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one output, found on meta tensors: nothing is computed, no running statistic moves."""
    output: Tensor = copy.deepcopy(module).to("meta")(torch.empty(2, *shape, device="meta"))
    return tuple(output.shape[1:])
