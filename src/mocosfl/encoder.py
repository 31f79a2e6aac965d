"""The trained encoder: images to features, with its normalisation inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from mocosfl.config import ModelSettings
from mocosfl.data.augment import normalise
from mocosfl.errors import RunError
from mocosfl.files import write_atomically
from mocosfl.models import build

FORMAT = 1


class Encoder(nn.Module):
    """Client half and server half in one, without the projection head.

    Args:
        settings: of the model.
        channels: channels of the images.
        size: height and width of the images in pixels.
        seed: of the initial weights.

    Attributes:
        client, server: the halves.
        mean, std: (C,) buffers, of the training images in [0, 1].
        features: width of the features.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, settings: ModelSettings, channels: int, size: int, seed: int = 0) -> None:
        super().__init__()
        model = build(settings, channels, size, seed)
        self.settings, self.channels, self.size = settings, channels, size
        self.client, self.server = model.client, model.server
        self.latent_shape, self.features = model.latent_shape, model.features
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def forward(self, images: Tensor) -> Tensor:
        """Compute features.

        Args:
            images: (n, C, S, S) float in [0, 1], in the size and channels that the encoder was trained on.

        Returns:
            (n, ``features``) float32.

        Raises:
            ValueError: another shape or dtype.
        """
        expected = (self.channels, self.size, self.size)
        if images.ndim != 4 or images.shape[1:] != expected or not images.is_floating_point():
            raise ValueError(
                f"images: expected float in [0, 1] of shape (n, {', '.join(map(str, expected))}), "
                f"not {images.dtype} of shape {tuple(images.shape)}"
            )
        return self.server(self.client(normalise(images, self.mean, self.std)))

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        """Write encoder.safetensors and encoder.json.

        Args:
            folder: the run.
            facts: written to the JSON beside what rebuilding needs.
        """
        save_weights(self, folder / "encoder.safetensors")
        text = json.dumps(
            {
                "format": FORMAT,
                "model": self.settings.model_dump(mode="json"),
                "channels": self.channels,
                "size": self.size,
                "features": self.features,
                "input": "float32 images in [0, 1], (n, channels, size, size); normalisation is inside",
                **facts,
            },
            indent=2,
        )
        write_atomically(folder / "encoder.json", lambda file: file.write(text.encode() + b"\n"))


def save_weights(module: nn.Module, path: Path) -> None:
    """Write a module's weights as safetensors."""
    weights = {name: tensor.cpu().contiguous() for name, tensor in module.state_dict().items()}
    write_atomically(path, lambda file: file.write(save(weights)))


def load_head(run: str | Path) -> dict[str, Tensor]:
    """The weights of a run's projection head.

    Raises:
        RunError: it has none, or they cannot be read.
    """
    path = Path(run) / "head.safetensors"
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise RunError(f"{run} holds no {path.name}; train with train.init_server=False") from error
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def load_encoder(run: str | Path, device: str | torch.device = "cpu") -> Encoder:
    """Load the encoder of a run, ready for use.

    Args:
        run: folder with encoder.safetensors and encoder.json.
        device: where to put it.

    Returns:
        A module in eval mode: (n, C, S, S) float images in [0, 1] to (n, D) float32 features.

    Raises:
        RunError: there is no encoder, or it cannot be read.
    """
    run = Path(run)
    try:
        facts = json.loads((run / "encoder.json").read_text())
        if facts["format"] != FORMAT:
            raise RunError(f"{run}/encoder.json has format {facts['format']}; this version reads {FORMAT}")
        encoder = Encoder(ModelSettings.model_validate(facts["model"]), facts["channels"], facts["size"])
        encoder.load_state_dict(load_file(run / "encoder.safetensors"))
    except FileNotFoundError as error:
        raise RunError(
            f"{run} holds no encoder: {Path(error.filename or 'encoder.safetensors').name} is missing "
            "(it is written when training ends)"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise RunError(f"the encoder in {run} cannot be read: {error}") from error
    return encoder.to(device).eval()
