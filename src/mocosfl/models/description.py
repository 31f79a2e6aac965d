"""A network as a list of layers, for clients that compute without PyTorch (``mocosfl_device.engine``)."""

from __future__ import annotations

from typing import Any

from torch import nn

from mocosfl.config import Config
from mocosfl.models.layers import ResidualBlock, WSConv2d

Description = list[dict[str, Any]]
"""Layers, each with its ``kind`` and what its constructor in ``mocosfl_device.engine`` takes; ready for JSON."""


def describe(network: nn.Module, name: str = "") -> Description:
    """The layers of a network in the order in which they compute.

    Args:
        network: made of convolutions, GroupNorm, ReLU and residual blocks.
        name: of the network within the one whose weights are named.

    Raises:
        TypeError: a layer is of another kind.
    """

    def within(part: str) -> str:
        return f"{name}.{part}" if name else part

    match network:
        case nn.Sequential():
            return [layer for part, child in network.named_children() for layer in describe(child, within(part))]
        case ResidualBlock():
            body, shortcut = (describe(getattr(network, part), within(part)) for part in ("body", "shortcut"))
            block = {"kind": "residual", "body": body, "shortcut": shortcut}
            return [block, {"kind": "relu"}]
        case nn.Conv2d() if _is_square(network):
            return [
                {
                    "kind": "conv",
                    "name": name,
                    "kernel": network.kernel_size[0],
                    "stride": network.stride[0],
                    "padding": network.padding[0],
                    "bias": network.bias is not None,
                    "standardised": isinstance(network, WSConv2d),
                }
            ]
        case nn.GroupNorm():
            channels = network.num_channels // network.num_groups
            return [{"kind": "group_norm", "name": name, "channels": channels, "eps": network.eps}]
        case nn.ReLU():
            return [{"kind": "relu"}]
        case nn.Identity():
            return []
    kind = type(network).__name__ + (" in groups" if isinstance(network, nn.Conv2d) and network.groups > 1 else "")
    raise TypeError(f"{name or 'the network'}: {kind} cannot be computed without PyTorch")


def described(network: nn.Module) -> Description:
    """``describe``'s result, or one layer of a kind that only PyTorch computes."""
    try:
        return describe(network)
    except TypeError:
        return [{"kind": "torch", "network": repr(network)}]


def shown(layers: Description, config: Config, channels: int, size: int) -> dict[str, Any]:
    """All that decides what the server sees of an image, beside the weights (``mocosfl_device.wire.fingerprint``).

    Args:
        layers: of the client half.
        config: the whole configuration.
        channels, size: of the images.
    """
    settings = {name: getattr(config, name).model_dump(mode="json") for name in ("augment", "defence")}
    codec = config.traffic.model_dump(mode="json", include={"latents", "topk"})
    return {"layers": layers, "data": {"size": size, "channels": channels}, "traffic": codec} | settings


def _is_square(conv: nn.Conv2d) -> bool:
    """Whether it is the same in both directions, and plain otherwise."""
    plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    pairs = (conv.kernel_size, conv.stride, conv.padding)
    return plain and all(not isinstance(pair, str) and pair[0] == pair[1] for pair in pairs)
