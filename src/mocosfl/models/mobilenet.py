"""MobileNetV2 (Sandler et al., 2018), as a sequence that can be cut after the stem or after any block."""

from __future__ import annotations

from torch import Tensor, nn

from mocosfl.models.layers import ConvNorm, Norm
from mocosfl.models.pieces import Piece, Stem

BLOCKS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Of each stage: expansion, channels, blocks, stride of the first one."""

STEM, LAST = 32, 1280
"""Channels of the first and of the last convolution."""

WIDTH = 64
"""``model.width`` of the published network."""


class InvertedResidual(nn.Module):
    """1x1 convolution to more channels, 3x3 on each channel alone, 1x1 to few; summed with the input where that fits.

    Shape: (n, inputs, H, W) to (n, outputs, H / stride, W / stride).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, norm: Norm) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers: list[nn.Module] = []
        if expansion > 1:
            layers += [ConvNorm(inputs, hidden, 1, 1, norm), nn.ReLU6(inplace=True)]
        layers += [ConvNorm(hidden, hidden, 3, stride, norm, groups=hidden), nn.ReLU6(inplace=True)]
        layers += [ConvNorm(hidden, outputs, 1, 1, norm)]
        self.body = nn.Sequential(*layers)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.adds else self.body(x)


def mobilenetv2(width: int, inputs: int, stem: Stem, cut: int, client_norm: Norm, server_norm: Norm) -> list[Piece]:
    """Build a MobileNetV2 as a list of pieces; the pieces up to the cut use the client's norm.

    The published network makes of 224 pixels 7. With the stem for 64 the second stage keeps the resolution, with that
    for 32 the first convolution does so too; either makes of its images 4 pixels.

    Args:
        width: 64 times the paper's width multiplier; channels are rounded to multiples of 8, and the last convolution
            never has fewer than 1,280, as published.
        inputs: channels of the images.
        stem: the images' size class.
        cut: convolutions in the client half.
        client_norm: norm of the pieces before the cut.
        server_norm: norm of the pieces after it.
    """
    channels, done = scaled(STEM, width), 1
    first = nn.Sequential(ConvNorm(inputs, channels, 3, 1 if stem == "32" else 2, client_norm), nn.ReLU6(inplace=True))
    pieces = [Piece("stem", first, 1, channels)]
    for stage, (expansion, planes, depth, stride) in enumerate(BLOCKS):
        for index in range(depth):
            halves = index == 0 and stride == 2 and (stage > 1 or stem == "224")
            outputs = scaled(planes, width)
            norm = client_norm if done < cut else server_norm
            block = InvertedResidual(channels, outputs, 2 if halves else 1, expansion, norm)
            channels, convolutions = outputs, 3 if expansion > 1 else 2
            done += convolutions
            pieces.append(Piece(f"stage{stage + 1}.{index}", block, convolutions, channels))
    last = max(LAST, scaled(LAST, width))
    norm = client_norm if done < cut else server_norm
    end = nn.Sequential(ConvNorm(channels, last, 1, 1, norm), nn.ReLU6(inplace=True))
    return [*pieces, Piece("last", end, 1, last)]


def scaled(channels: int, width: int) -> int:
    """Channels of a narrower or wider network: the nearest multiple of 8 that does not take away more than a tenth."""
    wanted = channels * width / WIDTH
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded
