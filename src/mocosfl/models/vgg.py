"""VGG with norm layers (Simonyan and Zisserman, 2015), as a sequence that can be cut after any convolution."""

from __future__ import annotations

from torch import nn

from mocosfl.errors import SettingError
from mocosfl.models.layers import ConvNorm, Norm
from mocosfl.models.pieces import Piece

CONVOLUTIONS: dict[str, tuple[int, ...]] = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
}
"""Of each stage. A stage ends in a max-pool that halves the pixels."""

PLANES = (1, 2, 4, 8, 8)
"""Channels of the stages, in multiples of the first one's (published: 64)."""


def vgg(name: str, width: int, inputs: int, size: int, cut: int, client_norm: Norm, server_norm: Norm) -> list[Piece]:
    """Build the convolutions of a VGG as a list of pieces; those up to the cut use the client's norm.

    A max-pool belongs to the convolution before it, so that less is sent. Convolutions have a bias, as published.

    Args:
        name: a key of ``CONVOLUTIONS``.
        width: channels of the first stage (published: 64).
        inputs: channels of the images.
        size: of the images in pixels.
        cut: convolutions in the client half.
        client_norm: norm of the pieces before the cut.
        server_norm: norm of the pieces after it.

    Raises:
        SettingError: the images are too small to be halved so often.
    """
    least = 2 ** len(PLANES)
    if size < least:
        raise SettingError(
            f"data.size={size}: {name} halves its images {len(PLANES)} times; it takes at least {least} pixels"
        )
    pieces: list[Piece] = []
    channels = inputs
    for stage, (depth, planes) in enumerate(zip(CONVOLUTIONS[name], PLANES, strict=True)):
        for index in range(depth):
            norm = client_norm if len(pieces) < cut else server_norm
            layers: list[nn.Module] = [ConvNorm(channels, planes * width, 3, 1, norm, bias=True), nn.ReLU(inplace=True)]
            if index == depth - 1:
                layers.append(nn.MaxPool2d(2))
            channels = planes * width
            pieces.append(Piece(f"stage{stage + 1}.{index}", nn.Sequential(*layers), 1, channels))
    return pieces
