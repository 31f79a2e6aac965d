"""The stopwatch, with a clock that the test moves."""

import pytest
import torch

from mocosfl import stopwatch
from mocosfl.stopwatch import Stopwatch

CPU = torch.device("cpu")


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    time = [100.0]
    monkeypatch.setattr(stopwatch.time, "monotonic", lambda: time[0])
    return time


def test_phases_add_up_until_they_are_read(now: list[float]) -> None:
    watch = Stopwatch(CPU)
    for seconds in (1.0, 2.0):
        with watch.phase("clients"):
            now[0] += seconds
        now[0] += 7  # no phase's
    with watch.phase("server"):
        now[0] += 0.5
    assert watch.state_dict() == {"clients": 3.0, "server": 0.5}
    assert watch.read() == {"clients": 3.0, "server": 0.5}
    assert watch.read() == {}


def test_a_resumed_run_goes_on_counting(now: list[float]) -> None:
    watch = Stopwatch(CPU)
    watch.load_state_dict({"clients": 3.0})
    with watch.phase("clients"):
        now[0] += 1
    assert watch.read() == {"clients": 4.0}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_its_own_time_counts() -> None:
    watch = Stopwatch(torch.device("cuda"))
    a = torch.randn(4096, 4096, device="cuda")
    with watch.phase("product"):
        for _ in range(50):
            a = (a @ a).tanh()
    with watch.phase("nothing"):
        pass
    seconds = watch.read()
    assert seconds["product"] > 10 * seconds["nothing"]
