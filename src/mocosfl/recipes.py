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
        result: the linear probe that it reached here; what the paper reports is in ``mocosfl.published``.
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


CLASSES = {"cifar10": 2, "cifar100": 20, "imagenet12": 2}
"""Classes of a client in the paper's non-IID case, by its data sets."""
IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "imagenet12": 12_370}
"""Their training images; of ImageNet-12 those of the authors' copy, which only say how often to average."""


def name_of(
    source: str, number: int, kind: str, cut: int = 1, averages: int | None = None, backbone: str = "resnet18"
) -> str:
    """What the recipe of ``published`` with these arguments is called, such as cifar10-noniid-5-cut3-sync1."""
    parts = [f"{source}-{kind}-{number}", *([backbone] if backbone != "resnet18" else [])]
    parts += [*([f"cut{cut}"] if cut != 1 else []), *([f"sync{averages}"] if averages is not None else [])]
    return "-".join(parts)


def published(
    source: str, number: int, kind: str, cut: int = 1, averages: int | None = None, backbone: str = "resnet18"
) -> Config:
    """The paper's settings: 100 images a step, from pools of 100 clients where there are more.

    Different from the authors' release only where that is at fault: all learning rates follow one cosine in steps
    (theirs oscillates on the clients), the average counts who took part, and nothing is chosen on test images.

    Args:
        source: cifar10, cifar100 or imagenet12.
        number: N, clients. They have a batch of 100 / N, or 1 where they are 100 or more.
        kind: iid, or noniid for 2 classes a client (20 of CIFAR-100).
        cut: 1 for MocoSFL-1, 3 for MocoSFL-3.
        averages: averages in a pass over a client's images. Unset: 1,000 / (N * batch), which is one every 50 steps
            with 50,000 images.
        backbone: as ``model.backbone``.
    """
    batch, images = max(1, 100 // number), IMAGES[source]
    a_pass = images // (number * batch)  # steps
    every = images // 1000 if averages is None else a_pass // averages
    return Config(
        recipe=name_of(source, number, kind, cut, averages, backbone),
        data=DataSettings(source=source, size=224 if source == "imagenet12" else 32, held_out=0.02),
        partition=PartitionSettings(kind="iid" if kind == "iid" else "classes", classes_per_client=CLASSES[source]),
        model=ModelSettings(cut=cut),
        clients=ClientSettings(
            number=number,
            pool=None if number <= 100 else 100,
            round=None if source == "imagenet12" else a_pass,
            batch=batch,
            keep_optimizer=True,
        ),
        sync=SyncSettings(every=every, momentum=False),
        train=TrainSettings(epochs=200, log_every=50, checkpoint_every=2000),
        evaluation=EvaluationSettings(every=5),
    ).updated({"model.backbone": backbone})


def taressfl(cut: int, percent: float = 0) -> Config:
    """TAResSFL as published: C4S2, CIFAR-100 as the server's own images, then 100 frozen clients.

    Other than published, the SSIM that costs nothing is 0.3 instead of 0.6 (docs/protect.md).

    Args:
        cut: 1 or 3.
        percent: of the clients' images, which the server pre-trains on too: 0, 0.5 or 1.
    """
    return published("cifar10", 100, "noniid", cut).updated(
        {
            "recipe": f"taressfl-cut{cut}" + (f"-target{percent:g}" if percent else ""),
            "pretrain.target_share": percent / 100,
            "model.bottleneck": "C4S2",
            "clients.frozen": True,
            "train.lr": 0.001,
            "pretrain.source": "cifar100",
        }
    )


def device(cut: int = 3) -> Config:
    """The paper's device: 1,000 clients with 50 images each, frozen halves of three convolutions, C4S2 (TAResSFL).

    No image is held out, so that each client has its 50; there is no kNN monitor then.
    """
    return published("cifar10", 1000, "noniid", cut).updated(
        {
            "recipe": "cifar10-device" + ("" if cut == 3 else f"-cut{cut}"),
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


RICH = {100: (0.2, 16, 0.8), 200: (0.5, 4, 0.8), 500: (0.2, 16, 0.8)}
"""The presets of the authors' release, "A_B|C|D_E", by number of clients: A, C and D."""


def heterogeneous(number: int, rich: float, factor: int, data: float) -> Config:
    """`cifar10-noniid-NUMBER` with rich and poor clients, as in "A_B|C|D_E" of the authors' release.

    Averages are as many in a pass as where all clients are alike: 1,000 / (N * batch).

    Args:
        number: N, clients.
        rich: A, the share of the clients that are rich.
        factor: C, how many times larger their batch is.
        data: D, the share of the images that they hold together. All clients pass over their images equally often
            where data / rich = factor * (1 - data) / (1 - rich), as it is with the presets (``RICH``).
    """
    alike = published("cifar10", number, "noniid")
    poor = round((1 - data) * IMAGES["cifar10"] / ((1 - rich) * number * alike.clients.batch))  # steps of a pass
    averages = max(1, 1000 // (number * alike.clients.batch))
    return alike.updated(
        {
            "recipe": f"cifar10-hetero-{number}",
            "clients.rich_share": rich,
            "clients.rich_batch_factor": factor,
            "clients.rich_data_share": data,
            "clients.round": None,  # a pass over a client's images, with the larger batches
            "sync.every": max(1, poor // averages),
        }
    )


ARCHITECTURES: dict[str, dict[str, float]] = {
    "resnet34": {},
    "resnet50": {},
    "resnet101": {},
    "resnet152": {},
    "vgg11": {},
    "vgg13": {"model.cut": 2, "train.lr": 0.02},
    "mobilenetv2": {"model.cut": 3, "train.lr": 0.03},
}
"""Backbones of the paper and its release beside ResNet-18, and with which settings the release runs them: cut after
its second layer, which is a block of MobileNetV2."""


def architecture(backbone: str) -> Config:
    """`cifar10-noniid-100` with another backbone, which keeps its name whatever the cut."""
    config = published("cifar10", 100, "noniid", backbone=backbone)
    return config.updated(ARCHITECTURES[backbone])


ABLATIONS: dict[str, dict[str, object]] = {
    "own-queues": {"contrast.feature_sharing": False},
    "one-by-one": {"contrast.concatenate": False},
    "cut3-aligned": {"model.cut": 3, "sync.momentum": True},
    "mocov3": {"contrast.objective": "mocov3", "model.head": "large"},
    "byol": {"contrast.objective": "byol", "model.head": "large"},
    "simclr": {"contrast.objective": "simclr", "contrast.both_views": True},
}
"""What is taken away from `cifar10-noniid-100`, or exchanged in it, one thing at a time; by the end of the name."""


def ablation(name: str) -> Config:
    """`cifar10-noniid-100` with one thing changed; see ``ABLATIONS``."""
    config = published("cifar10", 100, "noniid")
    return config.updated({"recipe": f"{config.recipe}-{name}"} | ABLATIONS[name])


def _of_the_paper() -> dict[str, Callable[[], Config]]:
    """Recipes of the paper's tables and figures (``mocosfl.published`` says which belong to which)."""
    wanted: list[tuple[str, int, str, int, int | None, str]] = []
    for source in CLASSES:  # table 3
        for cut in (1, 3):
            for kind in ("iid", "noniid"):
                wanted += [(source, number, kind, cut, None, "resnet18") for number in (100, 200, 1000)]
    for source in ("cifar10", "cifar100"):  # table 2
        wanted += [(source, number, "noniid", cut, None, "resnet18") for number in (5, 20) for cut in (1, 3)]
    for cut, numbers in ((1, (5, 20)), (3, (5, 20)), (5, (5,))):  # figures 3 and 5
        wanted += [("cifar10", n, "noniid", cut, averages, "resnet18") for n in numbers for averages in (1, 5, None)]
    wanted.append(("cifar100", 5, "noniid", 1, None, "resnet50"))  # appendix B.5
    found: dict[str, Callable[[], Config]] = {
        name_of(*arguments): partial(published, *arguments) for arguments in wanted
    }
    for cut in (1, 3):  # table 4
        for percent in (0, 0.5, 1):
            found[f"taressfl-cut{cut}" + (f"-target{percent:g}" if percent else "")] = partial(taressfl, cut, percent)
    for backbone in ARCHITECTURES:
        found[name_of("cifar10", 100, "noniid", backbone=backbone)] = partial(architecture, backbone)
    for name in ABLATIONS:
        found[f"cifar10-noniid-100-{name}"] = partial(ablation, name)
    for number, preset in RICH.items():
        found[f"cifar10-hetero-{number}"] = partial(heterogeneous, number, *preset)
    return found | {"cifar10-device": device, "cifar10-device-cut1": partial(device, 1)}


def _baselines() -> dict[str, Callable[[], Config]]:
    """What MocoSFL is compared with (``mocosfl.baselines``): whole networks on the clients, and one on all images."""

    def make(function: str, *arguments: str | int) -> Config:
        from mocosfl import baselines  # needs PyTorch, which a list of names does not

        return getattr(baselines, function)(*arguments)

    def with_batch(method: str, batch: int) -> Config:
        """As many images between two averages as with the usual batch."""
        usual = make("baseline", method, "cifar10", 5)
        every = usual.sync.every * usual.clients.batch // batch
        name = f"{method}-cifar10-5-batch{batch}"
        return usual.updated({"recipe": name, "clients.batch": batch, "sync.every": every})

    sources = ("cifar10", "cifar100")
    found: dict[str, Callable[[], Config]] = {
        f"{method}-{source}-{number}": partial(make, "baseline", method, source, number)
        for method in ("flmoco", "flsimclr", "flbyol", "fedu", "fedema")
        for source in sources
        for number in (5, 20, 100)
    }
    for method in ("flmoco", "flbyol"):  # figure 1
        for batch in (8, 16, 32, 64):
            found[f"{method}-cifar10-5-batch{batch}"] = partial(with_batch, method, batch)
    return found | {f"central-{source}": partial(make, "central", source) for source in sources}


RECIPES: dict[str, Recipe] = {
    "digits": Recipe(digits, "2 min (2 cores)", "97.5 %"),
    "cifar10-small": Recipe(cifar10_small, "14 min (2 cores)", "57.1 %"),
    "taressfl-small": Recipe(taressfl_small, "19 min (2 cores)", "50.4 %"),
    **{name: Recipe(make, "needs a GPU", "not run") for name, make in (_of_the_paper() | _baselines()).items()},
    "cifar10-device-cache": Recipe(device_cache, "needs a GPU", "not run"),
}
"""By name. Results are linear probes that we have measured (docs/experiments.md)."""


def recipe(name: str) -> Config:
    """The configuration of a recipe.

    Raises:
        SettingError: there is none of that name; names the nearest.
    """
    if name not in RECIPES:
        raise SettingError(f"unknown recipe {name}; {nearest(name, RECIPES) or 'there are ' + ', '.join(RECIPES)}")
    return RECIPES[name].make()
