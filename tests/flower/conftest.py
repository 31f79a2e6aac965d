"""What the tests of Flower share."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes in this process answer at once, so there is nothing to wait for."""
    monkeypatch.setattr("mocosfl.flower.cohort.PAUSE", 0.01)


@pytest.fixture(scope="session")
def half(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run whose half frozen clients start from."""
    import mocosfl
    from tiny import digits

    out = tmp_path_factory.mktemp("half") / "half"
    mocosfl.train(digits(**{"train.epochs": 0.02}), out)
    return str(out)
