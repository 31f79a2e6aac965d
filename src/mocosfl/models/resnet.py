"""ResNets with the published stems, as a sequence that can be cut after the stem or after any block."""

from __future__ import annotations

from torch import nn

from mocosfl.models.layers import BasicBlock, BottleneckBlock, ConvNorm, Norm
from mocosfl.models.pieces import Piece, Stem

BLOCKS: dict[str, tuple[type[BasicBlock] | type[BottleneckBlock], tuple[int, ...]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (BottleneckBlock, (3, 4, 6, 3)),
    "resnet101": (BottleneckBlock, (3, 4, 23, 3)),
    "resnet152": (BottleneckBlock, (3, 8, 36, 3)),
}


def _stem(inputs: int, width: int, kind: Stem, norm: Norm) -> nn.Sequential:
    kernel, stride = {"32": (3, 1), "64": (3, 2), "224": (7, 2)}[kind]
    layers: list[nn.Module] = [ConvNorm(inputs, width, kernel, stride, norm), nn.ReLU(inplace=True)]
    if kind == "224":
        layers.append(nn.MaxPool2d(3, stride=2, padding=1))
    return nn.Sequential(*layers)


def resnet(
    name: str, width: int, inputs: int, stem: Stem, cut: int, client_norm: Norm, server_norm: Norm
) -> list[Piece]:
    """Build a ResNet as a list of pieces; the pieces up to the cut use the client's norm.

    Args:
        name: a key of ``BLOCKS``.
        width: channels of the stem (published: 64); stage i has ``width * 2**i`` planes.
        inputs: channels of the images.
        stem: the images' size class.
        cut: convolutions in the client half.
        client_norm: norm of the pieces before the cut.
        server_norm: norm of the pieces after it.
    """
    block, depths = BLOCKS[name]
    pieces = [Piece("stem", _stem(inputs, width, stem, client_norm), 1, width)]
    done, channels = 1, width
    for stage, depth in enumerate(depths):
        planes = width * 2**stage
        for index in range(depth):
            norm = client_norm if done < cut else server_norm
            stride = 2 if index == 0 and stage > 0 else 1
            module = block(channels, planes, stride, norm)
            channels = planes * block.expansion
            done += block.convolutions
            pieces.append(Piece(f"stage{stage + 1}.{index}", module, block.convolutions, channels))
    return pieces
