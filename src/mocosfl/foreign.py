"""Encoders as weights alone: state dicts of the backbones there are, under the names of torchvision, timm or ours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mocosfl.config import BACKBONES, ModelSettings
from mocosfl.encoder import CONFIG, WEIGHTS, Encoder, load_encoder
from mocosfl.errors import RunError, SettingError
from mocosfl.exporting.torchvision import by_their_names
from mocosfl.layouts import LAYOUTS, Layout, kind_of, places, without_halves
from mocosfl.models.mobilenet import BLOCKS as STAGES
from mocosfl.models.mobilenet import scaled
from mocosfl.models.pieces import Stem, stem_for
from mocosfl.models.split import backbone_of
from mocosfl.models.vit import HEADS, PATCH
from mocosfl.run import Run

HEAD_WIDTH = 64
"""Numbers of an attention head in published vision transformers."""

OTHER_HEADS = ("base_encoder.", "momentum_encoder.")
"""Ends of the prefixes of MoCo v3's checkpoints; its small vision transformer has 12 heads of 32 numbers."""

SAVE = "Encoder.save(folder, {}) writes beside the weights what the network is like"

SHOWN = 5
"""Names in an error message, at most."""


def load_weights(
    path: str | Path,
    arch: str | None = None,
    size: int | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    stem: Stem | None = None,
    prefix: str | None = None,
    device: str | torch.device = "cpu",
) -> Encoder:
    """Load an encoder from weights alone, named as in torchvision and timm, or as in this package.

    The file is a .safetensors file, or what ``torch.save`` has written (.pt, .pth): a state dict, or a checkpoint that
    holds one among other things. Nothing but tensors and plain Python values is unpickled (``weights_only=True``). Of
    several networks in it ``prefix`` chooses one. Width, channels, norms and class token are those of the weights.

    Names of others are those of torchvision's and timm's ResNets with BatchNorm, of torchvision's ``vgg11_bn``,
    ``vgg13_bn`` and ``mobilenet_v2``, and of timm's ``vit_tiny`` and ``vit_small``. Names of ours are those of an
    ``Encoder``, or of its halves, without a bottleneck pair. ``torchvision.safetensors`` of `mocosfl export` needs none
    of the further arguments, and may have GroupNorm: what the network is like is in ``torchvision.json`` beside it.

    Args:
        path: the file.
        arch: resnet18, vgg11, mobilenetv2, vit_tiny and so on, as ``model.backbone``.
        size: height and width of the images in pixels.
        mean, std: of each channel, for images in [0, 1], as the network was trained with; none is greater than 1. Unset
            for a state dict of an ``Encoder``: those in it.
        stem: how it begins, as ``model.stem``; strides cannot be seen in weights. Unset: of a ResNet of others 224 or
            32, by the first convolution; of a MobileNetV2 of others 224; of ours by the size, as in training; of a
            vision transformer by its patches.
        prefix: of the network's names, such as ``module.encoder_q.``. Unset: found, if there is but one network.
        device: where to put it.

    Returns:
        A module in eval mode, as ``load_encoder``'s. Classifiers and projection heads in the file are not in it:
        features of networks of convolutions are the mean over the pixels of the last layer.

    Raises:
        RunError: the file cannot be read.
        SettingError: the weights are not those of such a network, with the names that are missing or unexpected; or an
            argument is missing or does not fit.
    """
    path = Path(path)
    given = {"arch": arch, "size": size, "mean": mean, "std": std, "stem": stem, "prefix": prefix}
    weights = _read(path)
    beside = path.with_suffix(".json")
    if path.name == "torchvision.safetensors" and beside.exists() and not any(given.values()):
        try:
            facts = json.loads(beside.read_text(encoding="utf-8"))
            settings, channels = _settings_of(facts), int(facts["conv1"]["in_channels"])
            size, mean, std = int(facts["size"]), facts["mean"], facts["std"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{beside} cannot be read: {error!r}") from error
        layout = LAYOUTS["resnet"][0]
    else:
        if arch not in BACKBONES:
            raise SettingError(f"arch={arch}: {path} needs one of {', '.join(BACKBONES)}")
        if size is None or size < 4:
            raise SettingError(f"size={size or 'unset'}: {path} does not say how many pixels a side its images have")
        layout, weights = _network(path, arch, weights, prefix)
        settings, channels = _recognised(path, arch, size, stem, layout, weights)
        if layout.own:
            mean, std = (given or _listed(weights, name) for name, given in (("mean", mean), ("std", std)))
    for name, numbers in (("mean", mean), ("std", std)):
        if len(numbers) != channels:
            raise SettingError(
                f"{name}={' '.join(map(str, numbers)) or 'unset'}: the network in {path} takes images of {channels} "
                "channels; expected a number for each, for pixels in [0, 1], as it was trained with"
            )
        if not all(0 <= number <= 1 and (name == "mean" or number > 0) for number in numbers):  # nor is nan
            least = "from 0" if name == "mean" else "greater than 0"
            raise SettingError(
                f"{name}={' '.join(map(str, numbers))}: expected numbers {least} to 1, for pixels in [0, 1]; divide by "
                "255 what is for pixels from 0 to 255"
            )
    encoder = Encoder(settings, channels, size)
    _fill(encoder, layout, weights, path)
    encoder.mean.copy_(torch.tensor(list(mean)))
    encoder.std.copy_(torch.tensor(list(std)))
    return encoder.to(device).eval()


def _listed(weights: dict[str, Tensor], name: str) -> list[float]:
    return weights[name].flatten().tolist() if name in weights else []


def open_encoder(path: str | Path, **given: Any) -> Encoder:
    """Load an encoder from whatever holds one: a run, a folder that `mocosfl export` has written, or a file of weights.

    Args:
        path: folder or file.
        given: arguments of ``load_weights``, for a file that says nothing of its network.

    Raises:
        RunError: there is no encoder, or it cannot be read.
        SettingError: an argument does not fit.
    """
    path = Path(path)
    named = [name for name, value in given.items() if value]
    if named and not path.exists():
        raise RunError(f"{path}: there is no such file or folder")
    foreign = path.is_file() and not (
        (path.name == "encoder.safetensors" and path.with_suffix(".json").exists())
        or (path.name == WEIGHTS and (path.parent / CONFIG).exists() and not given.get("arch"))
    )
    if foreign:
        return load_weights(path, **given)
    if named:
        raise SettingError(f"{named[0]}: is for files of weights of others; {path} says itself what its network is")
    if path.is_file():
        return load_encoder(path.parent) if path.name != WEIGHTS else Encoder.from_pretrained(path.parent)
    if (path / CONFIG).exists():
        return Encoder.from_pretrained(path)
    return load_encoder(Run.open(path).path)


def _read(path: Path) -> dict[str, Tensor]:
    """All tensors of a file by name; names within names are joined by dots."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found: dict[str, Tensor] = {}
        _gather(torch.load(path, map_location="cpu", weights_only=True), "", found)
        return found
    except FileNotFoundError as error:
        raise RunError(f"{path}: there is no such file or folder") from error
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # whatever a file that is no such thing makes the unpickler raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise RunError(
            f"{path} cannot be read: {reason}; expected a .safetensors file, or a state dict that torch.save has "
            "written, with tensors and plain values alone (weights_only=True)"
        ) from error


def _gather(values: Any, name: str, found: dict[str, Tensor]) -> None:
    if isinstance(values, Tensor):
        found[name] = values
    elif isinstance(values, dict):
        for key, value in values.items():
            _gather(value, f"{name}.{key}" if name else str(key), found)


def _network(path: Path, arch: str, weights: dict[str, Tensor], wanted: str | None) -> tuple[Layout, dict[str, Tensor]]:
    """The names and weights of one network of a file, without what stands before them.

    The wanted prefix may leave out what a checkpoint puts before it.
    """
    layouts, there = LAYOUTS[kind_of(arch)], dict[str, tuple[Layout, dict[str, Tensor]]]()
    for layout in layouts:
        named = without_halves(weights) if layout.own else weights
        for end in (name.removesuffix(layout.second) for name in named if name.endswith(layout.second)):
            if end + layout.first in named and end not in there:
                found = {name.removeprefix(end): w for name, w in named.items() if name.startswith(end)}
                there[end] = layout, found
    if not there:
        wanted_names = " or ".join(f"{layout.first}, {layout.second}" for layout in layouts)
        raise SettingError(
            f"{path} holds no {arch} with weights {wanted_names} and so on; it holds "
            f"{_some(list(weights)) or 'no tensor'}; accepted are {_accepted(arch)}"
        )
    fit = [prefix for prefix in there if wanted is None or f".{prefix}".endswith(f".{wanted}")]
    if wanted in fit:
        fit = [wanted]
    if not fit:
        raise SettingError(f"prefix={wanted}: {path} has {', '.join(there)}")
    if len(fit) > 1:
        raise SettingError(f"prefix={wanted or 'unset'}: {path} holds several networks; choose one of {', '.join(fit)}")
    if arch == "vit_small" and fit[0].endswith(OTHER_HEADS):
        raise SettingError(
            f"{path}: the names {fit[0]}... are those of MoCo v3, whose vit_small has 12 attention heads; that of this "
            f"package has {HEADS[arch]}, as timm's, and would compute something else with these weights"
        )
    return there[fit[0]]


def _accepted(arch: str) -> str:
    return "; or ".join(layout.accepted for layout in LAYOUTS[kind_of(arch)])


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _recognised(
    path: Path, arch: str, size: int, stem: Stem | None, layout: Layout, weights: dict[str, Tensor]
) -> tuple[ModelSettings, int]:
    """What a network is like, and the channels of its images, as far as weights tell."""
    first, kind = weights[layout.first], kind_of(arch)
    if first.ndim != 4:
        raise SettingError(f"{path}: {layout.first} of shape {tuple(first.shape)} is no filter of a convolution")
    width, channels = len(first), int(first.shape[1])
    if channels not in (1, 3):
        raise SettingError(f"{path}: the network takes images of {channels} channels; accepted are 1 and 3")
    if kind == "mobilenet":
        last = weights.get(layout.last, first)
        width = _multiplied(path, int(last.shape[1]) if last.ndim == 4 and last is not first else STAGES[-1][1])
    elif kind == "vit":
        if width != HEADS[arch] * HEAD_WIDTH:
            hint = f"; {SAVE}" if layout.own else ""
            raise SettingError(
                f"{path} does not fit {arch}: its tokens have {width} numbers, not {HEADS[arch] * HEAD_WIDTH}, and how "
                f"many attention heads they are divided among cannot be seen in weights{hint}"
            )
        width = HEAD_WIDTH
        patches = {patch: stem for stem, patch in PATCH.items()}
        patch = int(first.shape[-1])
        if patch not in patches:
            raise SettingError(
                f"{path} does not fit {arch}: its patches have {patch} pixels a side; accepted are "
                f"{', '.join(map(str, sorted(patches)))}"
            )
        stem = stem or patches[patch]
    if stem is None and kind in ("resnet", "mobilenet"):
        published: Stem = "224" if kind == "mobilenet" or first.shape[-1] == 7 else "32"
        stem = stem_for(size) if layout.own else published
    values: dict[str, Any] = {"backbone": arch, "width": width, "stem": stem}
    if kind == "vit":
        token = "embedding.class_token" if layout.own else "cls_token"
        return ModelSettings(**values, pooling="token" if token in weights else "mean"), channels
    norms = _norms(ModelSettings(**values), channels, size, weights) if layout.own else {}
    return ModelSettings(**values | {"client_norm": "batch", "server_norm": "batch"} | norms), channels


def _multiplied(path: Path, channels: int) -> int:
    """``model.width`` of a MobileNetV2 by the channels before its last convolution."""
    for width in range(4, channels + 4, 4):
        if scaled(STAGES[-1][1], width) == channels:
            return width
    raise SettingError(
        f"{path} does not fit mobilenetv2: no multiple of 4 as model.width makes {channels} channels before the last "
        "convolution, as this network has"
    )


def _norms(plain: ModelSettings, channels: int, size: int, weights: dict[str, Tensor]) -> dict[str, Any]:
    """The norms of our backbone by its statistics; its cut, where they differ, is where they change."""
    with torch.device("meta"):
        pieces = backbone_of(plain, channels, size).pieces
    means = {name.partition(".")[0] for name in weights if name.endswith(".running_mean")}
    kinds = ["batch" if piece.name.replace(".", "_") in means else "group" for piece in pieces]
    cuts = list(accumulate(piece.convolutions for piece in pieces))
    cut = cuts[kinds.count(kinds[0]) - 1] if kinds[0] != kinds[-1] else 1
    return {"client_norm": kinds[0], "server_norm": kinds[-1], "cut": cut}


def _fill(encoder: Encoder, layout: Layout, weights: dict[str, Tensor], path: Path) -> None:
    """Copy weights to where they belong.

    Raises:
        SettingError: some are missing, unexpected or of another shape.
    """
    to_fill = places(encoder, layout)
    left_out = [name for name in weights if name.endswith("num_batches_tracked") or name.startswith(layout.beside)]
    weights = {name: w for name, w in weights.items() if name not in left_out}
    wrong = []
    if missing := [name for name in to_fill if name not in weights]:
        wrong.append(f"missing are {_some(missing)}")
    if unexpected := [name for name in weights if name not in to_fill]:
        wrong.append(f"unexpected are {_some(unexpected)}")
    both = [(name, tuple(weights[name].shape), tuple(to.shape)) for name, to in to_fill.items() if name in weights]
    if other := [f"{name} has {found}, not {wanted}" for name, found, wanted in both if found != wanted]:
        wrong.append(f"of other shapes are {_some(other)}")
    if wrong:
        settings = encoder.settings
        how = f"{settings.backbone} for {encoder.size} pixels" + (
            f" with stem {settings.stem}" if settings.stem else ""
        )
        raise SettingError(f"{path} does not fit {how}: {'; '.join(wrong)}; accepted are {layout.accepted}")
    if bad := [name for name in to_fill if not bool(torch.isfinite(weights[name]).all())]:
        raise RunError(f"{path}: not all numbers are finite in {_some(bad)}")
    with torch.no_grad():
        for name, to in to_fill.items():
            to.copy_(weights[name])


def _settings_of(facts: dict[str, Any]) -> ModelSettings:
    """The model that torchvision.json describes; its cut, where norms differ, is where they change."""
    conv1, grouped = facts["conv1"], facts["group_norm"]
    stem: Stem = "224" if facts["maxpool"] else "64" if conv1["stride"] == 2 else "32"
    plain = ModelSettings(
        backbone=facts["model"],
        width=conv1["out_channels"],
        stem=stem,
        client_norm="batch",
        server_norm="batch",
    )
    names = by_their_names(Encoder(plain, conv1["in_channels"], facts["size"]))
    kinds = ["group" if name in grouped else "batch" for name in names if name.rpartition(".")[2].startswith("bn")]
    cut = kinds.count(kinds[0]) if kinds[0] != kinds[-1] else 1
    return plain.model_copy(update={"client_norm": kinds[0], "server_norm": kinds[-1], "cut": cut})
