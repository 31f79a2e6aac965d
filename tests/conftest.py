"""What all tests share."""

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """The tests compute little at a time; several threads would mostly wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded images are kept for the session, apart from the user's."""
    monkeypatch.setenv("MOCOSFL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def cifar10() -> Path:
    """A folder with the parquet files of CIFAR-10, where there is one beside the checkout."""
    folder = SHARED / "cifar10"
    if not folder.is_dir():
        pytest.skip(f"needs the parquet files of CIFAR-10 in {folder}")
    return folder
