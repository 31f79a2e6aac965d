"""How good an encoder is: kNN while it is trained, kNN and linear probe at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mocosfl.config import Config, EvaluationSettings
from mocosfl.data.federation import Federation
from mocosfl.data.images import ImageSet, upload
from mocosfl.data.sources import Splits, balanced
from mocosfl.distributed import World
from mocosfl.encoder import Encoder
from mocosfl.evaluation import knn_accuracy, linear_probe
from mocosfl.evaluation.features import extract_from
from mocosfl_device.randomness import stream


@dataclass(frozen=True)
class Labelled:
    """Images to evaluate on.

    Attributes:
        train: the bank of the kNN, and what probes learn from.
        test: what they are scored on.
        train_labels, test_labels: (n,) int64 on the compute device.
        classes: their number.
    """

    train: ImageSet
    test: ImageSet
    train_labels: Tensor
    test_labels: Tensor
    classes: int

    @classmethod
    def of(cls, splits: Splits, device: torch.device) -> Labelled | str:
        """The images of a source, or what they lack."""
        train, test = splits.train, splits.test
        if train.labels is None or train.classes is None:
            return "its training images have no labels"
        if test is None or test.labels is None:
            return "there is no test split" if test is None else "its test images have no labels"
        return cls(train, test, upload(train.labels, device), upload(test.labels, device), len(train.classes))


def final_figures(
    config: Config, splits: Splits, encoder: Encoder, say: Callable[[str], None], world: World
) -> dict[str, Any]:
    """kNN before and after training, and linear probe, with all training images as bank and the whole test set.

    Args:
        config: all settings.
        splits: the images.
        encoder: the trained one.
        say: told if there is nothing to evaluate on.
        world: the processes of the run; all of them call.

    Returns:
        Figures by name, as in result.json; none without labelled training and test images.
    """
    images = Labelled.of(splits, encoder.mean.device)
    if isinstance(images, str):
        say("evaluation: it needs training and test images with labels, and is skipped")
        return {}
    return frozen_figures(encoder, images, config.evaluation, config.seed, world)[0]


def frozen_figures(
    encoder: Encoder, images: Labelled, settings: EvaluationSettings, seed: int, world: World
) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """kNN of an encoder and of one of its kind that is untrained, and linear probe.

    Args:
        encoder: the trained one.
        images: to evaluate on.
        settings: of the evaluation.
        seed: of the untrained encoder's weights and the probe.
        world: the processes of the run; all of them call.

    Returns:
        Figures by name; and features of training and test images, (n, D) float32 each.
    """
    untrained = Encoder(encoder.settings, encoder.channels, encoder.size, seed).to(encoder.mean.device)
    untrained.mean.copy_(encoder.mean)
    untrained.std.copy_(encoder.std)

    def features(model: Encoder) -> tuple[Tensor, Tensor]:
        bank, queries = (
            _features(model, split, np.arange(len(split)), settings.batch, world)
            for split in (images.train, images.test)
        )
        return bank, queries

    def knn(bank: Tensor, queries: Tensor) -> float:
        return _knn(bank, images.train_labels, queries, images.test_labels, settings, images.classes, world)

    bank, queries = features(encoder)
    metrics: dict[str, Any] = {
        "bank_images": len(images.train),
        "test_images": len(images.test),
        "knn_untrained": knn(*features(untrained)),
        "knn": knn(bank, queries),
    }
    if settings.probe_epochs:
        probe = world.first(
            lambda: linear_probe(
                bank,
                images.train_labels,
                queries,
                images.test_labels,
                images.classes,
                settings.probe_epochs,
                settings.probe_lr,
                stream(seed, "probe"),
            )
        )
        metrics |= {"linear_probe": probe.accuracy, "linear_probe_train": probe.train_accuracy}
    return metrics, (bank, queries)


def held_out_knn(
    config: Config, federation: Federation, encoder: Encoder, average: Callable[[], None], world: World
) -> Callable[[], float]:
    """kNN accuracy, in percent, of the average client half and the server half as they stand.

    The queries are the held-out images, the bank is some of the clients' images, every class alike.

    Args:
        config: all settings.
        federation: the images.
        encoder: its server half is the one that learns.
        average: puts the average of what clients hold into the encoder; called each time.
        world: the processes of the run; all of them call.
    """
    images, settings, device = federation.splits.train, config.evaluation, encoder.mean.device
    if images.labels is None or images.classes is None:
        return lambda: float("nan")  # there are no held-out images either
    count = min(settings.monitor_bank, len(federation.train_rows))
    rng = np.random.default_rng(stream(config.seed, "bank"))
    rows = (balanced(federation.train_rows, images.labels, count, rng), federation.held_out)
    bank_labels, query_labels = (upload(images.labels[part], device) for part in rows)
    classes = len(images.classes)

    def knn() -> float:
        average()
        bank, queries = (_features(encoder, images, part, settings.batch, world) for part in rows)
        return _knn(bank, bank_labels, queries, query_labels, settings, classes, world)

    return knn


def _features(encoder: Encoder, images: ImageSet, rows: NDArray[np.int64], batch: int, world: World) -> Tensor:
    """(len(rows), D) features; every process computes a share of them and has all of them."""
    own = rows[world.share(len(rows))]
    nothing = torch.zeros(0, encoder.features, device=encoder.mean.device)
    return world.gather(extract_from(encoder, images, own, batch) if len(own) else nothing, world.lengths(len(rows)))


def _knn(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    settings: EvaluationSettings,
    classes: int,
    world: World,
) -> float:
    """kNN accuracy in percent; every process asks for a share of the queries."""
    own = world.share(len(queries))
    correct = torch.zeros((), dtype=torch.float64)
    if count := own.stop - own.start:
        share = knn_accuracy(bank, bank_labels, queries[own], labels[own], settings.k, settings.temperature, classes)
        correct += round(share / 100 * count)
    world.add([correct])
    return 100 * float(correct) / len(queries)
