"""What the tests with Flower's own processes share."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Starts a federation: ``flower(simulated=True)``. No process outlives the test."""
    from benchmarks.flower import Flower

    started: list[Flower] = []

    def start(**how: Any) -> Flower:
        started.append(Flower(tmp_path / f"flower-{len(started)}", **how))
        return started[-1]

    yield start
    for one in started:
        one.stop()
