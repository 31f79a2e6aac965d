"""LocalCohort against a plain loop over separate modules and optimisers."""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mocosfl.clients import FrozenCohort, LocalCohort
from mocosfl.config import Config
from mocosfl.data.augment import normalise
from mocosfl.data.images import ImageSet
from mocosfl.data.partition import Partition
from mocosfl.data.sampler import ClientSampler, pool_of_round
from mocosfl.errors import SettingError
from mocosfl.models import build
from mocosfl.models.heads import WIDTHS, build_head
from mocosfl.rounding import rounded
from mocosfl.server import Server
from mocosfl.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parent))
from naive import NaiveCohort

CPU = torch.device("cpu")
SIZES = (5, 9, 4, 12, 6, 7)  # images of each client


def settings(**changes: object) -> Config:
    base = {"model.width": 4, "clients.number": len(SIZES), "clients.batch": 2, "seed": 3, "sync.every": 3}
    return Config().updated(base | changes)


def cohorts(config: Config) -> tuple[LocalCohort, NaiveCohort]:
    pixels = np.random.default_rng(0).integers(0, 256, (sum(SIZES), 3, 8, 8), dtype=np.uint8)
    images = ImageSet(pixels)
    offsets = np.concatenate([[0], np.cumsum(SIZES)])
    partition = Partition(np.random.default_rng(1).permutation(sum(SIZES)), offsets)
    half = build(config.model, 3, 8, config.seed).client
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
    naive = NaiveCohort(copy.deepcopy(half), config, images, ClientSampler(partition, config.seed), mean, std)
    return LocalCohort(half, config, images, ClientSampler(partition, config.seed), mean, std, CPU), naive


def compare(config: Config, steps: int = 7) -> None:
    """Run both with the same gradients; latents and averages must agree at every step."""
    local, naive = cohorts(config)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        if config.pool < config.clients.number and step % config.clients.round == 0:
            round_ = step // config.clients.round
            pool = pool_of_round(config.seed, round_, config.clients.number, config.pool, config.rich, config.pool_rich)
            local.activate(pool)
            naive.activate(pool)
        ours, theirs = local.forward(), naive.forward()
        assert ours.query.shape == theirs.query.shape
        torch.testing.assert_close(ours.query, theirs.query, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(ours.key, theirs.key, atol=2e-5, rtol=1e-4)
        assert np.array_equal(ours.clients, theirs.clients)
        assert np.array_equal(ours.sizes, theirs.sizes)
        gradients = torch.randn(ours.query.shape, generator=generator) / ours.query[0].numel()
        local.backward(gradients, 0.5)
        naive.backward(gradients, 0.5)
        last = config.clients.round and (step + 1) % config.clients.round == 0
        if (config.sync.every and (step + 1) % config.sync.every == 0) or last:
            apart, expected = local.synchronise(), naive.synchronise()
            if not local.identical:  # where one half stands for all, nothing is known of how far they moved
                assert apart.keys() == expected.keys()
                for name, ratio in apart.items():
                    torch.testing.assert_close(ratio, expected[name], atol=2e-5, rtol=1e-3)
        elif step % 2:
            expected = naive.average()
            for name, tensor in local.average().items():
                torch.testing.assert_close(tensor, expected[name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("cut", [1, 3, 7])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_equals_a_loop_at_any_cut_and_batch(cut: int, batch: int) -> None:
    compare(settings(**{"model.cut": cut, "clients.batch": batch}))


@pytest.mark.parametrize("average_momentum", [True, False])
@pytest.mark.parametrize("keep_optimizer", [True, False])
def test_equals_a_loop_with_sampled_pools(average_momentum: bool, keep_optimizer: bool) -> None:
    pooled = {"clients.pool": 3, "clients.round": 2, "clients.keep_optimizer": keep_optimizer, "sync.every": 1}
    compare(settings(**pooled, **{"sync.momentum": average_momentum}), steps=9)
    pooled["clients.round"], pooled["sync.every"] = 4, 3
    compare(settings(**pooled, **{"sync.momentum": average_momentum}), steps=13)


@pytest.mark.parametrize(
    "changes",
    [
        {"contrast.both_views": True},
        {"model.bottleneck": "C4S2", "model.cut": 3},
        {"model.client_norm": "batch", "clients.batch": 3},
        {"sync.every": 0},
        {"sync.average": "median"},
        {"sync.average": "trimmed_mean", "sync.trim": 0.2, "sync.momentum": False, "sync.every": 1},
        {"sync.every": 1, "contrast.momentum": 0.5, "train.momentum": 0.0, "train.weight_decay": 0.1},
    ],
    ids=str,
)
def test_equals_a_loop_with_other_settings(changes: dict) -> None:
    compare(settings(**changes))


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {"sync.every": 2},
        {"clients.pool": 3, "clients.round": 2, "sync.every": 0},
        {"clients.pool": 3, "clients.round": 4, "sync.every": 3, "clients.keep_optimizer": True},
        {"model.client_norm": "batch", "clients.pool": 4, "clients.round": 2, "sync.tau": 0.3},
    ],
    ids=str,
)
def test_equals_a_loop_where_clients_keep_some_of_their_own(changes: dict, momentum: bool) -> None:
    compare(settings(**{"sync.own": "ema", "sync.momentum": momentum} | changes), steps=11)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clients.keep_optimizer": True, "sync.momentum": False},
        {"clients.pool": 4, "clients.round": 4, "sync.every": 3},
        {"clients.pool": 4, "clients.round": 4, "sync.every": 0, "sync.own": "ema"},
        {"model.client_norm": "batch", "contrast.both_views": True, "sync.average": "median"},
        {"clients.rich_share": 0.34, "clients.rich_batch_factor": 3, "sync.own": "ema", "clients.drop": 0.9},
        {"sync.every": 1, "clients.drop": 0.95, "clients.batch": 1},
    ],
    ids=str,
)
def test_equals_a_loop_where_clients_drop_out(changes: dict) -> None:
    config = settings(**{"clients.drop": 0.6} | changes)
    assert missing(config, 11)
    compare(config, steps=11)


def test_frozen_clients_drop_out_as_others_do() -> None:
    config = settings(**{"clients.drop": 0.7, "clients.pool": 4, "clients.round": 2})
    local, still = cohorts(config)[0], frozen(config)
    sizes = []
    for step in range(6):
        if step % 2 == 0:
            for cohort in (local, still):
                cohort.activate(pool_of_round(3, step // 2, 6, 4))
        ours, theirs = local.forward(), still.forward()
        torch.testing.assert_close(ours.query, theirs.query, atol=2e-5, rtol=1e-4)  # nobody has learned anything yet
        for name in ("clients", "sizes", "first", "shares"):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name))
        sizes.append(len(ours.clients))
    assert min(sizes) < 4
    again = frozen(config)
    again.load_state_dict(copy.deepcopy(still.state_dict()))
    assert np.array_equal(again.forward().clients, still.forward().clients)


def missing(config: Config, steps: int) -> list[int]:
    """Steps in which somebody is away."""
    local, _ = cohorts(config)
    found = []
    for step in range(steps):
        local.forward()
        if not local.present.all():
            found.append(step)
    return found


class WithPredictor(torch.nn.Module):
    """A client's network whose predictor is a part of its own."""

    def __init__(self, half: torch.nn.Module, channels: int) -> None:
        super().__init__()
        self.client, self.predictor = half, torch.nn.Conv2d(channels, channels, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.predictor(self.client(images))


@pytest.mark.parametrize("threshold", [1e-6, 0.018, 1e6])
@pytest.mark.parametrize("changes", [{"sync.every": 2}, {"clients.pool": 3, "clients.round": 2}], ids=str)
def test_equals_a_loop_where_clients_keep_their_predictors(
    changes: dict, threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build(settings().model, 3, 8, 3)
    torch.manual_seed(0)
    whole = WithPredictor(built.client, built.latent_shape[0])
    monkeypatch.setattr(sys.modules[__name__], "build", lambda *_: SimpleNamespace(client=copy.deepcopy(whole)))
    compare(settings(**{"sync.own": "predictor", "sync.threshold": threshold} | changes), steps=9)


def test_who_keeps_a_predictor_needs_one() -> None:
    with pytest.raises(SettingError, match=r"sync\.own=predictor: the clients hold no predictor"):
        cohorts(settings(**{"sync.own": "predictor"}))


def test_the_average_is_what_clients_are_to_be_handed() -> None:
    """Between an average and the next step clients still hold their own; the monitor sees the average."""
    plain, ema = (cohorts(settings(**{"sync.own": own}))[0] for own in ("none", "ema"))
    for cohort in (plain, ema):
        cohort.backward(torch.ones_like(cohort.forward().query) / 100, 0.5)
        cohort.synchronise()
    for name, tensor in plain.average().items():
        torch.testing.assert_close(ema.average()[name], tensor)
    weight = next(iter(ema.online.weights.values()))
    assert not torch.equal(weight[0], weight[1])
    own, average = weight.detach().clone(), plain.average()["stem.0.0.weight"]
    ema.forward()
    torch.testing.assert_close(weight.detach(), 0.7 * own + 0.3 * average)


RICH = {"clients.rich_share": 0.34, "clients.rich_batch_factor": 3}  # 2 of 6


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model.cut": 3, "contrast.both_views": True},
        {"model.client_norm": "batch"},
        {"clients.pool": 3, "clients.round": 4},
        {"sync.every": 1, "clients.batch": 1},
    ],
    ids=str,
)
def test_equals_a_loop_with_rich_and_poor_clients(changes: dict) -> None:
    compare(settings(**RICH, **changes))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("sync_momentum", [True, False])
def test_one_half_stands_for_all_where_they_are_averaged_every_step(batch: int, sync_momentum: bool) -> None:
    config = settings(**{"sync.every": 1, "clients.batch": batch, "model.cut": 3, "sync.momentum": sync_momentum})
    local, _ = cohorts(config)
    assert local.identical
    assert all(len(stack) == 1 for stack in local.online.weights.values())
    compare(config)


@pytest.mark.parametrize(
    "changes",
    [{"sync.every": 2}, {"clients.pool": 3, "clients.round": 2}, {"model.client_norm": "batch"}, RICH],
    ids=str,
)
def test_clients_that_may_differ_have_weights_of_their_own(changes: dict) -> None:
    local, _ = cohorts(settings(**{"sync.every": 1} | changes))
    assert not local.identical


def test_clients_differ_between_averages_and_agree_after() -> None:
    local, _ = cohorts(settings())
    local.backward(torch.randn_like(local.forward().query), 0.1)
    weight = next(iter(local.online.weights.values()))
    assert not torch.equal(weight[0], weight[1])
    local.synchronise()
    assert torch.equal(weight[0], weight[1])


def test_a_client_learns_from_its_own_gradient_alone() -> None:
    local, _ = cohorts(settings(**{"train.weight_decay": 0.0}))
    gradients = torch.zeros_like(local.forward().query)
    gradients[:, 4:6] = 1  # the third client's piece, batch 2
    before = {name: tensor.detach().clone() for name, tensor in local.online.weights.items()}
    local.backward(gradients, 0.1)
    for name, tensor in local.online.weights.items():
        moved = (tensor.detach() != before[name]).flatten(1).any(dim=1)
        assert moved.tolist() == [client == 2 for client in range(6)]


def test_memory_is_for_the_pool_alone_where_clients_keep_nothing() -> None:
    number, pool = 6, 2
    lean, _ = cohorts(settings(**{"clients.pool": pool, "clients.round": 2}))
    assert not lean.bank
    assert all(len(t) == pool for t in (lean.online.weights | lean.momentum.weights | lean.velocity).values())
    kept = {"clients.pool": pool, "clients.round": 2, "clients.keep_optimizer": True, "sync.momentum": False}
    full, _ = cohorts(settings(**kept))
    assert set(full.bank) == {"velocity", "momentum"}
    assert all(len(t) == number for stack in full.bank.values() for t in stack.values())


def frozen(config: Config) -> FrozenCohort:
    """With the same half and images as the cohorts above."""
    local, _ = cohorts(config)
    half = build(config.model, 3, 8, config.seed).client
    return FrozenCohort(half, config, local.views.images, local.sampler, local.mean, local.std, CPU)


def test_frozen_clients_use_the_statistics_that_their_half_came_with() -> None:
    """BatchNorm at a batch of 1: what is sent of an image does not depend on the others."""
    config = settings(**{"clients.frozen": True, "model.client_norm": "batch", "clients.batch": 1, "model.cut": 3})
    cohort = frozen(config)
    for module in cohort.half.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
    views = normalise(frozen(config).views.draw(cohort.pool), cohort.mean, cohort.std)
    sent = cohort.forward()
    for place in range(len(SIZES)):
        alone = cohort.half(views[0, place : place + 1])
        torch.testing.assert_close(sent.query[0, place], alone[0])


@pytest.mark.parametrize("changes", [{}, {"clients.pool": 3}, {"model.cut": 3}], ids=str)
def test_frozen_clients_send_what_clients_that_have_not_learned_do(changes: dict) -> None:
    config = settings(**changes)
    local, _ = cohorts(config)
    still = frozen(config)
    for _ in range(3):
        ours, theirs = local.forward(), still.forward()
        torch.testing.assert_close(ours.query, theirs.query, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(ours.key, theirs.key, atol=2e-5, rtol=1e-4)
        assert np.array_equal(ours.clients, theirs.clients)
        assert ours.learning
        assert not theirs.learning


@pytest.mark.parametrize("symmetric", [True, False])
def test_frozen_clients_receive_nothing_and_never_change(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(
        **{"clients.frozen": True, "model.head": "v1", "contrast.queue": 30, "contrast.symmetric": symmetric},
        **{"train.epochs": 3, "sync.every": 1, "clients.pool": 3, "clients.round": 2},
    )
    cohort = frozen(config)
    received: list[str] = []
    for name in ("backward", "synchronise", "load_state_dict"):
        monkeypatch.setattr(cohort, name, lambda *_, name=name: received.append(name))
    model = build(config.model, 3, 8, config.seed)
    server = Server(model.server, build_head("v1", model.features, 0), config, WIDTHS["v1"], CPU)
    start = copy.deepcopy(server.online.state_dict())
    before = {name: tensor.clone() for name, tensor in cohort.average().items()}
    trainer = Trainer(config, cohort, server, sum(SIZES))
    trainer.run()
    assert trainer.step == trainer.steps > 10
    assert not received
    assert all(torch.equal(tensor, before[name]) for name, tensor in cohort.average().items())
    assert any(not torch.equal(tensor, start[name]) for name, tensor in server.online.state_dict().items())


def test_frozen_clients_go_on_where_they_were() -> None:
    first, second = frozen(settings()), frozen(settings())
    first.forward()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert torch.equal(first.forward().query, second.forward().query)


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4", "topk"])
def test_latents_and_gradients_lose_what_their_codecs_lose(codec: str) -> None:
    changes = {"clients.number": 4, "clients.pool": None}
    full, coarse = (
        cohorts(settings(**changes, **{"traffic.latents": name, "traffic.gradients": name}))[0]
        for name in ("fp32", codec)
    )
    sent, kept = full.forward(), coarse.forward()
    for ours, theirs in ((kept.query, sent.query), (kept.key, sent.key)):
        assert torch.equal(ours, rounded(theirs, codec, 0.1))
        assert not torch.equal(ours, theirs)
    gradient = torch.randn_like(sent.query)
    full.backward(rounded(gradient, codec, 0.1), 0.1)  # straight-through: at the latents as they were
    coarse.backward(gradient, 0.1)
    for name, average in full.average().items():
        torch.testing.assert_close(coarse.average()[name], average, rtol=0, atol=0)


def test_backward_needs_a_forward() -> None:
    local, _ = cohorts(settings())
    latents = local.forward()
    local.backward(torch.zeros_like(latents.query), 0.1)
    with pytest.raises(RuntimeError, match="forward"):
        local.backward(torch.zeros_like(latents.query), 0.1)


@pytest.mark.parametrize(("own", "drop"), [("none", 0), ("ema", 0), ("ema", 0.6)])
@pytest.mark.parametrize("steps", [5, 6])  # in the middle of a round, and right after an average
def test_state_survives_saving(own: str, drop: float, steps: int) -> None:
    kept = {"clients.keep_optimizer": True, "sync.momentum": False, "sync.own": own, "clients.drop": drop}
    config = settings(**{"clients.pool": 3, "clients.round": 2} | kept)
    first, _ = cohorts(config)
    second, _ = cohorts(config)

    def advance(cohort: LocalCohort, start: int, stop: int) -> torch.Tensor:
        for step in range(start, stop):
            if step % 2 == 0:
                cohort.activate(pool_of_round(3, step // 2, 6, 3))
            latents = cohort.forward()
            cohort.backward(latents.key / latents.key.numel(), 0.3)
            if step % 2:
                cohort.synchronise()
        return latents.query

    for step in range(steps):
        advance(first, step, step + 1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert torch.equal(advance(first, steps, 9), advance(second, steps, 9))
