"""How the weights of our backbones are named: in torchvision and timm, and in a state dict of our own modules."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass

from torch import Tensor, nn

from mocosfl.encoder import Encoder
from mocosfl.exporting.torchvision import by_their_names
from mocosfl.models.mobilenet import InvertedResidual
from mocosfl.models.resnet import BLOCKS
from mocosfl.models.vgg import CONVOLUTIONS
from mocosfl.models.vit import DEPTH, HEADS


@dataclass(frozen=True)
class Layout:
    """Names of the weights of one kind of backbone.

    Attributes:
        own: whether they are ours.
        first: the first convolution's. Where it and ``second`` follow a prefix, there is such a network.
        second: another one's.
        last: the last convolution's.
        beside: beginnings of names that are left out: of what follows the features, and of facts about images.
        accepted: the networks, in words.
    """

    own: bool
    first: str
    second: str
    last: str
    beside: tuple[str, ...]
    accepted: str


OURS = (
    "state dicts of this package's Encoder, or of its halves one after another, without a bottleneck pair "
    "(Encoder.save(folder, {}) writes beside weights what they do not tell)"
)
AFTER = ("fc.", "head.", "predictor.", "classifier.", "mean", "std")
"""What a network of the user's may have beside our backbone, and what an ``Encoder`` has."""

LAYOUTS: dict[str, tuple[Layout, Layout]] = {
    "resnet": (
        Layout(
            False,
            "conv1.weight",
            "layer1.0.conv1.weight",
            "",
            ("fc.",),
            "ResNets as torchvision and timm name their weights, with BatchNorm",
        ),
        Layout(True, "stem.0.0.weight", "stage1_0.body.0.0.weight", "", AFTER, OURS),
    ),
    "vgg": (
        Layout(
            False,
            "features.0.weight",
            "features.4.weight",
            "",
            ("classifier.", "pre_logits.", "head."),
            "vgg11_bn and vgg13_bn as torchvision names their weights; those without BatchNorm are other networks",
        ),
        Layout(True, "stage1_0.0.0.weight", "stage2_0.0.0.weight", "", AFTER, OURS),
    ),
    "mobilenet": (
        Layout(
            False,
            "features.0.0.weight",
            "features.1.conv.0.0.weight",
            "features.18.0.weight",
            ("classifier.",),
            "mobilenet_v2 as torchvision names its weights; timm's names are others",
        ),
        Layout(True, "stem.0.0.weight", "stage1_0.body.0.0.weight", "last.0.0.weight", AFTER, OURS),
    ),
    "vit": (
        Layout(
            False,
            "patch_embed.proj.weight",
            "blocks.0.attn.qkv.weight",
            "",
            ("head.",),
            "vit_tiny and vit_small as timm names their weights, with the norm before the pooling and not after it "
            "(fc_norm)",
        ),
        Layout(True, "embedding.patches.weight", "block1.qkv.weight", "", AFTER, OURS),
    ),
}
"""Of every kind of backbone the names of others, and ours."""


def kind_of(arch: str) -> str:
    """The key of ``LAYOUTS`` for a backbone."""
    kinds: dict[str, Container[str]] = {"resnet": BLOCKS, "vgg": CONVOLUTIONS, "vit": HEADS}
    return next((kind for kind, names in kinds.items() if arch in names), "mobilenet")


_PIECE = re.compile(r"(^|\.)(?:client|server|[01])\.(?=(?:stem|stage\d_\d+|last|embedding|block\d+|norm|bottleneck)\.)")


def without_halves(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under names of ours without the half: ``client``, ``server``, or 0 and 1 of an ``nn.Sequential`` of both.

    Names that would not differ any more are kept, as of the client halves of several clients in a list. Of a bottleneck
    pair one half is left, enough to know that there is one.
    """
    short = {name: _PIECE.sub(r"\1", name) for name in weights}
    number = Counter(short.values())
    kept = {name for name in short if number[short[name]] > 1 and "bottleneck." not in name}
    return {name if name in kept else short[name]: w for name, w in weights.items()}


def places(encoder: Encoder, layout: Layout) -> dict[str, Tensor]:
    """Where each weight and statistic of an encoder without a bottleneck pair is, by its name in a layout.

    How many batches a BatchNorm has seen is left out: it changes nothing, and old files do not have it.
    """
    if layout.own:
        found = without_halves(encoder.state_dict())
        found = {name: tensor for name, tensor in found.items() if name not in ("mean", "std")}
    else:
        name_all: dict[str, Callable[[Encoder], dict[str, nn.Module]]]
        name_all = {"resnet": by_their_names, "vgg": _of_vgg, "mobilenet": _of_mobilenet, "vit": _of_vit}
        modules = name_all[kind_of(encoder.settings.backbone)](encoder)
        found = {f"{name}.{part}": t for name, module in modules.items() for part, t in module.state_dict().items()}
        if "embedding.places" in found:
            own = {"embedding.places": "pos_embed", "embedding.class_token": "cls_token"}
            own |= {f"embedding.patches.{part}": f"patch_embed.proj.{part}" for part in ("weight", "bias")}
            found = {own.get(name, name): tensor for name, tensor in found.items()}
    return {name: tensor for name, tensor in found.items() if not name.endswith("num_batches_tracked")}


def _pieces(encoder: Encoder) -> list[tuple[str, nn.Module]]:
    return [*encoder.client.named_children(), *encoder.server.named_children()]


def _of_vgg(encoder: Encoder) -> dict[str, nn.Module]:
    """Every layer is counted there: convolution, norm, ReLU, and max-pool where there is one."""
    found: dict[str, nn.Module] = {}
    number = 0
    for name, piece in _pieces(encoder):
        if name.startswith("stage"):
            found |= {f"features.{number + part}": piece.get_submodule(f"0.{part}") for part in (0, 1)}
            number += 1 + len(list(piece.children()))  # convolution and norm are one child here
    return found


def _of_mobilenet(encoder: Encoder) -> dict[str, nn.Module]:
    """Convolutions with ReLU6 are a module of their own there, the last of a block is not."""
    found: dict[str, nn.Module] = {}
    pieces = [piece for name, piece in _pieces(encoder) if name == "stem" or name.startswith(("stage", "last"))]
    for number, piece in enumerate(pieces):
        if not isinstance(piece, InvertedResidual):
            found |= {f"features.{number}.{part}": piece.get_submodule(f"0.{part}") for part in (0, 1)}
            continue
        pairs = [layer for layer in piece.body if isinstance(layer, nn.Sequential)]
        for place, (conv, norm) in enumerate(pairs[:-1]):
            found |= {f"features.{number}.conv.{place}.0": conv, f"features.{number}.conv.{place}.1": norm}
        place = len(pairs) - 1
        conv, norm = pairs[-1]
        found |= {f"features.{number}.conv.{place}": conv, f"features.{number}.conv.{place + 1}": norm}
    return found


def _of_vit(encoder: Encoder) -> dict[str, nn.Module]:
    """All but the embedding, which holds parameters beside modules and keeps its name."""
    pieces = dict(_pieces(encoder))
    found = {"embedding": pieces["embedding"], "norm": pieces["norm"]}
    parts = {"norm1": "norm1", "norm2": "norm2", "attn.qkv": "qkv", "attn.proj": "projection"}
    parts |= {"mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}
    for number in range(DEPTH):
        block = pieces[f"block{number + 1}"]
        found |= {f"blocks.{number}.{theirs}": block.get_submodule(ours) for theirs, ours in parts.items()}
    return found
