"""Runs that have ended, without having been trained."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mocosfl.config import Config
from mocosfl.encoder import Encoder
from mocosfl.run import Run

Finished = Callable[..., Run]


def shaken(encoder: Encoder) -> Encoder:
    """Norms that do nothing, and a normalisation that does nothing, would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in encoder.state_dict().items():
            if tensor.ndim == 1 and tensor.is_floating_point():
                tensor.add_(0.2 * torch.rand(tensor.shape, generator=generator) + ("std" in name) * -0.7)
    return encoder.eval()


@pytest.fixture
def finished(tmp_path: Path) -> Finished:
    """``finished(channels, size, **settings)`` makes a run folder with an encoder."""

    def make(channels: int = 1, size: int = 8, name: str = "run", **settings: object) -> Run:
        config = Config(recipe="trial").updated({"model.width": 4, "data.channels": channels} | settings)
        run = Run.create(tmp_path / name, config)
        shaken(Encoder(config.model, channels, size, seed=3)).save(run.path, {"data": config.data.source})
        run.write_json("data.json", {"images": 1294, "mean": [0.3] * channels, "std": [0.4] * channels})
        figures = {"bank_images": 1438, "test_images": 359, "knn_untrained": 80.5, "knn": 97.25, "linear_probe": 98.0}
        run.write_json("result.json", figures | {"knn_held_out": 97.0, "training_seconds": 90.0})
        return run

    return make
