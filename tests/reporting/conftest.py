"""A real run, small and finished, with everything in its folder that a run may have; and a browser."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import mocosfl
from mocosfl.data.federation import federate
from mocosfl.reporting.examples import Examples, examples
from mocosfl.reporting.privacy import draw_reconstructions
from mocosfl.run import Run

TINY = {
    "model.width": 4,
    "model.head": "v1",
    "contrast.queue": 64,
    "clients.number": 20,
    "clients.batch": 4,
    "sync.every": 5,
    "train.epochs": 2,
    "train.warmup": 0,
    "train.log_every": 1,
    "evaluation.k": 10,
    "evaluation.every": 0.5,
    "evaluation.probe_epochs": 2,
}
"""32 steps on digits."""

SCORES = {"mse": 0.05, "psnr": 13.0, "ssim": 0.4, "identified": 80.0}


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has finished, with the files that later parts of a run write. Only to be read."""
    folder = tmp_path_factory.mktemp("finished") / "mine"
    torch.manual_seed(0)
    config = mocosfl.recipe("digits").updated(TINY)
    mocosfl.train(config, folder)
    run = Run.open(folder)
    federation = federate(config, lambda text: None)
    train = federation.splits.train
    np.savez(
        folder / "partition.npz",
        images=federation.partition.sizes,
        counts=federation.partition.counts(train.labels, 10),
        classes=np.array(train.classes),
    )
    np.save(folder / "participation.npy", np.full(20, 4 * 32))
    lines = []
    for record in run.metrics():
        if "loss" in record:
            record |= {"divergence": 0.02, "divergence/stem.weight": 0.03, "divergence/stem.norm.bias": 0.01}
            record |= {f"seconds/{phase}": 0.25 for phase in ("clients", "server", "synchronise", "other")}
        lines.append(json.dumps(record) + "\n")
    run.write("metrics.jsonl", "".join(lines))
    attacked(folder)
    return folder


def attacked(folder: Path) -> None:
    """What `mocosfl attack` leaves in a folder."""
    report = {
        "run": "mine",
        "client": 0,
        "images": 3,
        "gallery": 10,
        "attacks": {name: {"what": f"attack {name}", **SCORES, "seconds": 1.0} for name in ("decoder", "strong")},
        "worst": {name: {"value": value, "attack": "strong"} for name, value in SCORES.items()},
        "mean image": SCORES | {"ssim": 0.1},
        "settings": {},
    }
    Run.open(folder).write_json("privacy.json", report)
    images = torch.rand(3, 1, 8, 8)
    draw_reconstructions(images, dict.fromkeys(report["attacks"], images), report, folder / "reconstructions.png")


@pytest.fixture(scope="session")
def seen(finished: Path) -> Examples:
    """All its test images, through its encoder."""
    found = examples(finished, torch.device("cpu"), lambda text: None)
    assert isinstance(found, Examples)
    return found


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies of that folder to change: ``copied("other")``."""
    return lambda name: Path(shutil.copytree(finished, tmp_path / name))


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    """Chromium without a window."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("needs chromium or google-chrome on the path")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()
