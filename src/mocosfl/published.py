"""What the paper reports, row by row, and the recipe that makes each row.

Li, Lyu, Iso, Chakrabarti, Spranger: MocoSFL: enabling cross-client collaborative self-supervised learning, ICLR 2023
(https://openreview.net/forum?id=2QGJXyMNoPz). Figures are those of the text and tables 1 to 4 of the submitted version.
What is only drawn, or stands in the appendix, is not known to us: ``None``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mocosfl.recipes import ABLATIONS, ARCHITECTURES, RECIPES, RICH, name_of

UNKNOWN = "not known to us"


@dataclass(frozen=True)
class Row:
    """One row, or cell, of a table or figure.

    Attributes:
        recipe: makes it.
        setting: what is special about it, in words.
        published: what the paper says, if we know it.
        ours: what we have measured or counted, if we have.
    """

    recipe: str
    setting: str
    published: str | None = None
    ours: str | None = None


@dataclass(frozen=True)
class Group:
    """A table or figure.

    Attributes:
        name: what it is called on the command line.
        title: what it is about.
        figure: what is measured, and in what unit.
        rows: of it.
        note: what to know before one compares.
        results: where ours are kept, or how to get them.
    """

    name: str
    title: str
    figure: str
    rows: tuple[Row, ...]
    note: str = ""
    results: str = ""


SETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet12": "ImageNet-12"}
KINDS = {"iid": "IID", "noniid": "non-IID"}

# Linear probe of table 3, by data set and cut: IID, then non-IID, of 100, 200 and 1,000 clients each.
_TABLE_3 = {
    ("cifar10", 1): (87.29, 87.38, 87.51, 87.71, 87.39, 86.46),
    ("cifar100", 1): (58.91, 59.15, 58.85, 59.22, 58.90, 56.75),
    ("imagenet12", 1): (92.02, 91.73, 91.76, 92.24, 91.44, 91.28),
    ("cifar10", 3): (87.29, 87.15, 87.25, 87.10, 85.22, 84.75),
    ("cifar100", 3): (58.41, 58.30, 58.80, 58.69, 58.59, 56.88),
    ("imagenet12", 3): (92.08, 92.24, 92.02, 92.60, 91.83, 91.28),
}
# Of table 2, non-IID: CIFAR-10 with 5 and 20 clients, then CIFAR-100.
_TABLE_2 = {1: (87.81, 85.84, 58.78, 57.80), 3: (87.29, 85.32, 57.70, 57.52)}
_TABLE_2_FL_BYOL = (83.34, 75.77, 61.78, 52.78)
# Of table 4, means and standard deviations of three seeds: linear probe, then MSE of the attack.
_TABLE_4 = {
    1: (("81.14 ± 0.47", "0.039 ± 0.005"), ("80.78 ± 1.34", "0.033 ± 0.014"), ("79.96 ± 2.96", "0.039 ± 0.002")),
    3: (("81.19 ± 2.32", "0.045 ± 0.003"), ("80.51 ± 1.49", "0.035 ± 0.003"), ("83.13 ± 2.40", "0.039 ± 0.002")),
}


def _table_1() -> Iterator[Row]:
    yield Row("flbyol-cifar10-5", "FL-SSL, 5 clients, 100 averages", "8,269.2", "8,269.2")
    yield Row("cifar10-noniid-1000", "MocoSFL-1, 1,000 clients", "5,001.4", "5,001.4")
    yield Row("cifar10-noniid-1000-cut3", "MocoSFL-3, 1,000 clients", "5,057.9", "5,057.9")
    yield Row("cifar10-device-cut1", "MocoSFL-1 + TAResSFL", "39.1", "39.1")
    yield Row("cifar10-device", "MocoSFL-3 + TAResSFL", "39.1", "39.1")


def _table_2() -> Iterator[Row]:
    cells = [(source, number) for source in ("cifar10", "cifar100") for number in (5, 20)]
    for (source, number), probe in zip(cells, _TABLE_2_FL_BYOL, strict=True):
        yield Row(f"flbyol-{source}-{number}", f"FL-BYOL, {SETS[source]}, {number} clients", f"{probe:.2f}")
    for cut, probes in _TABLE_2.items():
        for (source, number), probe in zip(cells, probes, strict=True):
            setting = f"MocoSFL-{cut}, {SETS[source]}, {number} clients"
            yield Row(name_of(source, number, "noniid", cut), setting, f"{probe:.2f}")


def _table_3() -> Iterator[Row]:
    cells = [(kind, number) for kind in KINDS for number in (100, 200, 1000)]
    for (source, cut), probes in _TABLE_3.items():
        for (kind, number), probe in zip(cells, probes, strict=True):
            setting = f"MocoSFL-{cut}, {SETS[source]}, {KINDS[kind]}, {number:,} clients"
            yield Row(name_of(source, number, kind, cut), setting, f"{probe:.2f}")


def _table_4() -> Iterator[Row]:
    for cut, cells in _TABLE_4.items():
        for percent, (probe, mse) in zip((0, 0.5, 1), cells, strict=True):
            name = f"taressfl-cut{cut}" + (f"-target{percent:g}" if percent else "")
            yield Row(name, f"MocoSFL-{cut}, {percent:g} % of the target's images", f"{probe}; MSE {mse}")


def _figure_1() -> Iterator[Row]:
    for method, words in (("flbyol", "FL-BYOL"), ("flmoco", "FL-MoCo v2")):
        for batch in (8, 16, 32, 64, 128):
            name = f"{method}-cifar10-5" + (f"-batch{batch}" if batch < 128 else "")
            yield Row(name, f"(a) {words}, 5 clients, batch {batch}")
        for number in (5, 20, 100):
            published = "about 30" if number == 100 else None
            yield Row(f"{method}-cifar10-{number}", f"(b) {words}, {number} clients", published)


TIMES = {1: "once", 5: "5 times", 10: "10 times"}


def _averaged(number: int, cut: int, averages: int) -> str:
    """10 averages a pass are the usual ones of the paper."""
    return name_of("cifar10", number, "noniid", cut, None if averages == 10 else averages)


def _figure_3() -> Iterator[Row]:
    for cut in (1, 3, 5):
        for averages in TIMES:
            setting = f"(a) divergence, MocoSFL-{cut}, averaged {TIMES[averages]} a pass"
            yield Row(_averaged(5, cut, averages), setting)
    yield Row("cifar10-noniid-1000-cut3", "(b) client half, FLOPs of inference, share of all", "13.7 %", "13.8 %")
    yield Row("cifar10-noniid-1000-cut3", "(b) client's memory, of that of FL-SSL", "1 / 288", "1 / 500")


def _figure_5() -> Iterator[Row]:
    for number in (5, 20):
        for cut in (1, 3):
            for averages in TIMES:
                setting = f"MocoSFL-{cut}, {number} clients, averaged {TIMES[averages]} a pass"
                yield Row(_averaged(number, cut, averages), setting)


def _architectures() -> Iterator[Row]:
    yield Row(name_of("cifar100", 5, "noniid", backbone="resnet50"), "ResNet-50, CIFAR-100, 5 clients (B.5)")
    for backbone in ARCHITECTURES:
        yield Row(name_of("cifar10", 100, "noniid", backbone=backbone), f"{backbone}, CIFAR-10, 100 clients")


def _ablations() -> Iterator[Row]:
    words = {
        "own-queues": "no feature sharing: a queue for each client",
        "one-by-one": "no vector concatenation: a step for each client, one after another",
        "cut3-aligned": "MocoSFL-3, momentum copies averaged too",
        "mocov3": "MoCo v3 in place of v2",
        "byol": "BYOL in place of MoCo",
        "simclr": "SimCLR in place of MoCo",
    }
    for name in ABLATIONS:
        yield Row(f"cifar10-noniid-100-{name}", words[name])


def _heterogeneous() -> Iterator[Row]:
    for number, (rich, factor, data) in RICH.items():
        preset = f"{rich:g}_{1 - rich:g}|{factor}|{data:g}_{1 - data:g}"
        yield Row(f"cifar10-hetero-{number}", f"MocoSFL-1, CIFAR-10, non-IID, {number} clients, {preset}")


def _baselines() -> Iterator[Row]:
    methods = {"flmoco": "FL-MoCo", "flsimclr": "FL-SimCLR", "flbyol": "FL-BYOL", "fedu": "FedU", "fedema": "FedEMA"}
    for source in ("cifar10", "cifar100"):
        for method, words in methods.items():
            for number in (5, 20, 100):
                name = f"{method}-{source}-{number}"
                yield Row(name, f"{words}, {SETS[source]}, {number} clients", None)
        yield Row(f"central-{source}", f"MoCo on all images, {SETS[source]}")


PROBE = "linear probe, %"
SMALL = "at CPU scale: examples/claims.yaml and docs/experiments.md"

GROUPS = (
    Group(
        "table-1",
        "bytes between a client and the server, over the whole run",
        "MB of 2^20 bytes",
        tuple(_table_1()),
        "The paper counts a latent once an image, though query and key are sent, and weights one way; ours are counted "
        "the same way. `mocosfl cost` counts all that is sent.",
        "docs/device.md; mocosfl cost --paper",
    ),
    Group(
        "table-2",
        "few clients, non-IID",
        PROBE,
        tuple(_table_2()),
        "20 clients have a batch of 5 each; in the release's script 5 of them at a time have a batch of 20.",
        SMALL,
    ),
    Group("table-3", "100 to 1,000 clients", PROBE, tuple(_table_3()), "", SMALL),
    Group(
        "table-4",
        "TAResSFL: a client half trained to resist inversion",
        f"{PROBE}; MSE of the attack",
        tuple(_table_4()),
        "First mocosfl pretrain NAME, then mocosfl train NAME --clients.init RUN. The paper's SSIM target is 0.6 "
        "(--ressfl.ssim-target 0.6); the recipes have 0.3, because of better attackers (docs/protect.md).",
        "at CPU scale: docs/protect.md",
    ),
    Group(
        "figure-1",
        "federated learning of whole networks, by batch and number of clients",
        "kNN, %",
        tuple(_figure_1()),
        "The text says of (b): accuracy falls to around 30 % where a client has 500 images. Batches and numbers of "
        "clients are our choice, but for 5 and 100.",
        SMALL,
    ),
    Group(
        "figure-3",
        "divergence of client halves; what a client computes",
        "divergence, share or ratio, as the setting says",
        tuple(_figure_3()),
        "(a) `divergence` in metrics.jsonl and on the page of `mocosfl report`; how many clients and how often is our "
        "choice. (b) operations as the paper counts them; memory at its peak, PyTorch's tensors.",
        "docs/device.md; mocosfl cost --paper",
    ),
    Group(
        "figure-5",
        "how often client halves are averaged, non-IID",
        PROBE,
        tuple(_figure_5()),
        "How often is our choice: the text names 10 times a pass alone.",
        SMALL,
    ),
    Group(
        "architectures",
        "other backbones, non-IID",
        PROBE,
        tuple(_architectures()),
        "The text says of B.5: about 4 points above FL-BYOL. vgg13 and mobilenetv2 are cut later, at smaller rates, "
        "as in the release.",
    ),
    Group(
        "ablations",
        "cifar10-noniid-100 with one thing taken away or exchanged",
        PROBE,
        tuple(_ablations()),
        "The comparisons are ours. Without averages in between: --sync.every 0.",
        SMALL,
    ),
    Group(
        "heterogeneous",
        "rich and poor clients, non-IID",
        PROBE,
        tuple(_heterogeneous()),
        "Presets of the release, A_B|C|D_E: a share A of the clients is rich, with a share D of the images and a batch "
        "C times as large; B and E are what is left for the others.",
    ),
    Group(
        "baselines",
        "whole networks on the clients, averaged; one network on all images",
        PROBE,
        tuple(_baselines()),
        "What the paper reports of FL-BYOL is in table-2. Clients are non-IID; for IID --partition.kind iid.",
        SMALL,
    ),
)


def group(name: str) -> Group | None:
    """The table or figure of that name."""
    return next((group for group in GROUPS if group.name == name), None)


def rows_of(recipe: str) -> list[tuple[Group, Row]]:
    """Where a recipe appears."""
    return [(group, row) for group in GROUPS for row in group.rows if row.recipe == recipe]


def elsewhere() -> list[str]:
    """Recipes that are of no table or figure."""
    there = {row.recipe for group in GROUPS for row in group.rows}
    return [name for name in RECIPES if name not in there]
