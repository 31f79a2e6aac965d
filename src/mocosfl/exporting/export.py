"""A run's encoder, written for use elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, get_args

from safetensors.torch import save
from torch import Tensor, nn

from mocosfl.data.augment import normalise
from mocosfl.encoder import CARD, CONFIG, WEIGHTS, Encoder, load_encoder, weights_of
from mocosfl.errors import RunError, SettingError
from mocosfl.exporting.card import model_card
from mocosfl.exporting.to_onnx import to_onnx
from mocosfl.exporting.torchvision import torchvision_weights
from mocosfl.files import remove_unfinished, write_atomically
from mocosfl.models.description import describe
from mocosfl.models.layers import with_plain_filters
from mocosfl.run import Run

Format = Literal["huggingface", "onnx", "client", "torchvision"]
FORMATS: tuple[Format, ...] = get_args(Format)

FILES = (
    *(CARD, CONFIG, WEIGHTS),
    *("encoder.onnx", "client.onnx"),
    *("client.safetensors", "client.json"),
    *("torchvision.safetensors", "torchvision.json"),
)
"""What an export writes."""

Made = dict[str, tuple[bytes, str]]
"""Content of files by name, and what each is, in a few words."""


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        files: each with what it is.
        left_out: formats that this encoder cannot have, or cannot have here, with the reason.
    """

    files: dict[Path, str]
    left_out: dict[Format, str]


def export(
    path: str | Path,
    out: str | Path | None = None,
    formats: Collection[Format] = (),
    license: str | None = None,
    overwrite: bool = False,
) -> Export:
    """Write a run's encoder in formats of others.

    ===========  ============================================================================================
    huggingface  README.md (model card), config.json, model.safetensors: for ``Encoder.from_pretrained``
    onnx         encoder.onnx, client.onnx: float32 images in [0, 1] to features, and to latents
    client       client.safetensors, client.json: the client half alone, for ``mocosfl_device.engine``
    torchvision  torchvision.safetensors, torchvision.json: a state dict for ResNets of torchvision and timm
    ===========  ============================================================================================

    All files are made, and checked, before the first is written.

    Args:
        path: a finished run.
        out: the folder. Unset: ``export`` in the run.
        formats: none means all that can be made.
        license: of the weights, for the model card, the JSON files and the metadata of ONNX files.
        overwrite: replace what an export has written there before, all formats of it.

    Raises:
        RunError: the run has not finished, the folder holds an export or cannot be written, or a file does not compute
            what the encoder does.
        SettingError: a format that was asked for cannot be made, with the reason; or ``license`` is no identifier.
    """
    run = Run.open(path)
    encoder = load_encoder(run.path)
    folder = Path(out) if out is not None else run.path / "export"
    _check_free(folder, overwrite)
    encoder.card = model_card(run, encoder, license)
    makers: dict[Format, Callable[[Encoder], Made]] = {
        "huggingface": _huggingface,
        "onnx": partial(_onnx, license=license),
        "client": partial(_client, license=license),
        "torchvision": partial(_torchvision, license=license),
    }
    made: Made = {}
    left_out: dict[Format, str] = {}
    for kind in formats or FORMATS:
        try:
            made |= makers[kind](encoder)
        except SettingError as error:
            if formats:
                raise SettingError(f"formats={kind}: {error}") from error
            left_out[kind] = str(error)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        for name in set(FILES) - made.keys():
            (folder / name).unlink(missing_ok=True)
        for name, (content, _) in made.items():
            write_atomically(folder / name, partial(_put, content))
    except OSError as error:
        raise RunError(f"cannot write to the folder {folder}: {error.strerror}") from error
    return Export({folder / name: what for name, (_, what) in made.items()}, left_out)


def _put(content: bytes, file: IO[bytes]) -> None:
    file.write(content)


def _check_free(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; choose another folder with --out")
    names = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")} if folder.exists() else set()
    if foreign := sorted(names - set(FILES)):
        raise RunError(
            f"{folder} holds files that are not of an export ({', '.join(foreign[:3])}); "
            "choose another folder with --out"
        )
    if names and not overwrite:
        raise RunError(
            f"{folder} already holds an export; replace it with --overwrite, or choose another folder with --out"
        )


def _huggingface(encoder: Encoder) -> Made:
    what = {
        CARD: "model card",
        CONFIG: "how to rebuild the encoder",
        WEIGHTS: "its weights, for Encoder.from_pretrained",
    }
    return {name: (content, what[name]) for name, content in encoder.pretrained_files().items()}


class ClientHalf(nn.Module):
    """The client half with the normalisation before it. Shape: (n, C, S, S) in [0, 1] to (n, *latent)."""

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.client = encoder.client
        self.register_buffer("mean", encoder.mean)
        self.register_buffer("std", encoder.std)

    def forward(self, images: Tensor) -> Tensor:
        """Compute latents, as they are before a defence or a codec."""
        return self.client(normalise(images, self.mean, self.std))


def _onnx(encoder: Encoder, license: str | None) -> Made:
    shape = (encoder.channels, encoder.size, encoder.size)
    made: Made = {}
    for name, network, output in (
        ("encoder.onnx", encoder, "features"),
        ("client.onnx", ClientHalf(encoder), "latents"),
    ):
        file, difference = to_onnx(with_plain_filters(network), shape, output, license)
        made[name] = (file, f"images to {output}; onnxruntime and PyTorch differ by at most {difference:.1e}")
    return made


def _client(encoder: Encoder, license: str | None) -> Made:
    facts: dict[str, Any] = {
        "format": 1,
        "input": "float32 images in [0, 1], (n, channels, size, size), less mean, divided by std",
        "channels": encoder.channels,
        "size": encoder.size,
        "mean": encoder.mean.tolist(),
        "std": encoder.std.tolist(),
        "latent_shape": list(encoder.latent_shape),
    }
    try:
        facts["layers"] = describe(encoder.client)
        what = "its layers, for mocosfl_device.engine"
    except TypeError as error:
        what = f"its input and output; not its layers ({error})"
    return {
        "client.safetensors": (weights_of(encoder.client), "weights of the client half"),
        "client.json": (_json(facts, license), what),
    }


def _torchvision(encoder: Encoder, license: str | None) -> Made:
    weights, facts = torchvision_weights(encoder)
    return {
        "torchvision.safetensors": (
            save({name: tensor.contiguous() for name, tensor in weights.items()}),
            f"state dict for a {encoder.settings.backbone} of torchvision or timm, without fc",
        ),
        "torchvision.json": (_json(facts, license), "what that ResNet has to be like, and mean and std of its input"),
    }


def _json(values: dict[str, Any], license: str | None) -> bytes:
    if license is not None:
        values = values | {"license": license}
    return json.dumps(values, indent=2).encode() + b"\n"
