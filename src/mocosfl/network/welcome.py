"""What a client is told of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mocosfl.config import Config
from mocosfl.models.description import Description


def client_settings(
    config: Config, layers: Description, half: Mapping[str, Tensor], channels: int, size: int, batch: int
) -> dict[str, Any]:
    """What a client is told of a run when it is let in, ready for JSON.

    Args:
        config: the whole configuration.
        layers: of the client half.
        half: its weights by name; their shapes are told.
        channels, size: of the images.
        batch: of this client.

    Returns:
        Groups of settings, those of ``Config`` by their names. Beside them ``half``: layers and shapes; ``recalls``:
        whether the server keeps latents of each image; and ``images``: how many this client had then, or 0.
    """
    contrast = config.contrast.model_dump(mode="json", include={"momentum", "symmetric", "both_views"})
    return {
        "seed": config.seed,
        "data": {"size": size, "channels": channels},
        "augment": config.augment.model_dump(mode="json"),
        "model": config.model.model_dump(mode="json"),
        "contrast": contrast,
        "clients": {"batch": batch, "frozen": config.clients.frozen},
        "sync": {"momentum": config.sync.momentum},
        "traffic": config.traffic.model_dump(mode="json"),
        "defence": config.defence.model_dump(mode="json"),
        "train": config.train.model_dump(mode="json", include={"momentum", "weight_decay", "precision"}),
        "half": {"layers": layers, "shapes": {name: list(tensor.shape) for name, tensor in half.items()}},
        "recalls": config.recalls,
        "images": 0,
    }
