"""The loop: synchronising every step is centralised MoCo, and where the clients are makes no difference."""

import copy
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mocosfl.clients
from mocosfl.baselines import held_by_clients
from mocosfl.clients import LocalCohort
from mocosfl.config import Config
from mocosfl.data.augment import augment, augmented, normalise, on_device, policy_of
from mocosfl.data.images import ImageSet
from mocosfl.data.partition import partition
from mocosfl.data.sampler import ClientSampler
from mocosfl.errors import RunError
from mocosfl.models import build, build_head
from mocosfl.models.heads import WIDTHS
from mocosfl.server import Server
from mocosfl.trainer import Callback, Trainer
from mocosfl_device.augment import AugmentParameters, Policy

sys.path.insert(0, str(Path(__file__).parent))
import naive
from naive import NaiveCohort

CPU = torch.device("cpu")
MEAN, STD = torch.tensor([0.5, 0.4, 0.6]).double(), torch.tensor([0.25, 0.2, 0.3]).double()


WHOLE = {
    "clients.holds": "network",
    "clients.lr_scale": "per_client_mean",
    "clients.batch": 4,
    "contrast.both_views": True,
    "contrast.feature_sharing": False,
    "contrast.predictor": 16,
    "sync.every": 2,
}
"""Clients that hold the whole network."""


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def after_step(self, trainer: Trainer, metrics: dict[str, torch.Tensor]) -> None:
        self.values.append(float(metrics["loss"]))


def settings(**changes: object) -> Config:
    base = {
        "model.width": 4,
        "model.head": "v1",
        "contrast.queue": 50,
        "partition.kind": "iid",
        "clients.number": 6,
        "clients.batch": 1,
        "train.epochs": 5,
        "seed": 1,
    }
    return Config().updated(base | changes)


def parts(config: Config, images: int = 30):
    pixels = np.random.default_rng(0).integers(0, 256, (images, 3, 8, 8), dtype=np.uint8)
    model = build(config.model, 3, 8, config.seed)
    head = build_head(config.model.head, model.features, config.seed)
    held = partition(config.partition, config.clients.number, np.arange(images), None, None, config.seed)
    clients_half, rest = held_by_clients(config, model.client, model.server, head)
    server = Server(*rest, config, WIDTHS[config.model.head], CPU)
    for module in (clients_half, server.online, server.momentum, server.queue):
        module.double()  # so that rounding does not grow over the steps
    return ImageSet(pixels), clients_half, server, ClientSampler(held, config.seed)


def run(config: Config, cohort: type = LocalCohort, images: int = 30) -> tuple[list[float], Trainer]:
    data, half, server, sampler = parts(config, images)
    place = (CPU,) if cohort is LocalCohort else ()
    losses = Losses()
    trainer = Trainer(config, cohort(half, config, data, sampler, MEAN, STD, *place), server, images, [losses])
    trainer.run()
    return losses.values, trainer


@pytest.mark.parametrize(
    ("scale", "changes"),
    [
        ("batch_mean", {}),
        ("per_client_mean", {}),
        ("per_client_mean", {"contrast.both_views": True}),
        ("batch_mean", {"contrast.symmetric": False, "model.server_norm": "batch"}),
    ],
)
def test_synchronising_every_step_is_centralised_moco(scale: str, changes: dict) -> None:
    """25 steps: the same as one unsplit network on the concatenated batch.

    The average of N clients moves by the mean of their gradients. A client's share of the batch's mean loss (published)
    is its own mean loss divided by N: so centralised training has the client's rate divided by N with batch_mean, while
    the weight decay, which is not divided, weighs N times more; with per_client_mean both are the client's own.
    """
    config = settings(**{"sync.every": 1, "clients.lr_scale": scale, "clients.lr": 0.2, "model.cut": 3} | changes)
    clients = config.clients.number
    split_losses, trainer = run(config)

    data, half, server, sampler = parts(config)
    share = {"batch_mean": 1 / clients, "per_client_mean": 1}[scale]
    rate, decay = 0.2 * share, config.train.weight_decay / share
    online = nn.Sequential(half, server.online).train()
    momentum = copy.deepcopy(online).requires_grad_(False)
    optimizer = torch.optim.SGD(
        [{"params": half.parameters(), "weight_decay": decay}, {"params": server.online.parameters()}],
        lr=1.0,
        momentum=config.train.momentum,
        weight_decay=config.train.weight_decay,
    )
    queue = server.queue.keys[0].clone()
    everyone, policy, losses = np.arange(clients), policy_of(config.augment), []
    for step in range(trainer.steps):
        rows, draws = sampler.draw(everyone, 1)
        views = []
        for view in (0, 1):
            parameters = AugmentParameters.draw(policy, 8, config.seed, everyone, draws, view)
            views.append(normalise(augment(data.take(rows, "cpu"), parameters, policy), MEAN, STD))
        for m, o in zip(momentum.parameters(), online.parameters(), strict=True):
            m.mul_(0.99).add_(o.detach(), alpha=0.01)
        loss, keys = torch.zeros(()), []
        for way in (0, 1) if config.contrast.symmetric else (0,):
            there_and_back = way == 0 or config.contrast.both_views
            # else the second way starts from the momentum half's latents, and trains the server alone
            q = online(views[way]) if there_and_back else online[1](momentum[0](views[1]))
            with torch.no_grad():
                k = momentum(views[1 - way]) if there_and_back else momentum[1](online[0](views[0]))
            q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
            logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / config.contrast.temperature
            loss = loss + F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))
            keys.append(k)
        factor = (1 + math.cos(math.pi * step / trainer.steps)) / 2
        for group, lr in zip(optimizer.param_groups, (rate, config.train.lr), strict=True):
            group["lr"] = factor * lr
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue = torch.cat([queue, *keys])[-50:]
        losses.append(loss.item())

    assert trainer.steps == 25
    assert split_losses == pytest.approx(losses, rel=1e-9)
    for name, tensor in trainer.cohort.average().items():
        torch.testing.assert_close(tensor, half.state_dict()[name], atol=1e-9, rtol=1e-6)


@pytest.fixture
def _views_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views in float64: in float32 some processors round the matrix products of one client's images and of all clients'
    differently, and that grows over the steps."""

    def in_double(images: torch.Tensor, p: dict[str, torch.Tensor], policy: Policy) -> torch.Tensor:
        p = {name: t.double() if t.is_floating_point() else t for name, t in p.items()}
        return augmented(images.double() / 255, p, policy)

    monkeypatch.setattr(mocosfl.clients, "augmented", in_double)
    monkeypatch.setattr(naive, "augment", lambda images, p, policy: in_double(images, on_device(p, CPU), policy))


@pytest.mark.usefixtures("_views_in_double")
@pytest.mark.parametrize(
    "changes",
    [
        {"sync.every": 2},
        {"sync.every": 3, "clients.pool": 2, "clients.round": 4, "clients.batch": 2},
        {"sync.every": 4, "contrast.feature_sharing": False, "clients.pool": 3},
        {
            "sync.every": 3,
            "contrast.feature_sharing": False,
            "clients.pool": 3,
            "clients.round": 6,
            "clients.drop": 0.7,
        },
        {"sync.every": 2, "contrast.objective": "mocov3", "contrast.predictor": 16},
        {"sync.every": 2, "contrast.objective": "simclr", "contrast.both_views": True},
        WHOLE
        | {
            "clients.drop": 0.5,
            "clients.rich_share": 0.34,
            "clients.rich_batch_factor": 2,
            "contrast.objective": "byol",
        },
        WHOLE | {"clients.pool": 3, "clients.round": 2, "contrast.objective": "simclr", "clients.drop": 0.5},
    ],
    ids=str,
)
def test_vectorised_and_looped_clients_train_alike(changes: dict) -> None:
    local, _ = run(settings(**changes))
    naive, _ = run(settings(**changes), NaiveCohort)
    assert local == pytest.approx(naive, rel=1e-9)


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch.compile imports parts of torch that warn of themselves
def test_compiled_and_plain_runs_train_alike() -> None:
    changes = {"clients.batch": 2, "sync.every": 2, "train.epochs": 2, "contrast.symmetric": False}
    plain, _ = run(settings(**changes))
    config = settings(**changes, **{"train.compile": "default"})
    data, half, server, sampler = parts(config)
    cohort, losses = LocalCohort(half, config, data, sampler, MEAN, STD, CPU), Losses()
    rounded = []

    def augmented_alike(images: torch.Tensor, p: dict[str, torch.Tensor], policy: Policy) -> torch.Tensor:
        """Views are float32: compiled ones differ by rounding, which would grow over the steps."""
        exact = augmented(images, p, policy)
        rounded.append((compiled_augmentation(images, p, policy) - exact).abs().max())
        return exact

    compiled_augmentation, cohort.views.augmented = cohort.views.augmented, augmented_alike
    Trainer(config, cohort, server, 30, [losses]).run()
    assert len(plain) == 5
    assert losses.values == pytest.approx(plain, rel=1e-9)
    assert max(rounded) < 2e-6


def test_rates_warm_up_and_fall_along_a_cosine_in_steps() -> None:
    config = settings(**{"train.warmup": 0.2, "train.lr": 0.5, "clients.lr": 0.1})
    data, half, server, sampler = parts(config)
    trainer = Trainer(config, LocalCohort(half, config, data, sampler, MEAN, STD, CPU), server, 30)
    rates = []
    for step in range(trainer.steps):
        trainer.step = step
        rates.append(trainer.rates_of(trainer.step))
    server_lr, client_lr = (np.array(column) for column in zip(*rates, strict=True))
    assert server_lr[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert server_lr[5:] == pytest.approx([0.25 * (1 + math.cos(math.pi * i / 20)) for i in range(20)])
    assert client_lr == pytest.approx(server_lr / 5)


def test_sync_points() -> None:
    class Spy:
        def __init__(self) -> None:
            self.events: list[str] = []

        def __getattr__(self, name: str):
            def heard(*args: object) -> dict[str, torch.Tensor]:
                if name in ("activate", "synchronise", "forward"):
                    self.events.append(name)
                return {}

            return heard

    class Deaf:
        device = CPU

        def step(self, latents, lr):
            return None, {"loss": torch.zeros(())}

    def events(**changes: object) -> str:
        spy = Spy()
        Trainer(settings(**changes), spy, Deaf(), 30).run()
        return "".join({"activate": "a", "synchronise": "s", "forward": "."}[event] for event in spy.events)

    every_two = events(**{"sync.every": 2, "train.epochs": 1})
    assert every_two == "..s..s.s"  # and at the end
    pools = events(**{"sync.every": 3, "clients.pool": 2, "clients.round": 4, "train.epochs": 0.6})
    assert pools == "a...s.sa...s.sa.s"  # counted within the round
    assert events(**{"sync.every": 0, "train.epochs": 1}) == ".....s"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_named_by_its_step(bad: float) -> None:
    config = settings()
    data, half, server, sampler = parts(config)
    trainer = Trainer(config, LocalCohort(half, config, data, sampler, MEAN, STD, CPU), server, 30)
    for step, loss in enumerate([2.0, 1.0, bad, 3.0, bad], start=1):
        trainer.step = step
        trainer._watch(torch.tensor(loss))
    with pytest.raises(RunError, match=r"loss at step 3 is not finite; lower train\.lr"):
        trainer.check()


def test_a_state_with_a_weight_that_is_not_finite_is_not_kept() -> None:
    config = settings()
    data, half, server, sampler = parts(config)
    trainer = Trainer(config, LocalCohort(half, config, data, sampler, MEAN, STD, CPU), server, 30)
    trainer.state_dict()
    next(iter(trainer.cohort.online.weights.values())).data[2] = float("inf")
    trainer.check()  # the loss does not show it yet
    with pytest.raises(RunError, match="a weight is not finite"):
        trainer.state_dict()
