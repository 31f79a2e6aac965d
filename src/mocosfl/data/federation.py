"""The images of a run and who holds them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mocosfl.config import Config
from mocosfl.data.partition import Partition, partition, partition_in_two
from mocosfl.data.sampler import ClientSampler
from mocosfl.data.sources import Splits, balanced, load
from mocosfl.errors import SettingError
from mocosfl_device.randomness import stream


@dataclass(frozen=True)
class Federation:
    """The images of a run and who holds them.

    Attributes:
        splits: training and test images.
        train_rows: (n,) int64, rows of the training split that clients hold.
        held_out: (m,) int64, rows that no client holds; the monitor's queries.
        partition: which client holds which of ``train_rows``.
    """

    splits: Splits
    train_rows: NDArray[np.int64]
    held_out: NDArray[np.int64]
    partition: Partition

    @property
    def epoch_images(self) -> int:
        """Images of one epoch."""
        return len(self.train_rows)

    @property
    def scored(self) -> Splits:
        """The images that the trained encoder is evaluated on."""
        return self.splits.scored

    @property
    def counts(self) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None]:
        """(N, C) images of every client and class, and the classes' names; None twice without labels."""
        labels, classes = self.splits.train.labels, self.splits.train.classes
        if labels is None or classes is None:
            return None, None
        return self.partition.counts(labels, len(classes)), classes

    def sampler(self, seed: int) -> ClientSampler:
        """Draws each client's images."""
        return ClientSampler(self.partition, seed)


@dataclass(frozen=True)
class Guests(Federation):
    """Images that stay with clients elsewhere. ``splits`` are the server's own, to evaluate on; they may be none.

    Attributes:
        images: of all clients.
        joined: clients, when the run began or went on.
    """

    images: int
    joined: int

    @property
    def epoch_images(self) -> int:
        """Images of one epoch: the clients'."""
        return self.images


def federate(config: Config, say: Callable[[str], None]) -> Federation:
    """Load the images, set the held-out slice aside, and spread the rest over the clients.

    Raises:
        SettingError, DataError: the source or the partition is not possible.
    """
    splits = load(config.data, config.seed, say)
    labels = splits.train.labels
    if labels is None:
        say("data: the images have no labels; the kNN monitor is skipped")
    rows, held_out = set_aside(config.data.held_out, np.arange(len(splits.train)), labels, config.seed)
    classes = len(splits.train.classes) if splits.train.classes is not None else None
    clients, rich = config.clients, config.rich
    batch = clients.batch * clients.rich_batch_factor
    facts = (rows, None if labels is None else labels[rows], classes, config.seed)
    if rich and clients.rich_data_share is not None:
        numbers, batches = (clients.number - rich, rich), (clients.batch, batch)
        held = partition_in_two(config.partition, numbers, clients.rich_data_share, *facts, batches)
    else:
        held = partition(config.partition, clients.number, *facts, clients.batch)
    if rich and (fewest := held.sizes[-rich:].min()) < batch:
        raise SettingError(
            f"clients.rich_batch_factor={clients.rich_batch_factor}: a rich client would use {batch} images "
            f"in a step, and one of them holds only {fewest}"
        )
    return Federation(splits, rows, held_out, held)


def export(federation: Federation, folder: Path) -> list[Path]:
    """Write every client's images as PNG files, ``client-NUMBER/00000.png`` and so on, in the client's own order.

    Args:
        federation: the images and who holds them.
        folder: where to write; client folders in it are replaced.

    Returns:
        The clients' folders.
    """
    folders = []
    for client in range(len(federation.partition)):
        target = folder / f"client-{client}"
        if target.exists():
            shutil.rmtree(target)
        target.mkdir(parents=True)
        pixels = federation.splits.train.gather(federation.partition.client(client))
        for number, image in enumerate(pixels):
            Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(target / f"{number:05}.png")
        folders.append(target)
    return folders


def set_aside(
    share: float, rows: NDArray[np.int64], labels: NDArray[np.int64] | None, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Divide rows into those to train on and the monitor's queries.

    Args:
        share: of the rows that become queries; none do without labels.
        rows: (n,) int64.
        labels: class number of every row of the split, or None.
        seed: the run's.

    Returns:
        Rows to train on and queries, int64, both in ascending order.
    """
    if labels is None or share == 0:
        return rows, rows[:0]
    aside = balanced(rows, labels, round(share * len(rows)), np.random.default_rng(stream(seed, "held out")))
    return np.setdiff1d(rows, aside), aside
