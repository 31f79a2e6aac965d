"""An encoder's weights under the names that the ResNets of torchvision and timm have for them."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from mocosfl.encoder import Encoder
from mocosfl.errors import SettingError
from mocosfl.models.layers import ResidualBlock, with_plain_filters
from mocosfl.models.resnet import BLOCKS

WIDTH = 64
"""Channels of the stem of every ResNet there."""


def torchvision_weights(encoder: Encoder) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The backbone as a state dict for ``resnet18`` and so on, without ``fc``.

    Standardised filters are written as they are used. The normalisation of the images is not among the weights.

    Returns:
        Weights and running statistics by name; and what a model has to be like to hold them, ready for JSON.

    Raises:
        SettingError: it is no ResNet, or no such ResNet computes what this encoder does.
    """
    settings, reasons = encoder.settings, []
    if settings.backbone not in BLOCKS:
        raise SettingError(f"model.backbone={settings.backbone}: only ResNets are written under their names")
    if settings.width != WIDTH:
        reasons.append(f"model.width={settings.width}: theirs have {WIDTH}")
    if settings.bottleneck.lower() != "none":
        reasons.append(f"model.bottleneck={settings.bottleneck}: theirs have no such pair of convolutions")
    if reasons:
        raise SettingError(f"a ResNet of torchvision or timm cannot be like this one: {'; '.join(reasons)}")
    modules = by_their_names(with_plain_filters(encoder))
    weights = {f"{name}.{part}": t for name, module in modules.items() for part, t in module.state_dict().items()}
    conv1 = modules["conv1"]
    assert isinstance(conv1, nn.Conv2d)
    facts = {
        "format": 1,
        "model": settings.backbone,
        "conv1": {
            "in_channels": conv1.in_channels,
            "out_channels": conv1.out_channels,
            "kernel_size": conv1.kernel_size[0],
            "stride": conv1.stride[0],
            "padding": conv1.padding[0],
            "bias": False,
        },
        "maxpool": any(isinstance(module, nn.MaxPool2d) for module in encoder.client.modules()),
        "group_norm": {
            name: [norm.num_groups, norm.num_channels]
            for name, norm in modules.items()
            if isinstance(norm, nn.GroupNorm)
        },
        "size": encoder.size,
        "features": encoder.features,
        "input": "float32 images in [0, 1], less mean, divided by std",
        "mean": encoder.mean.tolist(),
        "std": encoder.std.tolist(),
    }
    return weights, facts


def by_their_names(encoder: nn.Module) -> dict[str, nn.Module]:
    """Convolutions and norms of an encoder without a bottleneck pair, in the order of the network."""
    found: dict[str, nn.Module] = {}
    for half in ("client", "server"):
        for name, piece in encoder.get_submodule(half).named_children():
            if name == "stem":
                found |= {"conv1": piece.get_submodule("0.0"), "bn1": piece.get_submodule("0.1")}
            elif match := re.fullmatch(r"stage(\d)_(\d+)", name):
                assert isinstance(piece, ResidualBlock)
                found |= {f"layer{match[1]}.{match[2]}.{part}": module for part, module in _of_block(piece).items()}
    return found


def _of_block(block: ResidualBlock) -> dict[str, nn.Module]:
    pairs = [piece for piece in block.body if isinstance(piece, nn.Sequential)]
    named: dict[str, nn.Module] = {}
    for number, (conv, norm) in enumerate(pairs, start=1):
        named |= {f"conv{number}": conv, f"bn{number}": norm}
    if isinstance(block.shortcut, nn.Sequential):
        named |= {f"downsample.{part}": module for part, module in block.shortcut.named_children()}
    return named
