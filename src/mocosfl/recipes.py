"""Named configurations. A recipe is a function that returns a whole configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from mocosfl.config import (
    AugmentSettings,
    ClientSettings,
    Config,
    ContrastSettings,
    DataSettings,
    EvaluationSettings,
    ModelSettings,
    PartitionSettings,
    PretrainSettings,
    ResSFLSettings,
    SyncSettings,
    TrainSettings,
)
from mocosfl.errors import SettingError, nearest


@dataclass(frozen=True)
class Recipe:
    """A named configuration and what to expect of it.

    Attributes:
        make: returns the configuration.
        time: how long it takes, and on what.
        result: what it reaches, and whether that is ours or published.
    """

    make: Callable[[], Config]
    time: str
    result: str


def digits() -> Config:
    """The demo: scikit-learn's 1,797 handwritten digits, 100 clients with two kinds of digits each, batch 1."""
    return Config(
        recipe="digits",
        data=DataSettings(source="digits", size=8, channels=1, held_out=0.1),
        partition=PartitionSettings(kind="classes", classes_per_client=2),
        augment=AugmentSettings(crop_scale=(0.4, 1.0), blur_p=0, flip_p=0, grey_p=0),
        model=ModelSettings(width=16, server_norm="batch", head="small"),
        contrast=ContrastSettings(queue=1024, temperature=0.2, symmetric=False),
        clients=ClientSettings(number=100, batch=1),
        sync=SyncSettings(every=10),
        train=TrainSettings(epochs=150, warmup=0.03),
        evaluation=EvaluationSettings(every=10, k=20),
    )


def cifar10_small() -> Config:
    """For a CPU: 10,000 images of CIFAR-10, 100 clients with 2 classes each, batch 1, ResNet-18 of width 16."""
    return Config(
        recipe="cifar10-small",
        data=DataSettings(source="cifar10", size=32, images=10_000, held_out=0.05),
        augment=AugmentSettings(crop_scale=(0.2, 1.0), blur_p=0),
        model=ModelSettings(width=16, server_norm="batch"),
        contrast=ContrastSettings(symmetric=False),
        clients=ClientSettings(number=100, batch=1),
        sync=SyncSettings(every=10),
        train=TrainSettings(epochs=38, warmup=0.03, precision="bf16"),
        evaluation=EvaluationSettings(every=5, monitor_bank=2000),
    )


def taressfl_small() -> Config:
    """For a CPU: TAResSFL before `cifar10-small`, with 8,000 images of CIFAR-100 as the server's own."""
    return cifar10_small().updated(
        {
            "recipe": "taressfl-small",
            "model.bottleneck": "C4S2",
            "clients.frozen": True,
            "pretrain": PretrainSettings(source="cifar100", images=8_000, epochs=20, batch=128).model_dump(),
            "ressfl": ResSFLSettings(blocks=2, channels=32).model_dump(),
        }
    )


def published(source: str, number: int, kind: str, cut: int = 1) -> Config:
    """The paper's settings for 32x32 images: batch 1, pools of 100, an average every 50 steps.

    Different from the authors' release only where that is at fault: all learning rates follow one cosine in steps
    (theirs oscillates on the clients), the average counts who took part, and nothing is chosen on test images.

    Args:
        source: cifar10 or cifar100.
        number: N, clients.
        kind: iid, or noniid for 2 classes a client (20 of CIFAR-100).
        cut: 1 for MocoSFL-1, 3 for MocoSFL-3.
    """
    name = f"{source}-{kind}-{number}" + ("" if cut == 1 else f"-cut{cut}")
    return Config(
        recipe=name,
        data=DataSettings(source=source, size=32, held_out=0.02),
        partition=PartitionSettings(
            kind="iid" if kind == "iid" else "classes", classes_per_client=2 if source == "cifar10" else 20
        ),
        model=ModelSettings(cut=cut),
        clients=ClientSettings(
            number=number,
            pool=None if number <= 100 else 100,
            round=50_000 // number,
            batch=1,
            keep_optimizer=True,
        ),
        sync=SyncSettings(every=50, momentum=False),
        train=TrainSettings(epochs=200, log_every=50, checkpoint_every=2000),
        evaluation=EvaluationSettings(every=5),
    )


def taressfl(cut: int) -> Config:
    """TAResSFL as published: C4S2, CIFAR-100 as the server's own images, then 100 frozen clients.

    Other than published, the SSIM that costs nothing is 0.3 instead of 0.6 (docs/protect.md).
    """
    return published("cifar10", 100, "noniid", cut).updated(
        {
            "recipe": f"taressfl-cut{cut}",
            "model.bottleneck": "C4S2",
            "clients.frozen": True,
            "train.lr": 0.001,
            "pretrain.source": "cifar100",
        }
    )


def device() -> Config:
    """The paper's device: 1,000 clients with 50 images each, frozen halves of three convolutions, C4S2 (TAResSFL).

    No image is held out, so that each client has its 50; there is no kNN monitor then.
    """
    return published("cifar10", 1000, "noniid", 3).updated(
        {
            "recipe": "cifar10-device",
            "data.held_out": 0.0,
            "model.bottleneck": "C4S2",
            "clients.frozen": True,
            "train.lr": 0.001,
            "pretrain.source": "cifar100",
        }
    )


def device_cache() -> Config:
    """`cifar10-device` with clients that send 32 views of each image once, in 8 bits a number: 16 of 200 epochs.

    All clients send in a step, as those that are kept are drawn from all: 1,000 images a step instead of 100.
    """
    return device().updated(
        {
            "recipe": "cifar10-device-cache",
            "clients.pool": None,
            "clients.round": None,
            "traffic.latents": "int8",
            "cache.views": 32,
        }
    )


def heterogeneous(number: int, rich: float = 0.2, factor: int = 4, data: float = 0.5) -> Config:
    """`cifar10-noniid-NUMBER` with rich and poor clients, as in "A_B|C|D_E" of the authors' release.

    Its numbers are not known to us. With these all clients pass over their images equally often: a rich one holds
    data / rich : (1 - data) / (1 - rich) = 4 times as many as a poor one, and uses a batch 4 times as large.

    Args:
        number: N, clients.
        rich: A, the share of the clients that are rich.
        factor: C, how many times larger their batch is.
        data: D, the share of the images that they hold together.
    """
    return published("cifar10", number, "noniid").updated(
        {
            "recipe": f"cifar10-hetero-{number}",
            "clients.rich_share": rich,
            "clients.rich_batch_factor": factor,
            "clients.rich_data_share": data,
            "clients.round": None,  # a pass over a client's images, with the larger batches
        }
    )


def _published(source: str, number: int, kind: str, cut: int, probe: float) -> Recipe:
    return Recipe(lambda: published(source, number, kind, cut), "needs a GPU", f"{probe:.2f} % *")


# Linear probe of the paper's table 1 (ResNet-18), by (source, kind, cut) for 100, 200 and 1,000 clients.
_TABLE_1 = {
    ("cifar10", "iid", 1): (87.29, 87.38, 87.51),
    ("cifar10", "noniid", 1): (87.71, 87.39, 86.46),
    ("cifar10", "iid", 3): (87.29, 87.15, 87.25),
    ("cifar10", "noniid", 3): (87.10, 85.22, 84.75),
    ("cifar100", "iid", 1): (58.91, 59.15, 58.85),
    ("cifar100", "noniid", 1): (59.22, 58.90, 56.75),
}

RECIPES: dict[str, Recipe] = {
    "digits": Recipe(digits, "2 min (2 cores)", "97.5 %"),
    "cifar10-small": Recipe(cifar10_small, "14 min (2 cores)", "57.1 %"),
    "taressfl-small": Recipe(taressfl_small, "19 min (2 cores)", "50.4 %"),
    "taressfl-cut1": Recipe(lambda: taressfl(1), "needs a GPU", "not run"),
    "taressfl-cut3": Recipe(lambda: taressfl(3), "needs a GPU", "not run"),
    "cifar10-device": Recipe(device, "needs a GPU", "not run"),
    "cifar10-device-cache": Recipe(device_cache, "needs a GPU", "not run"),
}
for _number in (100, 200, 500):
    RECIPES[f"cifar10-hetero-{_number}"] = Recipe(partial(heterogeneous, _number), "needs a GPU", "not run")
for (_source, _kind, _cut), _probes in _TABLE_1.items():
    for _number, _probe in zip((100, 200, 1000), _probes, strict=True):
        _recipe = _published(_source, _number, _kind, _cut, _probe)
        RECIPES[_recipe.make().recipe] = _recipe


def recipe(name: str) -> Config:
    """The configuration of a recipe.

    Raises:
        SettingError: there is none of that name; names the nearest.
    """
    if name not in RECIPES:
        raise SettingError(f"unknown recipe {name}; {nearest(name, RECIPES) or 'there are ' + ', '.join(RECIPES)}")
    return RECIPES[name].make()
