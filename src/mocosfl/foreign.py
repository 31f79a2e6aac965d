"""Encoders that others have trained: state dicts of ResNets as torchvision and timm name their weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mocosfl.config import ModelSettings
from mocosfl.encoder import CONFIG, WEIGHTS, Encoder, load_encoder
from mocosfl.errors import RunError, SettingError
from mocosfl.exporting.torchvision import by_their_names
from mocosfl.models.pieces import Stem
from mocosfl.models.resnet import BLOCKS
from mocosfl.run import Run

FIRST, SECOND = "conv1.weight", "layer1.0.conv1.weight"
"""Where both names follow a prefix, there is a ResNet."""

CLASSIFIER = "fc."
"""What follows the features; a projection head has this name in MoCo's checkpoints."""

SHOWN = 5
"""Names in an error message, at most."""


def load_resnet(
    path: str | Path,
    arch: str | None = None,
    size: int | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    stem: Stem | None = None,
    prefix: str | None = None,
    device: str | torch.device = "cpu",
) -> Encoder:
    """Load a ResNet whose weights are named as in torchvision and timm.

    The file is a .safetensors file, or what ``torch.save`` has written (.pt, .pth): a state dict, or a checkpoint that
    holds one among other things. Nothing but tensors and plain Python values is unpickled (``weights_only=True``). Of
    several networks in it ``prefix`` chooses one. The network has BatchNorm, and the width and channels of the first
    convolution in the file. ``torchvision.safetensors`` of `mocosfl export` needs none of the further arguments, and
    may have GroupNorm: what the network is like is in ``torchvision.json`` beside it.

    Args:
        path: the file.
        arch: resnet18, resnet34, resnet50 and so on, as ``model.backbone``.
        size: height and width of the images in pixels.
        mean, std: of each channel, for images in [0, 1], as the network was trained with; none is greater than 1.
        stem: how it begins: 224 with a 7x7 convolution of stride 2 and max-pooling, 32 with a 3x3 convolution of stride
            1, 64 with one of stride 2. Unset: 224 or 32, by the first convolution.
        prefix: of the network's names, such as ``module.encoder_q.``. Unset: found, if there is but one network.
        device: where to put it.

    Returns:
        A module in eval mode, as ``load_encoder``'s. What the file holds besides, such as ``fc``, is not in it.

    Raises:
        RunError: the file cannot be read.
        SettingError: the weights are not those of such a ResNet, with the names that are missing or unexpected; or an
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
        prefix = ""
    else:
        if arch not in BLOCKS:
            raise SettingError(f"arch={arch}: {path} needs one of {', '.join(BLOCKS)}")
        if size is None or size < 4:
            raise SettingError(f"size={size or 'unset'}: {path} does not say how many pixels a side its images have")
        prefix = _prefix(path, weights, prefix)
        first = weights[prefix + FIRST]
        if first.ndim != 4:
            raise SettingError(f"{path}: {prefix}{FIRST} of shape {tuple(first.shape)} is no filter of a convolution")
        stem = stem or ("224" if first.shape[-1] == 7 else "32")
        kind: dict[str, Any] = {"backbone": arch, "width": len(first), "stem": stem}
        settings, channels = ModelSettings(**kind, client_norm="batch", server_norm="batch"), int(first.shape[1])
        if channels not in (1, 3):
            raise SettingError(f"{path}: the network takes images of {channels} channels; accepted are 1 and 3")
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
    _fill(encoder, {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}, path)
    encoder.mean.copy_(torch.tensor(list(mean)))
    encoder.std.copy_(torch.tensor(list(std)))
    return encoder.to(device).eval()


def open_encoder(path: str | Path, **given: Any) -> Encoder:
    """Load an encoder from whatever holds one: a run, a folder that `mocosfl export` has written, or a file of weights.

    Args:
        path: folder or file.
        given: arguments of ``load_resnet``, for a file that says nothing of its network.

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
        return load_resnet(path, **given)
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


def _prefix(path: Path, weights: dict[str, Tensor], wanted: str | None) -> str:
    """What stands before the names of the ResNet; the wanted prefix may leave out what a checkpoint puts before it."""
    ends = [name.removesuffix(SECOND) for name in weights if name.endswith(SECOND)]
    there = [prefix for prefix in ends if prefix + FIRST in weights]
    if not there:
        names = _some(list(weights)) or "no tensor"
        raise SettingError(f"{path} holds no ResNet with weights {FIRST}, {SECOND} and so on; it holds {names}")
    fit = [prefix for prefix in there if wanted is None or f".{prefix}".endswith(f".{wanted}")]
    if wanted in fit:
        return wanted
    if not fit:
        raise SettingError(f"prefix={wanted}: {path} has {', '.join(there)}")
    if len(fit) > 1:
        raise SettingError(f"prefix={wanted or 'unset'}: {path} holds several ResNets; choose one of {', '.join(fit)}")
    return fit[0]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _fill(encoder: Encoder, weights: dict[str, Tensor], path: Path) -> None:
    """Copy weights to where they belong.

    Raises:
        SettingError: some are missing, unexpected or of another shape.
    """
    modules = by_their_names(encoder)
    places = {f"{name}.{part}": to for name, module in modules.items() for part, to in module.state_dict().items()}
    # How many batches a BatchNorm has seen changes nothing, and old files do not have it.
    places = {name: to for name, to in places.items() if not name.endswith("num_batches_tracked")}
    left_out = [name for name in weights if name.endswith("num_batches_tracked") or name.startswith(CLASSIFIER)]
    weights = {name: w for name, w in weights.items() if name not in left_out}
    wrong = []
    if missing := [name for name in places if name not in weights]:
        wrong.append(f"missing are {_some(missing)}")
    if unexpected := [name for name in weights if name not in places]:
        wrong.append(f"unexpected are {_some(unexpected)}")
    both = [(name, tuple(weights[name].shape), tuple(to.shape)) for name, to in places.items() if name in weights]
    if other := [f"{name} has {found}, not {wanted}" for name, found, wanted in both if found != wanted]:
        wrong.append(f"of other shapes are {_some(other)}")
    if wrong:
        stem = encoder.settings.stem
        raise SettingError(f"{path} does not fit {encoder.settings.backbone} with stem {stem}: {'; '.join(wrong)}")
    if bad := [name for name in places if not bool(torch.isfinite(weights[name]).all())]:
        raise RunError(f"{path}: not all numbers are finite in {_some(bad)}")
    with torch.no_grad():
        for name, to in places.items():
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
