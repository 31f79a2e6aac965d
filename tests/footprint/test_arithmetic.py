"""Multiply-adds, beside those of real steps and of arithmetic by hand."""

import math

import pytest
import torch
from torch import nn

from mocosfl.config import Config
from mocosfl.data.augment import policy_of
from mocosfl.footprint import arithmetic, memory
from mocosfl.footprint.fl_byol import FLBYOL
from mocosfl.footprint.plan import Plan
from mocosfl.recipes import recipe

CPU = torch.device("cpu")
DIGITS = {
    "data.source": "digits",
    "data.size": 8,
    "data.channels": 1,
    "model.width": 8,
    "contrast.queue": 60,
    "clients.number": 10,
    "clients.batch": 3,
}


def test_a_convolution_by_hand() -> None:
    conv = nn.Conv2d(3, 8, 3, padding=1, device="meta")
    forward, backward = arithmetic.passes(conv, torch.empty(2, 3, 10, 10, device="meta"), learns_input=False)
    assert (forward, backward) == (8 * 3 * 9 * 100, 8 * 3 * 9 * 100)  # backward: of the weights alone
    _, backward = arithmetic.passes(conv, torch.empty(2, 3, 10, 10, device="meta"), learns_input=True)
    assert backward == 2 * 8 * 3 * 9 * 100


def test_the_papers_client_half() -> None:
    found = arithmetic.of_client(Plan.of(recipe("cifar10-device")))
    stem, block, bottleneck = 3 * 64 * 9 * 32**2, 2 * 64 * 64 * 9 * 32**2, 64 * 4 * 9 * 16**2
    assert found == {"forward": stem + block + bottleneck, "backward": 0, "momentum": stem + block + bottleneck}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model.cut": 3, "model.bottleneck": "C4S2", "contrast.symmetric": False},
        {"contrast.both_views": True, "model.server_norm": "batch"},
        {"clients.frozen": True, "model.head": "large"},
        {"contrast.feature_sharing": False},
    ],
)
def test_counts_are_those_of_a_real_step(changes: dict[str, object]) -> None:
    plan = Plan.of(Config().updated(DIGITS | changes))
    images = plan.config.clients.batch
    step, _ = memory.client_step(plan, False, CPU)
    assert arithmetic.counted(step) - of_views(plan) == images * sum(arithmetic.of_client(plan).values())
    step, _ = memory.server_step(plan, CPU)
    assert arithmetic.counted(step) == plan.config.step_images * sum(arithmetic.of_server(plan).values())


def of_views(plan: Plan) -> int:
    """Multiply-adds of the matrices that crop, resize and blur a client's images: two views of each."""
    config, size = plan.config, plan.size
    sides = 2 * (2 if policy_of(config.augment).blur_p else 1)  # rows and columns of the crop, and of the blur
    views = 2 * config.clients.batch * config.data.channels
    taps = size * size * (2 * math.ceil(3 * policy_of(config.augment).blur_sigma[1]) + 1)  # of a blur, at every pixel
    return views * sides * size**3 + 2 * config.clients.batch * taps


def test_fl_byol() -> None:
    plan = Plan.of(Config().updated(DIGITS))
    baseline = FLBYOL(plan, 6, CPU)
    assert arithmetic.counted(baseline.step) == 6 * sum(baseline.macs().values())
