"""Runs that have ended, without having been trained."""

import sys
from pathlib import Path

import pytest

from mocosfl.config import Config
from mocosfl.encoder import Encoder
from mocosfl.run import Run

sys.path.insert(0, str(Path(__file__).parent))

from shaken import Finished, shaken


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
