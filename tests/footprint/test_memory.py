"""Peak memory of tensors, beside what PyTorch and Python allocate in real steps."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mocosfl.config import Config
from mocosfl.footprint import memory
from mocosfl.footprint.fl_byol import FLBYOL
from mocosfl.footprint.memory import PeakMemory
from mocosfl.footprint.plan import Plan
from mocosfl.recipes import recipe

CPU = torch.device("cpu")
DIGITS = {"data.source": "digits", "data.size": 8, "data.channels": 1, "clients.number": 10}
WITHIN = 0.1


def allocated(step: Callable[[], object], kept: list[Tensor]) -> int:
    """Peak bytes of two real steps by the profiler, what is there before them included.

    Left out, as in the estimate, is the working memory inside kernels of convolutions and norms: copies of images and
    filters in the layout that a library prefers, made and freed before the kernel returns.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
        step()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    now = peak = within = until = 0
    for event in events:
        if event.start_ns() > until:
            now, within = now + within, 0
            peak = max(peak, now)
        if event.name() == "[memory]":
            within += event.nbytes()
        elif event.name().startswith(("aten::convolution", "aten::native_")):
            until = max(until, event.start_ns() + event.duration_ns())
    assert peak > 0
    return peak + sum(tensor.nbytes for tensor in kept)


@pytest.mark.parametrize(
    ("name", "changes", "rich"),
    [
        ("digits", {"model.width": 64}, False),
        ("cifar10-noniid-100", {}, False),
        ("cifar10-noniid-1000-cut3", {}, False),
        ("cifar10-device", {}, False),
        ("cifar10-small", {"clients.batch": 4}, False),  # bf16
        ("taressfl-small", {}, False),  # bf16
        ("cifar10-noniid-100", {"clients.rich_share": 0.5, "clients.rich_batch_factor": 20}, True),
        ("cifar10-noniid-100", {"contrast.both_views": True, "model.client_norm": "batch", "clients.batch": 3}, False),
    ],
)
def test_a_client(name: str, changes: dict[str, object], rich: bool) -> None:
    plan = Plan.of(recipe(name).updated(changes))
    assert memory.of_client(plan, rich) == pytest.approx(allocated(*memory.client_step(plan, rich, CPU)), rel=WITHIN)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("digits", {}),
        ("cifar10-small", {}),  # bf16, BatchNorm
        ("cifar10-noniid-100", {"model.width": 16, "model.cut": 3}),
        ("taressfl-cut3", {"model.width": 16, "model.head": "large"}),
    ],
)
def test_the_server(name: str, changes: dict[str, object]) -> None:
    plan = Plan.of(recipe(name).updated(changes))
    assert memory.of_server(plan) == pytest.approx(allocated(*memory.server_step(plan, CPU)), rel=WITHIN)


def test_fl_byol() -> None:
    plan = Plan.of(Config().updated(DIGITS | {"model.width": 16}))
    real = FLBYOL(plan, 100, CPU)
    assert FLBYOL(plan, 100).memory() == pytest.approx(allocated(real.step, real.kept), rel=WITHIN)


def test_a_client_in_numpy() -> None:
    config = recipe("cifar10-device").updated({"clients.frozen": False, "model.cut": 1})
    plan = Plan.of(config)
    learning = memory.of_client_in_numpy(plan)
    assert 64 * 32 * 32 < learning < 600_000  # slices: less than the numbers at the cut would take
    frozen = memory.of_client_in_numpy(Plan.of(config.updated({"clients.frozen": True})))
    assert frozen < learning < memory.of_client(plan)
    assert memory.of_client_in_numpy(Plan.of(config.updated({"clients.batch": 4}))) > 2 * learning
    assert memory.of_client_in_numpy(plan) == pytest.approx(learning, rel=0.02)


def test_a_half_that_numpy_cannot_compute() -> None:
    config = recipe("cifar10-device").updated({"clients.batch": 2, "model.client_norm": "batch"})
    assert memory.of_client_in_numpy(Plan.of(config)) is None
    assert memory.of_client_in_numpy(Plan.of(recipe("cifar10-device")), most=1e6) is None


def test_peak_memory_counts_storages_once() -> None:
    with PeakMemory() as found:
        a = torch.zeros(1000)
        b = a.view(10, 100)
        a += 1
        c = a + b.flatten()
        del a
        assert found.now == 8000
        del b
        assert found.now == 4000
        del c
    assert (found.now, found.peak) == (0, 8000)


def test_latents_that_the_server_keeps() -> None:
    changes = {"clients.frozen": True, "clients.pool": None, "clients.round": None}
    config = recipe("cifar10-device").updated(changes | {"cache.views": 4})
    assert memory.of_kept_latents(Plan.of(config)) == 50_000 * 4 * 1024 * 4
    assert memory.of_kept_latents(Plan.of(config.updated({"traffic.latents": "int8"}))) == 50_000 * 4 * 1024 * 2
    assert memory.of_kept_latents(Plan.of(config.updated({"cache.views": 0}))) == 0
    assert memory.of_server(Plan.of(config)) == memory.of_server(Plan.of(config.updated({"cache.views": 0})))
