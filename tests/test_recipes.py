import numpy as np
import pytest

from mocosfl.data.augment import policy_of
from mocosfl.data.partition import partition_in_two
from mocosfl.errors import SettingError
from mocosfl.models import build
from mocosfl.models.heads import WIDTHS
from mocosfl.recipes import RECIPES, recipe

SIZES = {"digits": 8}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds(name: str) -> None:
    config = recipe(name)
    assert config.recipe == name
    size = SIZES.get(config.data.source, 32)
    model = build(config.model, config.data.channels, size, config.seed)
    assert model.features == 8 * config.model.width
    assert config.model.head in WIDTHS
    policy_of(config.augment)
    assert RECIPES[name].time
    assert RECIPES[name].result


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


def test_iid_recipes() -> None:
    assert recipe("cifar10-iid-100").partition.kind == "iid"


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(SettingError, match="unknown recipe cifar10-noniid-10; did you mean cifar10-noniid-100"):
        recipe("cifar10-noniid-10")
    with pytest.raises(SettingError, match="there are digits, cifar10-small"):
        recipe("zzz")


@pytest.mark.parametrize(("number", "pool", "rich"), [(100, 100, 20), (200, 100, 20), (500, 100, 20)])
def test_rich_and_poor_clients(number: int, pool: int, rich: int) -> None:
    """A fifth of the clients, with half of the images and four times the batch: all pass over theirs equally often."""
    config = recipe(f"cifar10-hetero-{number}")
    assert (config.pool, config.pool_rich, config.rich) == (pool, rich, number // 5)
    assert sorted(set(config.batches.tolist())) == [1, 4]
    labels = np.random.default_rng(0).integers(0, 10, 20_000)
    share = config.clients.rich_data_share
    numbers = (number - config.rich, config.rich)
    held = partition_in_two(config.partition, numbers, share, np.arange(20_000), labels, 10, 0, (1, 4))
    passes = held.sizes / np.array([config.batch_of(client) for client in range(number)])
    assert passes.min() > 0.9 * passes.mean()
    assert passes.max() < 1.1 * passes.mean()
    assert ((held.counts(labels, 10) > 0).sum(1) == 2).all()
