"""Backbones from elsewhere, Hugging Face's and the user's own, as sequences that can be cut after a layer by its name.

A network is watched while it computes: which layer was given which tensor, and made which. Where layer after layer
takes what the one before has made, and nothing else, from the images to the output, these layers are the network. The
smallest ones are taken for which that holds: a residual block is one, because its sum is made between layers.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mocosfl.config import ModelSettings
from mocosfl.errors import SettingError
from mocosfl.models.pieces import Backbone, Piece
from mocosfl.models.vit import Pool
from mocosfl.trust import FUNCTION, check_trusted

HUB = "hf:"
"""Beginning of ``model.backbone``, as is ``FUNCTION``."""

LEFT_OUT = re.compile(r"_.*|auto_map|attn_implementation|experts_implementation|dtype|torch_dtype|quantization_config")
"""Of a Hugging Face configuration: what names code or number formats, and has no part in the architecture."""


def is_foreign(backbone: str) -> bool:
    """Whether a backbone comes from elsewhere."""
    return backbone.startswith((HUB, FUNCTION))


def settled(settings: ModelSettings) -> ModelSettings:
    """The same settings with the configuration of a Hugging Face backbone in them, so that its source is not needed.

    Raises:
        SettingError: there is no such configuration.
    """
    if not settings.backbone.startswith(HUB) or settings.architecture is not None:
        return settings
    return settings.model_copy(update={"architecture": json.dumps(_architecture(settings))})


def without_paths(settings: ModelSettings) -> ModelSettings:
    """Settings that others may see: of a folder with a Hugging Face backbone its name alone."""
    source = settings.backbone.removeprefix(HUB)
    if not settings.backbone.startswith(HUB) or not Path(source).is_dir():
        return settings
    return settled(settings).model_copy(update={"backbone": HUB + Path(source).resolve().name})


def foreign(settings: ModelSettings, channels: int, size: int, pretrained: bool) -> Backbone:
    """Build a backbone from elsewhere.

    Args:
        settings: ``backbone`` begins with ``HUB`` or ``FUNCTION``.
        channels: channels of the images.
        size: height and width of the images in pixels.
        pretrained: with the weights of the Hugging Face source, instead of new ones.

    Raises:
        SettingError: it cannot be had, or is no sequence of layers.
    """
    what = f"model.backbone={settings.backbone}"
    missing: set[str] = set()
    if settings.backbone.startswith(HUB):
        network, missing = _of_hub(settings, channels, size, pretrained)
    else:
        network = _of_function(settings.backbone, channels, size)
    pieces, shape = _pieces(network, channels, size, what)
    lacking = sorted(name for name in missing if any(name.startswith(f"{piece.name}.") for piece in pieces))
    if lacking:
        raise SettingError(f"{what}: there are no weights of {', '.join(lacking[:3])} to start from")
    return Backbone(pieces, shape[0] if len(shape) != 2 else shape[1], _ending(settings, network, shape), None)


def _ending(settings: ModelSettings, network: nn.Module, shape: tuple[int, ...]) -> dict[str, nn.Module]:
    """From the output of the last layer to features."""
    if len(shape) == 2:
        names = " ".join(name for name, _ in network.named_parameters())
        has_token = re.search(r"(cls|class)_(token|embedding)", names) is not None
        return {"pool": Pool(settings.pooling or ("token" if has_token else "mean"))}
    if settings.pooling == "token":
        raise SettingError("model.pooling=token: the output of this backbone has no tokens; leave it unset")
    return {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()} if len(shape) == 3 else {}


@contextmanager
def told(what: str, cannot: str) -> Iterator[None]:
    """Make of whatever code from elsewhere raises one error that names the setting.

    Args:
        what: the setting and its value.
        cannot: what cannot be done, such as ``it cannot be built``.

    Raises:
        SettingError: with the type and the text of the error.
    """
    try:
        yield
    except SettingError:
        raise
    except (Exception, SystemExit) as error:  # a module may end as a script does
        raise SettingError(f"{what}: {cannot}: {type(error).__name__}: {error}") from error


# Hugging Face


def _architecture(settings: ModelSettings) -> dict[str, Any]:
    """The configuration that a source holds."""
    source = settings.backbone.removeprefix(HUB)
    what = f"model.backbone={settings.backbone}"
    try:
        if Path(source).is_dir():
            path = Path(source, "config.json")
        elif re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
            from huggingface_hub import hf_hub_download  # takes a while

            path = Path(hf_hub_download(source, "config.json"))
        else:
            raise SettingError(f"{what}: there is no such folder, and it is not owner/name on the Hugging Face hub")
        values = json.loads(path.read_text(encoding="utf-8"))
    except SettingError:
        raise
    except Exception as error:  # huggingface_hub and its transports each have errors of their own
        raise SettingError(f"{what}: its config.json cannot be read: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise SettingError(f"{what}: its config.json is not of a model of transformers: it names no model_type")
    return _cleaned(values)


def _parsed(architecture: str) -> dict[str, Any]:
    """The configuration that ``model.architecture`` holds."""
    try:
        values = json.loads(architecture)
    except ValueError as error:
        raise SettingError(f"model.architecture={architecture[:40]}: is no JSON: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise SettingError(
            f"model.architecture={architecture[:40]}: expected the configuration of a model of transformers as JSON, "
            "with its model_type"
        )
    return _cleaned(values)


def _cleaned(values: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in values.items() if not LEFT_OUT.fullmatch(name)}
    return {name: _cleaned(value) if isinstance(value, dict) else value for name, value in kept.items()}


def _check_contained(values: Any, what: str) -> None:
    """Raises ``SettingError`` where a configuration, or one in it, has a network fetched: by timm, or from the hub."""
    if isinstance(values, list | tuple):
        values = dict(enumerate(values))
    if not isinstance(values, dict):
        return
    for name, value in values.items():
        if (
            (name == "model_type" and isinstance(value, str) and value.startswith("timm"))
            or (name == "use_timm_backbone" and value)
            or (name == "backbone" and isinstance(value, str))
        ):
            raise SettingError(
                f"{what}: its configuration has {name}={value}, for a network that timm or the hub would be asked for; "
                "accepted are models of transformers that are described in full"
            )
        _check_contained(value, what)


def _of_hub(settings: ModelSettings, channels: int, size: int, pretrained: bool) -> tuple[nn.Module, set[str]]:
    """A model of transformers, and the names of the weights that its source lacks.

    Only code of the installed package is run: none that comes with a model, and no pickles.
    """
    what = f"model.backbone={settings.backbone}"
    if importlib.util.find_spec("transformers") is None:
        raise SettingError(f"{what}: not installed: transformers; pip install 'mocosfl[transformers]'")
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = _architecture(settings) if settings.architecture is None else _parsed(settings.architecture)
    _check_contained(values, what)  # before anything is made of it: some classes ask the hub as they are made
    kind = values.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        raise SettingError(
            f"{what}: transformers {transformers.__version__} has no models of type {kind}; code that comes "
            "with a model is not run"
        )
    hint = "; its weights may be for images of another size: set data.size" if pretrained else ""
    with told(what, f"it cannot be built{hint}"):
        config = CONFIG_MAPPING[kind].from_dict(values)
        _check_contained(config.to_dict(), what)  # what is left out may be timm's by default
        for name, value in (("num_channels", channels), ("image_size", size)):
            if hasattr(config, name):
                setattr(config, name, value)
        if not pretrained:
            return transformers.AutoModel.from_config(config, trust_remote_code=False).float(), set()
        source = settings.backbone.removeprefix(HUB)
        network, info = transformers.AutoModel.from_pretrained(
            source, config=config, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    return network.float(), set(info["missing_keys"])


# The user's own


def _of_function(backbone: str, channels: int, size: int) -> nn.Module:
    """What a function of the user makes."""
    what, place = f"model.backbone={backbone}", backbone.removeprefix(FUNCTION)
    check_trusted(what, place)
    module, _, name = place.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # as python -m does
    with told(what, f"{name} of the module {module} cannot be had"):
        function = getattr(importlib.import_module(module), name)
    with told(what, f"{name}({channels}, {size}), called with the channels and the size of the images, has failed"):
        network = function(channels, size)
    if not isinstance(network, nn.Module):
        raise SettingError(f"{what}: the function made no torch.nn.Module but {type(network).__name__}")
    return network


# From a network to a sequence of layers


class Step(nn.Module):
    """A layer, called as its network calls it: with one tensor, and all else as it was.

    Args:
        layer: the layer.
        args, kwargs: what it was called with, ``HERE`` in place of the tensor.

    Shape: whatever the layer takes and makes; of several tensors that it makes the first.
    """

    def __init__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.layer, self.args, self.kwargs = layer, args, kwargs

    def forward(self, x: Tensor) -> Tensor:
        args = [x if arg is HERE else arg for arg in self.args]
        output = _first(self.layer(*args, **{name: x if arg is HERE else arg for name, arg in self.kwargs.items()}))
        assert output is not None
        return output


class _Here:
    """Where the tensor goes. There is one, in copies too."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Here:
        return self


HERE = _Here()

_Key = tuple[int, int]
"""A tensor at a time: which it is, and how often it has been written to."""


@dataclass
class _Call:
    """A layer at work: from when to when, and from which tensor to which."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    start: int
    end: int
    came: _Key
    went: _Key
    shape: tuple[int, ...]


def _key(tensor: Tensor) -> _Key:
    return id(tensor), tensor._version


def _first(output: Any) -> Tensor | None:
    """The tensor that a layer makes, or the first of several."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return _first(output.get("last_hidden_state", next(iter(output.values()), None)))
    return _first(output[0]) if isinstance(output, tuple | list) and output else None


class _Watch:
    """Takes note of every call of a layer that is given one tensor.

    Attributes:
        calls: those that have ended.
    """

    def __init__(self, network: nn.Module) -> None:
        self.calls: list[_Call] = []
        self._clock = 0
        self._open: list[tuple[int, _Key | None]] = []
        self._alive: list[Any] = []  # or another tensor could come to lie where one was
        self._names = {module: name for name, module in network.named_modules() if name}
        self._hooks = [
            hook
            for module in self._names
            for hook in (
                module.register_forward_pre_hook(self._before, with_kwargs=True),
                module.register_forward_hook(self._after, with_kwargs=True),
            )
        ]

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        direct = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
        self._alive += given
        self._open.append((self._tick(), _key(direct[0]) if len(given) == len(direct) == 1 else None))

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        start, came = self._open.pop()
        made = _first(output)
        self._alive.append(made)
        if came is None or made is None:
            return
        around = tuple(HERE if isinstance(arg, Tensor) else arg for arg in args)
        named = {name: HERE if isinstance(arg, Tensor) else arg for name, arg in kwargs.items()}
        shape = tuple(made.shape[1:])
        self.calls.append(
            _Call(self._names[module], module, around, named, start, self._tick(), came, _key(made), shape)
        )

    def stop(self) -> None:
        """Watch no longer."""
        for hook in self._hooks:
            hook.remove()


@torch.no_grad()
def _pieces(network: nn.Module, channels: int, size: int, what: str) -> tuple[list[Piece], tuple[int, ...]]:
    """The layers of a network, and the shape of its output for one image.

    Raises:
        SettingError: it does not take such images, or is no sequence of layers.
    """
    network.eval()
    images = torch.randn(2, channels, size, size)
    watch = _Watch(network)
    try:
        with told(what, f"it cannot be run on images of {channels}x{size}x{size}"):
            output = _first(network(images))
    finally:
        watch.stop()
    start = _key(images)
    chain = None if output is None else _chain(watch.calls, start, _key(output))
    if output is None or chain is None:
        raise SettingError(
            f"{what}: it is no sequence of layers, each of which takes what the one before has made and nothing else; "
            f"it is one {_reached(watch.calls, start)}. What is computed between layers can be made a layer of its own"
        )
    pieces, shape = _named(chain), chain[-1].shape
    if len(shape) not in (1, 2, 3):
        raise SettingError(f"{what}: its output has the shape {shape} for an image, of which features cannot be made")
    _check_unshared(pieces, what)
    again = torch.randn(3, channels, size, size)
    with told(what, f"it cannot be run on another number of images of {channels}x{size}x{size}"):
        expected, found = _first(network(again)), again
        for piece in pieces:
            found = piece.module(found)
        same = expected is not None and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    if not same:
        raise SettingError(f"{what}: its layers one after another compute something else than the network")
    network.train()
    with told(what, "shapes cannot be found: it cannot be run on tensors without numbers (device meta)"):
        nn.Sequential(*(copy.deepcopy(piece.module).to("meta") for piece in pieces))(images.to("meta"))
    return pieces, shape


def _chain(calls: list[_Call], start: _Key, end: _Key) -> list[_Call] | None:
    """Calls that lead from one tensor to another, the smallest ones for which that holds."""
    takers: dict[_Key, list[_Call]] = {}
    for call in sorted(calls, key=lambda call: (call.end - call.start, call.start)):
        takers.setdefault(call.came, []).append(call)
    dead: set[int] = set()

    def onward(key: _Key, clock: int) -> list[_Call] | None:
        for call in takers.get(key, []):
            if call.start > clock and call.start not in dead:
                rest = onward(call.went, call.end)
                if rest is not None:
                    return [call, *rest]
                dead.add(call.start)
        return [] if key == end else None

    return onward(start, 0)


def _reached(calls: list[_Call], start: _Key) -> str:
    """How far calls lead from a tensor, as the outermost layers have it."""
    keys, reached = {start}, []
    for call in sorted(calls, key=lambda call: call.start):
        if call.came in keys:
            keys.add(call.went)
            reached.append(call)
    if not reached:
        return "nowhere"
    outermost = min(call.name.count(".") for call in reached)
    return "up to " + max((call for call in reached if call.name.count(".") == outermost), key=lambda c: c.end).name


def _named(chain: list[_Call]) -> list[Piece]:
    """The calls as pieces, each with a name of its own."""
    pieces: list[Piece] = []
    taken: set[str] = set()
    for call in chain:
        for buffers in call.module.modules():
            buffers._non_persistent_buffers_set.clear()  # weights are handed around by the names in state dicts
        name, number = call.name, 1
        while name.replace(".", "_") in taken:
            number += 1
            name = f"{call.name}_{number}"
        taken.add(name.replace(".", "_"))
        channels = call.shape[1] if len(call.shape) == 2 else call.shape[0]
        pieces.append(Piece(name, Step(call.module, call.args, call.kwargs), 1, channels))
    return pieces


def _check_unshared(pieces: list[Piece], what: str) -> None:
    owners: dict[int, tuple[str, str]] = {}
    for piece in pieces:
        for name, tensor in piece.module.state_dict().items():
            if not isinstance(tensor, Tensor) or tensor.numel() == 0:
                continue
            name = name.removeprefix("layer.")
            other, its = owners.setdefault(tensor.data_ptr(), (piece.name, name))
            if other != piece.name:
                raise SettingError(f"{what}: {other} and {piece.name} share weights, so they cannot be cut apart")
            if its != name:
                raise SettingError(
                    f"{what}: in its layer {piece.name} {its} and {name} are the same weights, which cannot be saved "
                    "or averaged under two names; give them one name"
                )
