import re

import numpy as np
import pytest
import torch

from mocosfl import published
from mocosfl.baselines import METHODS, baseline
from mocosfl.cli import main
from mocosfl.config import by_name
from mocosfl.data.augment import policy_of
from mocosfl.data.partition import partition_in_two
from mocosfl.errors import SettingError
from mocosfl.models import build
from mocosfl.models.heads import WIDTHS
from mocosfl.recipes import RECIPES, recipe

BUILT = list({recipe(name).model: name for name in reversed(RECIPES)}.values())
"""One recipe of each model."""


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_its_name(name: str) -> None:
    assert recipe(name).recipe == name
    assert RECIPES[name].time
    assert RECIPES[name].result


@pytest.mark.parametrize("name", BUILT)
def test_every_model_of_a_recipe_builds(name: str) -> None:
    config = recipe(name)
    with torch.device("meta"):
        model = build(config.model, config.data.channels, config.data.size, config.seed)
    assert model.features >= 8 * config.model.width
    assert config.model.head in WIDTHS
    policy_of(config.augment)


@pytest.mark.parametrize(
    ("name", "classes", "pool", "cut"),
    [
        ("cifar10-noniid-1000", 2, 100, 1),
        ("cifar10-noniid-200", 2, 100, 1),
        ("cifar10-noniid-100", 2, 100, 1),
        ("cifar10-noniid-1000-cut3", 2, 100, 3),
        ("cifar100-noniid-100", 20, 100, 1),
    ],
)
def test_the_papers_settings(name: str, classes: int, pool: int, cut: int) -> None:
    config = recipe(name)
    assert (config.model.backbone, config.model.width, config.model.cut) == ("resnet18", 64, cut)
    assert (config.model.client_norm, config.model.server_norm, config.model.head) == ("group", "group", "v2")
    assert config.partition.classes_per_client == classes
    assert (config.pool, config.clients.batch, config.sync.every) == (pool, 1, 50)
    assert (config.train.lr, config.train.momentum, config.train.weight_decay) == (0.06, 0.9, 5e-4)
    assert (config.contrast.queue, config.contrast.temperature, config.contrast.momentum) == (6000, 0.1, 0.99)
    assert config.contrast.symmetric
    assert not config.contrast.both_views
    assert config.clients.lr_scale == "batch_mean"
    assert not config.sync.momentum
    assert config.clients.round == 50_000 // config.clients.number  # a pass over a client's images
    assert config.train.epochs == 200


@pytest.mark.parametrize("cut", [1, 3])
def test_taressfl(cut: int) -> None:
    config = recipe(f"taressfl-cut{cut}")
    assert (config.model.width, config.model.cut, config.model.bottleneck) == (64, cut, "C4S2")
    assert (config.clients.number, config.clients.frozen, config.train.lr) == (100, True, 0.001)
    assert (config.pretrain.source, config.pretrain.batch, config.pretrain.epochs) == ("cifar100", 256, 200)
    assert (config.ressfl.weight, config.ressfl.blocks, config.ressfl.channels, config.ressfl.lr) == (2, 4, 64, 1e-3)


@pytest.mark.parametrize(
    ("name", "batch", "every"),
    [
        ("cifar10-noniid-5", 20, 50),
        ("cifar10-noniid-20-cut3", 5, 50),
        ("cifar10-noniid-5-cut3-sync1", 20, 500),
        ("cifar10-noniid-20-sync5", 5, 100),
        ("cifar100-noniid-5", 20, 50),
    ],
)
def test_few_clients(name: str, batch: int, every: int) -> None:
    config = recipe(name)
    assert (config.clients.batch, config.step_images, config.sync.every) == (batch, 100, every)
    assert config.pool == config.clients.number
    assert 50_000 % (config.step_images * config.sync.every) == 0  # whole averages in a pass


def test_every_row_of_the_paper_has_a_recipe() -> None:
    rows = [row for group in published.GROUPS for row in group.rows]
    assert {row.recipe for row in rows} <= RECIPES.keys()
    assert published.elsewhere() == ["digits", "cifar10-small", "taressfl-small", "cifar10-device-cache"]


def test_every_baseline_has_a_recipe() -> None:
    for method in METHODS:
        for source in ("cifar10", "cifar100"):
            for number in (5, 20, 100):
                assert recipe(f"{method}-{source}-{number}") == baseline(method, source, number)


@pytest.mark.parametrize("batch", [8, 16, 32, 64])
def test_small_batches_see_as_many_images_between_two_averages(batch: int) -> None:
    usual, small = baseline("flbyol", "cifar10", 5), recipe(f"flbyol-cifar10-5-batch{batch}")
    assert small.clients.batch * small.sync.every == usual.clients.batch * usual.sync.every
    names = ["recipe", "clients.batch", "sync.every"]
    assert small == usual.updated({name: by_name(small)[name] for name in names})


def test_rows_are_of_the_settings_that_they_name() -> None:
    cuts = {"MocoSFL-1": 1, "MocoSFL-3": 3, "MocoSFL-5": 5}
    sets = {"CIFAR-10": "cifar10", "CIFAR-100": "cifar100", "ImageNet-12": "imagenet12"}
    checked = 0
    for group in published.GROUPS:
        for row in group.rows:
            words = row.setting.split(", ")
            config = recipe(row.recipe)
            for word in words:
                number = re.fullmatch(r"([\d,]+) clients", word)
                facts = {
                    config.model.cut == cuts.get(word, config.model.cut),
                    config.data.source == sets.get(word, config.data.source),
                    (config.partition.kind == "iid")
                    == {"IID": True, "non-IID": False}.get(word, config.partition.kind == "iid"),
                    number is None or config.clients.number == int(number[1].replace(",", "")),
                }
                assert facts == {True}, (row, word)
                checked += word in cuts or word in sets or number is not None
    assert checked > 150


def test_what_the_paper_reports() -> None:
    """Cells of each table, as they are printed there."""
    cells = {(group.name, row.setting): row.published for group in published.GROUPS for row in group.rows}
    for key, value in {
        ("table-1", "MocoSFL-3, 1,000 clients"): "5,057.9",
        ("table-2", "FL-BYOL, CIFAR-100, 5 clients"): "61.78",
        ("table-2", "MocoSFL-1, CIFAR-10, 20 clients"): "85.84",
        ("table-3", "MocoSFL-1, CIFAR-10, non-IID, 1,000 clients"): "86.46",
        ("table-3", "MocoSFL-3, CIFAR-100, IID, 200 clients"): "58.30",
        ("table-3", "MocoSFL-3, ImageNet-12, non-IID, 100 clients"): "92.60",
        ("table-4", "MocoSFL-3, 1 % of the target's images"): "83.13 ± 2.40; MSE 0.039 ± 0.002",
        ("figure-5", "MocoSFL-1, 5 clients, averaged once a pass"): None,
    }.items():
        assert cells[key] == value


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "table-2"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"cifar10-noniid-20-cut3 .*85.32 .*not run", text)
    assert main(["recipes", "cifar10-noniid-5-cut3-sync1"]) == 0
    text = capsys.readouterr().out
    assert "sync.every: 500\n" in text
    assert "figure-5" in text
    assert "not known to us" in text
    assert main(["recipes", "taressfl-cut1"]) == 0
    assert "mocosfl pretrain taressfl-cut1" in capsys.readouterr().out
    assert main(["recipes", "all"]) == 0
    assert capsys.readouterr().out.split() == list(RECIPES)
    assert main(["recipes", "tabel-2"]) == 1
    assert "tabel-2: did you mean table-2?" in capsys.readouterr().err


def test_iid_recipes() -> None:
    assert recipe("cifar10-iid-100").partition.kind == "iid"


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(SettingError, match="unknown recipe cifar10-noniid-10; did you mean cifar10-noniid-100"):
        recipe("cifar10-noniid-10")
    with pytest.raises(SettingError, match="there are digits, cifar10-small"):
        recipe("zzz")


@pytest.mark.parametrize(
    ("number", "factor", "rich", "images", "every"),
    [(100, 16, 20, 400, 12), (200, 4, 100, 250, 20), (500, 16, 100, 400, 12)],
)
def test_rich_and_poor_clients(number: int, factor: int, rich: int, images: int, every: int) -> None:
    """As in the release; all clients pass over their images equally often."""
    config = recipe(f"cifar10-hetero-{number}")
    assert (config.pool, config.pool_rich, config.rich) == (100, 100 * rich // number, rich)
    assert (config.step_images, config.sync.every) == (images, every)
    assert sorted(set(config.batches.tolist())) == [1, factor]
    labels = np.random.default_rng(0).integers(0, 10, 50_000)
    share = config.clients.rich_data_share
    numbers = (number - config.rich, config.rich)
    held = partition_in_two(config.partition, numbers, share, np.arange(50_000), labels, 10, 0, (1, factor))
    passes = held.sizes / np.array([config.batch_of(client) for client in range(number)])
    assert passes.min() > 0.9 * passes.mean()
    assert passes.max() < 1.1 * passes.mean()
    assert ((held.counts(labels, 10) > 0).sum(1) == 2).all()
