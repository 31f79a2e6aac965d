"""Latents that are used again: which, when, and that nothing else changes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mocosfl
from mocosfl.clients import FrozenCohort, Latents, LocalCohort
from mocosfl.config import CacheSettings, Config
from mocosfl.data.images import ImageSet
from mocosfl.data.partition import Partition
from mocosfl.data.sampler import ClientSampler
from mocosfl.errors import SettingError
from mocosfl.latent_cache import Ask, LatentStore, LossThreshold, RecallingCohort, UploadFirst, augmented_latents
from mocosfl.models import build
from mocosfl.run import Run
from mocosfl.trainer import Callback, Trainer

CPU = torch.device("cpu")
SIZES = (6, 9, 4, 7)  # images of each client


def settings(**changes: object) -> Config:
    base = {"model.width": 4, "clients.number": len(SIZES), "clients.batch": 2, "seed": 3, "train.epochs": 50}
    return Config().updated(base | changes)


def frozen(**changes: object) -> Config:
    return settings(**{"clients.frozen": True, "clients.init": "a run", "cache.views": 4} | changes)


def cohort(config: Config, sizes: tuple[int, ...] = SIZES) -> FrozenCohort | LocalCohort:
    pixels = np.random.default_rng(0).integers(0, 256, (sum(sizes), 3, 8, 8), dtype=np.uint8)
    held = Partition(np.random.default_rng(1).permutation(sum(sizes)), np.append(0, np.cumsum(sizes)))
    half = build(config.model, 3, 8, config.seed).client
    kind = FrozenCohort if config.clients.frozen else LocalCohort
    statistics = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
    return kind(half, config, ImageSet(pixels), ClientSampler(held, config.seed), *statistics, CPU)


def recalling(config: Config, sizes: tuple[int, ...] = SIZES) -> RecallingCohort:
    model = build(config.model, 3, 8, config.seed)
    return RecallingCohort(cohort(config, sizes), config, np.array(sizes), model.latent_shape, CPU)


def pieces(latents: Latents) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """Client, query and key of each image."""
    owner = np.repeat(latents.clients, latents.sizes).tolist()
    return list(zip(owner, latents.query[0], latents.key[0], strict=True))


def found(sent: torch.Tensor, one: torch.Tensor) -> int:
    """Where a latent is among those that were sent."""
    places = (sent == one).flatten(1).all(dim=1).nonzero().flatten().tolist()
    assert len(places) == 1
    return places[0]


def test_first_steps_are_those_of_clients_without_a_cache() -> None:
    config = frozen()
    ours, plain = recalling(config), cohort(config)
    for _ in range(9):
        one, two = ours.forward(), plain.forward()
        assert torch.equal(one.query, two.query)
        assert torch.equal(one.key, two.key)


def test_later_pairs_are_two_views_of_one_image_and_all_images_come_equally_often() -> None:
    ours = recalling(frozen(**{"clients.number": 2}), sizes=(6, 8))
    first = ours.schedule.uploads(10**6)
    assert first == 8  # twice through the 8 images of the larger client, 2 at a time
    sent: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    image: dict[int, list[int]] = {0: [], 1: []}
    partition = ours.cohort.sampler.partition  # type: ignore[attr-defined]
    order = ClientSampler(partition, ours.config.seed)
    for _ in range(first):
        latents = ours.forward()
        rows, _ = order.draw(np.arange(2), 2)
        for (client, query, key), row in zip(pieces(latents), rows.tolist(), strict=True):
            sent[client] += [query, key]
            image[client] += [row, row]
    assert ours.store.held.all()
    before = ours.cohort.sampler.drawn.copy()  # type: ignore[attr-defined]
    times: dict[int, int] = {}
    views: set[tuple[int, int, int]] = set()
    for _ in range(24 * 12):
        latents = ours.forward()
        assert not latents.learning
        assert latents.shares == (4,)
        for client, query, key in pieces(latents):
            stack = torch.stack(sent[client])
            one, two = found(stack, query), found(stack, key)
            assert one != two
            assert image[client][one] == image[client][two]
            times[image[client][one]] = times.get(image[client][one], 0) + 1
            views.add((client, one, two))
    assert np.array_equal(ours.cohort.sampler.drawn, before)  # type: ignore[attr-defined] # nobody was asked
    assert {times[row] for row in partition.client(0)} == {96}
    assert {times[row] for row in partition.client(1)} == {72}
    assert len([v for v in views if v[0] == 1]) == 8 * 4 * 3  # any two of the four, either way round


def test_small_clients_send_the_newest_views_again_while_large_ones_are_not_done() -> None:
    ours = recalling(frozen(**{"clients.number": 2, "clients.batch": 1, "cache.views": 2}), sizes=(2, 6))
    latents = [ours.forward() for _ in range(6)]
    assert ours.schedule.uploads(10**6) == 6
    newest = torch.cat([torch.stack([x.query[0, 0], x.key[0, 0]]) for x in latents[-2:]])
    for _ in range(8):
        client, query, key = pieces(ours.forward())[0]
        assert client == 0
        found(newest, query)
        found(newest, key)


def test_a_share_of_the_images_is_sent_anew_each_epoch() -> None:
    ours = recalling(frozen(**{"cache.views": 2, "cache.refresh": 0.25, "clients.number": 2}), sizes=(8, 8))
    for _ in range(4):
        ours.forward()
    before = ours.store.latents.clone()
    for _ in range(4):  # an epoch: 4 steps, of which one asks
        ours.forward()
    changed = (ours.store.latents != before).flatten(2).any(dim=2).sum(dim=1)
    assert changed.tolist().count(2) == 4
    assert changed.tolist().count(0) == 12
    assert ours.asked == {Ask.LEARN: 0, Ask.UPLOAD: 5, Ask.NOTHING: 3}


def test_images_whose_latents_never_came_are_left_out() -> None:
    class Away(FrozenCohort):
        def forward(self) -> Latents:
            latents = super().forward()
            keep = np.repeat(latents.clients, latents.sizes) != 2
            there = latents.clients != 2
            return Latents(
                latents.query[:, keep],
                latents.key[:, keep],
                latents.clients[there],
                latents.sizes[there],
                latents.first[there],
                (int(keep.sum()),),
                False,
            )

    ours = recalling(frozen(**{"cache.views": 2}))
    ours.cohort.__class__ = Away
    first = ours.schedule.uploads(10**6)
    for step in range(first + 5):
        if step == first - 3:
            ours.cohort.__class__ = FrozenCohort
        latents = ours.forward()
    assert ours.store.held[ours.store.base[2] :][: SIZES[2]].all()  # client 2 has 4 images, and sent all of them since
    assert latents.clients.tolist() == [0, 1, 2, 3]
    ours = recalling(frozen(**{"cache.views": 2}))
    ours.cohort.__class__ = Away
    for _ in range(first + 5):
        latents = ours.forward()
    assert latents.clients.tolist() == [0, 1, 3]
    assert latents.sizes.tolist() == [2, 2, 2]
    assert latents.query.abs().flatten(2).sum(dim=2).min() > 0


def test_clients_that_come_later_find_room() -> None:
    store = LatentStore(2, (1, 2, 2), 3, "fp32", CPU)
    store.make_room(np.array([2, 0, 3]))
    store.keep(np.array([4]), np.array([1]), torch.ones(1, 1, 2, 2))
    store.make_room(np.array([2, 4, 3]))
    assert store.base.tolist() == [0, 5, 2]
    assert store.latents.shape == (9, 2, 1, 2, 2)
    assert store.latents[4, 1].sum() == 4
    for view in (0, 1):
        store.keep(np.array([1, 5, 8]), np.full(3, view), torch.ones(3, 1, 2, 2))
    rows, starts, counts = store.ready
    assert rows.tolist() == [1, 5, 8]
    assert counts.tolist() == [1, 2, 0]
    assert [rows[starts[c] : starts[c] + counts[c]].tolist() for c in (0, 1)] == [[1], [5, 8]]


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "int4", "topk"])
def test_latents_are_kept_as_exactly_as_codecs_left_them(codec: str) -> None:
    config = frozen(**{"traffic.latents": codec, "cache.views": 2})
    ours = recalling(config)
    sent = torch.cat([torch.cat([x.query[0], x.key[0]]) for x in (ours.forward() for _ in range(5))])
    while ours.schedule.ask(ours.step) is not Ask.NOTHING:
        x = ours.forward()
        sent = torch.cat([sent, x.query[0], x.key[0]])
    recalled = ours.forward().query[0]
    off = (recalled[:, None] - sent).abs().flatten(2).amax(dim=2).amin(dim=1)
    assert off.max() <= (0 if codec in ("fp32", "bf16") else 2**-11 * sent.abs().max())
    assert ours.store.latents.element_size() == (4 if codec == "fp32" else 2)


@pytest.mark.parametrize("at", [3, 20], ids=["while latents come in", "after"])
def test_state_goes_on_where_it_was(at: int) -> None:
    config = frozen(**{"cache.noise": 0.2, "cache.refresh": 0.1})
    whole, other = recalling(config), recalling(config)
    for _ in range(at):
        whole.forward()
    other.store.load_state_dict(whole.apart()[1])
    other.load_state_dict(whole.state_dict())
    for _ in range(20):
        one, two = whole.forward(), other.forward()
        assert torch.equal(one.query, two.query)
        assert torch.equal(one.key, two.key)
        assert np.array_equal(one.first, two.first)


def test_a_run_that_needs_more_epochs_than_it_has_is_refused() -> None:
    with pytest.raises(SettingError, match=r"cache.views=8: to send them takes the clients 4 epochs.*train.epochs=3"):
        UploadFirst.of(frozen(**{"cache.views": 8, "train.epochs": 3, "clients.batch": 1}), np.array([5, 5, 5, 5]))
    assert UploadFirst.of(frozen(**{"cache.views": 8, "train.epochs": 4}), np.array([6] * 4)).uploads(99) == 12


def test_a_store_larger_than_the_memory_is_refused() -> None:
    store = LatentStore(32, (64, 32, 32), 2, "fp32", CPU)
    with pytest.raises(SettingError, match=r"cache.views=32: the latents of 20,000,000 images take 156250.0 GiB"):
        store.make_room(np.array([10**7, 10**7]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clients.frozen": False}, "cache.views=4: latents of clients that learn"),
        ({"cache.views": 3}, "cache.views=3: input should be a multiple of 2"),
        ({"clients.pool": 2}, "cache.views=4: needs all clients active; clients.pool=2 of 4"),
        ({"cache.views": 0, "cache.flip": 0.5}, "cache.flip=0.5: no latents are kept; set cache.views too"),
        ({"cache.views": 0, "cache.refresh": 0.5}, "cache.refresh=0.5: no latents are kept"),
        ({"traffic.loss_threshold": 0.1}, "traffic.loss_threshold=0.1: frozen clients learn in no step"),
        (
            {"clients.frozen": False, "cache.views": 0, "traffic.loss_threshold": 0.1, "contrast.both_views": True},
            "traffic.loss_threshold=0.1: accepted with contrast.both_views=False",
        ),
        (
            {"clients.frozen": False, "cache.views": 0, "traffic.loss_threshold": 0.1, "clients.pool": 3},
            "traffic.loss_threshold=0.1: needs all clients active",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        frozen(**changes)


# Augmentation of latents


def draws(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(n, np.int64), np.arange(n)


def test_latents_are_mirrored_and_shifted() -> None:
    latents = torch.randn(2, 400, 3, 5, 6)
    assert torch.equal(augmented_latents(latents, CacheSettings(), 0, *draws(400), 0), latents)
    flipped = augmented_latents(latents, CacheSettings(flip=0.5), 0, *draws(400), 0)
    mirrored = (flipped == latents.flip(-1)).flatten(2).all(dim=2)
    assert ((flipped == latents).flatten(2).all(dim=2) ^ mirrored).all()
    assert 0.4 < mirrored.float().mean() < 0.6
    assert 0.2 < (mirrored[0] & mirrored[1]).float().mean() < 0.3  # the views independently
    shifted = augmented_latents(latents, CacheSettings(crop=1), 0, *draws(400), 0)
    padded = torch.nn.functional.pad(latents.flatten(0, 1), (1, 1, 1, 1), mode="replicate").unflatten(0, (2, 400))
    ways = torch.stack([padded[..., y : y + 5, x : x + 6] for y in range(3) for x in range(3)])
    which = (ways == shifted).flatten(3).all(dim=3).float()
    assert torch.equal(which.sum(dim=0), torch.ones(2, 400))
    assert which.mean(dim=(1, 2)) == pytest.approx([1 / 9] * 9, abs=0.04)


def test_noise_is_in_proportion_to_each_latent_and_new_in_each_step() -> None:
    latents = torch.randn(2, 50, 4, 8, 8) * torch.rand(2, 50, 1, 1, 1)
    added = [augmented_latents(latents, CacheSettings(noise=0.3), 0, *draws(50), step) - latents for step in (0, 1)]
    size = latents.square().mean(dim=(2, 3, 4)).sqrt()
    ratio = added[0].square().mean(dim=(2, 3, 4)).sqrt() / size
    assert ratio.mean() == pytest.approx(0.3, rel=0.02)
    assert ratio.std() < 0.03
    assert abs(torch.corrcoef(torch.stack([added[0].flatten(), added[1].flatten()]))[0, 1]) < 0.03


# Clients that rest


def asks(threshold: float, losses: list[float], length: int = 2) -> list[str]:
    schedule = LossThreshold(threshold, length)
    said = []
    for epoch, loss in enumerate(losses):
        for step in (0, 1):
            said.append(schedule.ask(length * epoch + step).value)
            schedule.observe(length * epoch + step, torch.tensor(loss + (0.01 if step else -0.01)))
    assert said[::2] == said[1::2]
    return said[::2]


def test_clients_rest_while_the_loss_stands_still_and_learn_again_when_it_has_moved() -> None:
    losses = [5.0, 4.0, 3.95, 3.94, 3.93, 3.8, 3.79, 3.5, 3.0]
    expected = ["learn", "learn", "learn", "upload", "nothing", "nothing", "learn", "learn", "learn"]
    assert asks(0.1, losses) == expected
    assert asks(0.1, [5.0, 5.0, 5.0, 5.0, 5.3, 5.3]) == ["learn", "learn", "upload", "nothing", "nothing", "learn"]
    assert asks(9.0, losses)[2:] == ["upload"] + ["nothing"] * 6


def test_a_schedule_goes_on_where_it_was() -> None:
    whole, other = LossThreshold(0.1, 4), LossThreshold(0.1, 4)
    for step in range(6):
        whole.ask(step)
        whole.observe(step, torch.tensor(1.0 + step))
    other.load_state_dict(whole.state_dict())
    for step in range(6, 30):
        assert whole.ask(step) is other.ask(step)
        for schedule in (whole, other):
            schedule.observe(step, torch.tensor(7.0))
    assert whole.now is Ask.NOTHING


def test_resting_clients_neither_learn_nor_compute_and_are_recalled_as_they_last_were() -> None:
    config = settings(**{"traffic.loss_threshold": 9.0, "clients.number": 2, "sync.every": 2})
    ours = recalling(config, sizes=(8, 8))
    sent: list[torch.Tensor] = []
    weights = []
    for step in range(20):  # epochs of 4 steps: learn twice, upload, nothing, nothing
        latents = ours.forward()
        ours.schedule.observe(step, torch.tensor(5.0))
        assert latents.learning == (step < 8)
        if latents.learning:
            ours.backward(torch.ones_like(latents.query), 0.01)
        if step % 2 == 1:
            ours.synchronise()
        weights.append(torch.cat([t.flatten() for t in ours.average().values()]))
        if 8 <= step < 12:
            sent += list(torch.stack([latents.query[0], latents.key[0]], dim=1))
        if step >= 12:
            for _, query, key in pieces(latents):
                found(torch.stack(sent), torch.stack([query, key]))
    assert not torch.equal(weights[0], weights[7])
    assert all(torch.equal(weights[7], w) for w in weights[8:])
    assert ours.asked == {Ask.LEARN: 8, Ask.UPLOAD: 4, Ask.NOTHING: 8}
    assert (ours.cohort.sampler.drawn == 24).all()  # type: ignore[attr-defined]


# Whole runs


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, trainer: Trainer, metrics: dict[str, torch.Tensor]) -> None:
        trainer.stop = trainer.step == self.step


def digits(**changes: object) -> Config:
    base = {
        "data.source": "digits",
        "data.size": 8,
        "data.channels": 1,
        "data.images": 300,
        "model.width": 4,
        "model.head": "v1",
        "contrast.queue": 64,
        "clients.number": 10,
        "clients.batch": 3,
        "partition.kind": "iid",
        "sync.every": 4,
        "train.epochs": 5,
        "train.log_every": 1,
        "evaluation.every": 0,
        "evaluation.probe_epochs": 0,
    }
    return Config().updated(base | changes)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("half") / "run"
    mocosfl.train(digits(**{"train.epochs": 1}), folder)
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "at", "asked"),
    [
        ({"clients.frozen": True, "cache.views": 4, "cache.flip": 0.5}, 24, (0, 20, 28)),
        ({"traffic.loss_threshold": 5.0}, 41, (20, 10, 18)),
    ],
    ids=["cache", "rest"],
)
def test_a_resumed_run_equals_one_that_was_never_stopped(
    changes: dict[str, Any], at: int, asked: tuple[int, ...], half: str, tmp_path: Path
) -> None:
    config = digits(**changes | ({"clients.init": half} if "clients.frozen" in changes else {}))
    whole = mocosfl.train(config, tmp_path / "whole")
    assert not mocosfl.train(config, tmp_path / "cut", callbacks=(StopAt(at),)).finished
    kept = sorted(path.name for path in (tmp_path / "cut/checkpoints").glob("apart-*"))
    assert kept[-1] == f"apart-{min(at, asked[0] + asked[1]):09d}.pt"
    resumed = mocosfl.train(config, tmp_path / "cut", resume=True)
    for one, two in zip(whole.encoder.state_dict().values(), resumed.encoder.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    assert tuple(whole.metrics["asked"].values()) == asked
    assert whole.metrics["asked"] == resumed.metrics["asked"]


def test_a_checkpoint_whose_latents_are_damaged_falls_back_to_the_one_before(half: str, tmp_path: Path) -> None:
    config = digits(**{"clients.frozen": True, "cache.views": 4, "clients.init": half, "train.checkpoint_every": 8})
    assert not mocosfl.train(config, tmp_path / "run", callbacks=(StopAt(12),)).finished
    latest = tmp_path / "run/checkpoints/apart-000000012.pt"
    latest.write_bytes(latest.read_bytes()[:1000])
    assert mocosfl.train(config, tmp_path / "run", resume=True).finished
    assert (tmp_path / "run/checkpoints/step-000000012.damaged").exists()
    whole = mocosfl.train(config, tmp_path / "whole")
    assert (tmp_path / "whole/encoder.safetensors").read_bytes() == (tmp_path / "run/encoder.safetensors").read_bytes()
    assert whole.finished


def kept(path: Path, numbers: list[int]) -> Run:
    """A run folder with checkpoints after these steps, each with latents of its own beside it."""
    run = Run.create(path, frozen())
    run.checkpoints.mkdir()
    for number in numbers:
        save(run, number, number)
    return run


def save(run: Run, step: int, content: int) -> None:
    run.save_checkpoint(step, {"step": step}, (step, {"latents": torch.full((3,), content)}))


def loaded(path: Path) -> tuple[int, list[int]]:
    state = Run.open(path).load_checkpoint(lambda text: None)
    assert state is not None
    return state["step"], state["apart"]["latents"].tolist()


def test_damaged_latents_are_written_again_and_those_of_kept_checkpoints_stay(tmp_path: Path) -> None:
    run = kept(tmp_path / "run", [40, 50, 100])
    names = sorted(path.name for path in run.checkpoints.iterdir())
    assert names == ["apart-000000050.pt", "apart-000000100.pt", "step-000000050.pt", "step-000000100.pt"]
    (run.checkpoints / "apart-000000100.pt").write_bytes(b"damaged")
    again = Run.open(tmp_path / "run")
    assert again.load_checkpoint(lambda text: None)["step"] == 50  # type: ignore[index]
    save(again, 60, 6)
    (run.checkpoints / "step-000000060.pt").write_bytes(b"damaged")
    assert loaded(tmp_path / "run") == (50, [50] * 3)
    again = Run.open(tmp_path / "run")
    again.load_checkpoint(lambda text: None)
    save(again, 100, 7)  # on another course than the first time
    assert loaded(tmp_path / "run") == (100, [7] * 3)
