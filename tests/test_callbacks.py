"""The guard against collapse, on made-up metrics."""

import math
from types import SimpleNamespace

import pytest
import torch

from mocosfl.callbacks import CollapseGuard
from mocosfl.config import Config
from mocosfl.errors import RunError

CONFIG = Config().updated({"train.log_every": 10, "contrast.queue": 999, "contrast.symmetric": False})
GUESS = math.log(1000)


def watch(steps: range, of: int = 300, **values: float) -> CollapseGuard:
    """Let a guard see the same metrics at some steps."""
    guard = CollapseGuard()
    metrics = {"loss": 3.0, "contrast_accuracy": 0.3, "spread": 0.4} | values
    for step in steps:
        trainer = SimpleNamespace(step=step, steps=of, config=CONFIG, check=lambda: None)
        guard.after_step(trainer, {name: torch.tensor(value) for name, value in metrics.items()})
    return guard


@pytest.mark.parametrize(
    "values",
    [
        {"spread": 0.0},
        {"spread": 5e-4, "contrast_accuracy": 0.9, "loss": 0.1},
        {"contrast_accuracy": 0.001, "loss": GUESS},
        {"contrast_accuracy": 0.0, "loss": 0.96 * GUESS},
    ],
)
def test_collapses(values: dict) -> None:
    with pytest.raises(RunError, match="collapsed at step 100"):
        watch(range(1, 300), **values)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"spread": 0.02},
        {"contrast_accuracy": 0.001, "loss": 0.7 * GUESS},  # not right often, but far from guessing
        {"contrast_accuracy": 0.1, "loss": 1.2 * GUESS},
    ],
)
def test_healthy_runs(values: dict) -> None:
    watch(range(1, 300), **values)


def test_nothing_is_expected_of_the_beginning() -> None:
    watch(range(1, 100), spread=0.0)
    watch(range(1, 200), of=3000, spread=0.0)
    with pytest.raises(RunError, match="at step 300"):
        watch(range(1, 310), of=3000, spread=0.0)


def test_one_bad_step_is_no_collapse() -> None:
    guard = watch(range(101, 110))
    trainer = SimpleNamespace(step=110, steps=300, config=CONFIG, check=lambda: None)
    guard.after_step(trainer, {name: torch.tensor(0.0) for name in ("loss", "contrast_accuracy", "spread")})


def test_it_resumes() -> None:
    guard, again = watch(range(101, 105), spread=0.0), CollapseGuard()
    again.load_state_dict(guard.state_dict())
    assert again.count == 4
    assert float(again.sums["contrast_accuracy"]) == pytest.approx(1.2)
