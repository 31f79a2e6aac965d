"""What all tests share."""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what takes long."""
    for item in items:
        if item.get_closest_marker("soak") and not os.environ.get("MOCOSFL_SOAK"):
            item.add_marker(pytest.mark.skip(reason="takes long: make soak"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """The tests compute little at a time, and run side by side; several threads would mostly wait for each other."""
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the commands that they start


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded images are kept for the session, apart from the user's."""
    monkeypatch.setenv("MOCOSFL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with parquet files of CIFAR-10's first 2,000 training and 2,000 test images, where CIFAR-10 lies beside
    the checkout: decoding all of it would take longer than most tests."""
    whole = SHARED / "cifar10"
    if not whole.is_dir():
        pytest.skip(f"needs the parquet files of CIFAR-10 in {whole}")
    folder = tmp_path_factory.mktemp("cifar10")
    for split, count in (("train", 2000), ("test", 2000)):
        first = min(whole.glob(f"{split}-*.parquet"))
        rows = next(pq.ParquetFile(first).iter_batches(count))
        pq.write_table(pa.Table.from_batches([rows]), folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="session")
def photos() -> Callable[..., Tensor]:
    """Makes small real images that need no download: ``photos(count, size)``."""
    return _photos


def _photos(count: int, size: int, seed: int = 0) -> Tensor:
    """Pieces of scikit-learn's two photographs: (count, 3, size, size) float32 in [0, 1], some of them mirrored."""
    rng = np.random.default_rng(seed)
    pieces = []
    for number in range(count):
        photo = _both()[number % 2]
        top, left = (int(rng.integers(0, side - 4 * size)) for side in photo.shape[:2])
        square = photo[top : top + 4 * size, left : left + 4 * size]
        small = square.reshape(size, 4, size, 4, 3).mean(axis=(1, 3))
        pieces.append(small[:, ::-1] if rng.random() < 0.5 else small)
    return torch.from_numpy(np.stack(pieces).transpose(0, 3, 1, 2).astype(np.float32) / 255)


@functools.cache
def _both() -> list[np.ndarray]:
    return load_sample_images().images
