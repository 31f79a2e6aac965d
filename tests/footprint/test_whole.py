"""What clients spend that hold the whole network: beside counts by hand, real runs, and the FL-BYOL of the tables."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from mocosfl.baselines import METHODS, method_settings
from mocosfl.clients import LocalCohort
from mocosfl.config import Config
from mocosfl.footprint import arithmetic, cost, memory, traffic
from mocosfl.footprint.devices import device
from mocosfl.footprint.fl_byol import FLBYOL
from mocosfl.footprint.plan import Plan
from mocosfl.models import build, build_head
from mocosfl.models.heads import build_predictor
from mocosfl.reporting.cost import table

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from test_arithmetic import of_views
from test_memory import allocated

from test_trainer import run, settings

CPU = torch.device("cpu")
DIGITS = {
    "data.source": "digits",
    "data.size": 8,
    "data.channels": 1,
    "model.width": 4,
    "model.client_norm": "batch",
    "model.server_norm": "batch",
    "model.head": "small",
    "contrast.queue": 60,
    "contrast.predictor": 24,
    "clients.number": 6,
    "clients.batch": 5,
    "sync.every": 7,
    "train.epochs": 2,
}


def plan(method: str, images: int = 300, **changes: object) -> Plan:
    """Of a method on grey images of 8 pixels: 20 steps, and averages after 7, 14 and 20."""
    return Plan.of(Config().updated(DIGITS | method_settings(method) | changes), images)


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize(("method", "predictor", "target"), [("flbyol", 1, 1), ("flmoco", 0, 1), ("flsimclr", 0, 0)])
def test_bytes_of_an_average_by_hand(method: str, predictor: int, target: int, momentum: bool) -> None:
    found = plan(method, **{"sync.momentum": momentum})
    model = build(found.config.model, 1, 8, 0)
    encoder = [*model.client.state_dict().values(), *model.server.state_dict().values()]
    head = [*build_head("small", model.features, 0).state_dict().values()]
    both = [*encoder, *head] * (1 + (target and momentum))
    tensors = both + [*build_predictor(512, 24, 0).state_dict().values()] * predictor
    numbers = sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())
    counters = sum(tensor.numel() for tensor in tensors if not tensor.is_floating_point())
    assert counters == 20 * (1 + (target and momentum)) + predictor  # the BatchNorms of ResNet-18
    size = 4 * numbers + 8 * counters
    bytes_ = traffic.of_client(found)
    assert (found.steps, found.averages) == (20, 3)
    assert bytes_.run == Counter({"halves up": 3 * size, "halves down": 3 * size}) | dict.fromkeys(
        ("query latents", "key latents", "gradients"), 0
    )
    assert bytes_.average["halves up"] == bytes_.average["halves down"] == bytes_.start["halves down"] == size
    assert bytes_.epoch["halves up"] == 1.5 * size
    assert bytes_.messages is None


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("fedema", {}),
        ("fedu", {"clients.pool": 2, "clients.round": 4}),
        ("flmoco", {"clients.pool": 3, "clients.round": 5, "sync.every": 3}),
        ("flsimclr", {"sync.momentum": True}),
        ("flbyol", {"clients.rich_share": 0.5, "clients.rich_batch_factor": 2, "train.epochs": 7}),
    ],
)
def test_bytes_are_those_that_a_run_averages(
    method: str, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(
        **{"clients.batch": 2, "sync.every": 2, "contrast.predictor": 16} | method_settings(method) | changes
    )
    sent, synchronise = [], LocalCohort.synchronise

    def counted(cohort: LocalCohort) -> dict[str, torch.Tensor]:
        sent.append(4 * sum(stack.numel() for stack in cohort._averaged().values()))  # of all active clients
        return synchronise(cohort)

    monkeypatch.setattr(LocalCohort, "synchronise", counted)
    _, trainer = run(config)
    found = Plan(config, 30, 8)
    assert (found.steps, found.averages) == (trainer.steps, len(sent))
    kinds = (False, True) if config.rich else (False,)
    up = sum(found.number(rich) * traffic.of_client(found, rich).run["halves up"] for rich in kinds)
    counters = 8 * len(sent) * config.pool if method in ("fedema", "fedu", "flbyol") else 0  # one in the predictor
    assert up == pytest.approx(sum(sent) + counters)


@pytest.mark.parametrize("method", METHODS[:3])
def test_multiply_adds_and_memory_are_those_of_a_real_step(method: str) -> None:
    found = plan(method)
    images = found.config.clients.batch
    step, kept = memory.client_step(found, False, CPU)
    assert arithmetic.counted(step) - of_views(found) == pytest.approx(
        images * sum(arithmetic.of_client(found).values())
    )
    assert memory.of_client(found) == pytest.approx(allocated(step, kept), rel=0.1)


def test_a_queue_of_its_own_takes_memory_and_arithmetic() -> None:
    small, large = plan("flmoco"), plan("flmoco", **{"contrast.queue": 60_000})
    assert memory.of_client(large) - memory.of_client(small) > 0.9 * 4 * 512 * (10_000 - 10)
    small_macs, large_macs = arithmetic.of_client(small), arithmetic.of_client(large)
    assert large_macs["contrast"] == 1000 * small_macs["contrast"] == 2 * 2 * 512 * 10_000
    assert large_macs["forward"] == small_macs["forward"]


def test_byol_of_a_plan_is_the_fl_byol_of_the_tables() -> None:
    changes = {"model.head": "large", "contrast.predictor": 4096, "clients.batch": 50, "sync.every": 5}
    found = plan("fedema", **changes, **{"train.epochs": 500})
    reference = FLBYOL(found, 50)
    assert (reference.batch, reference.rounds) == (50, found.averages)
    bytes_, macs = traffic.of_client(found), arithmetic.of_client(found)
    assert bytes_.average["halves up"] == reference.half
    assert bytes_.run["halves down"] == reference.rounds * reference.half
    assert macs | {"contrast": 0} == reference.macs() | {"contrast": 0}
    assert memory.of_client(found) == pytest.approx(reference.memory(), rel=0.1)


def test_the_table_of_a_baseline() -> None:
    found = cost.of_recipe(plan("flsimclr").config, device("pi4"), 300)
    ours, reference, _ = found.columns
    assert found.server is None
    assert (ours.memory_in_numpy, ours.messages, ours.paper) == (None, None, None)
    assert ours.macs["momentum"] == 0 < ours.macs["contrast"]
    assert ours.seconds_to_send == 8 * sum(ours.run.values()) / found.device.link.value
    assert ours.parameters < reference.parameters
    assert any("clients.holds=network" in note for note in found.notes)
    assert not any("mocosfl-client" in note for note in found.notes)
    assert "multiply-adds an image, contrast" in list(table(found).columns[0].cells)
