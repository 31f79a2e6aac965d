"""The trained encoder: images to features, with its normalisation inside."""

from __future__ import annotations

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
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
from mocosfl.models.foreign import settled, without_paths

FORMAT = 1

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
"""Files of an encoder in the layout of the Hugging Face hub."""


class Encoder(nn.Module):
    """Client half and server half in one, without the projection head.

    Args:
        settings: of the model.
        channels: channels of the images.
        size: height and width of the images in pixels.
        seed: of the initial weights.
        pretrained: of a Hugging Face backbone, start from the weights of its source.

    Attributes:
        client, server: the halves.
        mean, std: (C,) buffers, of the training images in [0, 1].
        features: width of the features.
        card: its model card, where it has one.
    """

    mean: Tensor
    std: Tensor
    card: str = ""

    def __init__(
        self, settings: ModelSettings, channels: int, size: int, seed: int = 0, pretrained: bool = False
    ) -> None:
        super().__init__()
        settings = settled(settings)
        model = build(settings, channels, size, seed, pretrained)
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
        text = self._description(self.settings, facts)
        write_atomically(folder / "encoder.json", lambda file: file.write(text))

    def _description(self, settings: ModelSettings, facts: dict[str, Any]) -> bytes:
        values = {
            "format": FORMAT,
            "model": settings.model_dump(mode="json"),
            "channels": self.channels,
            "size": self.size,
            "features": self.features,
            "input": "float32 images in [0, 1], (n, channels, size, size); normalisation is inside",
            **facts,
        }
        return json.dumps(values, indent=2).encode() + b"\n"

    def pretrained_files(self) -> dict[str, bytes]:
        """What ``from_pretrained`` reads, by file name, with the model card if there is one."""
        files = {CONFIG: self._description(without_paths(self.settings), {}), WEIGHTS: weights_of(self)}
        return files | ({CARD: self.card.encode()} if self.card else {})

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        device: str | torch.device = "cpu",
    ) -> Encoder:
        """Load an encoder that `mocosfl export` has written, or that ``push_to_hub`` has uploaded.

        Args:
            source: a folder, or owner/name on the Hugging Face hub.
            revision: branch, tag or commit on the hub. Unset: the latest.
            token: to log in to the hub with. Unset: that of `hf auth login`.
            device: where to put it.

        Returns:
            A module in eval mode, as ``load_encoder``'s, with its model card.

        Raises:
            RunError: there is no encoder, or it cannot be read or downloaded.
        """
        folder = Path(source)
        if not folder.is_dir():
            if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
                raise RunError(f"{source}: there is no such folder, and it is not owner/name on the Hugging Face hub")
            folder = _downloaded(str(source), revision, token)
        if not (folder / CONFIG).exists() and (folder / "encoder.json").exists():
            raise RunError(f"{source} is a run: load it with load_encoder, or what `mocosfl export` makes of it here")
        encoder = _read(folder, CONFIG, WEIGHTS, "mocosfl export RUN --out FOLDER writes such a folder").to(device)
        if (folder / CARD).exists():
            encoder.card = (folder / CARD).read_text(encoding="utf-8")
        return encoder

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload the encoder and its model card to the Hugging Face hub, where ``from_pretrained`` finds them.

        Args:
            repo_id: owner/name; made if it is not there.
            private: whether a new one is private. Unset: as its owner has chosen.
            token: to log in with. Unset: that of `hf auth login`.

        Returns:
            Address of the commit.

        Raises:
            RunError: there is no model card: nobody could know what the encoder is.
        """
        if not self.card:
            raise RunError(
                f"{repo_id}: the encoder has no model card to upload; export the run (mocosfl export RUN), and push "
                "what Encoder.from_pretrained loads from there"
            )
        from huggingface_hub import HfApi  # takes a while, which nothing else need wait for

        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            for name, content in self.pretrained_files().items():
                Path(folder, name).write_bytes(content)
            return api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload an encoder of mocosfl")


def weights_of(module: nn.Module) -> bytes:
    """A module's weights as safetensors."""
    return save({name: tensor.cpu().contiguous() for name, tensor in module.state_dict().items()})


def save_weights(module: nn.Module, path: Path) -> None:
    """Write a module's weights as safetensors."""
    write_atomically(path, lambda file: file.write(weights_of(module)))


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
    return _read(Path(run), "encoder.json", "encoder.safetensors", "it is written when training ends").to(device)


def _downloaded(repo_id: str, revision: str | None, token: str | None) -> Path:
    """The folder that an encoder on the Hugging Face hub was downloaded to."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=[CONFIG, WEIGHTS, CARD]))
    except Exception as error:  # huggingface_hub and its transports each have errors of their own
        raise RunError(f"{repo_id} cannot be loaded from the Hugging Face hub: {error}") from error


def _read(folder: Path, description: str, weights: str, hint: str) -> Encoder:
    """An encoder from its two files, in eval mode; ``hint`` says where they come from."""
    try:
        facts = json.loads((folder / description).read_text())
        if (found := facts.get("format")) != FORMAT:
            what = "is not of an encoder of mocosfl" if found is None else f"has format {found}"
            raise RunError(f"{folder}/{description} {what}; this version reads format {FORMAT}")
        encoder = Encoder(ModelSettings.model_validate(facts["model"]), facts["channels"], facts["size"])
        encoder.load_state_dict(load_file(folder / weights))
    except FileNotFoundError as error:
        missing = Path(error.filename or weights).name
        raise RunError(f"{folder} holds no encoder: {missing} is missing ({hint})") from error
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise RunError(f"the encoder in {folder} cannot be read: {error}") from error
    return encoder.eval()
