"""What TAResSFL pre-trains on: the server's own images, and a share of the clients'."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mocosfl.config import Config, DataSettings
from mocosfl.data.federation import Federation, federate, set_aside
from mocosfl.data.images import ImageSet
from mocosfl.data.partition import Partition
from mocosfl.data.sampler import ClientSampler
from mocosfl.data.sources import Splits, balanced, load
from mocosfl.errors import MocosflError, SettingError
from mocosfl_device.randomness import stream

CHUNK = 1000
"""Images read at a time for their fingerprints."""


class MixedSampler(ClientSampler):
    """One client, the server: its batches are equal parts of every piece of the partition."""

    def draw(
        self, pool: NDArray[np.int64], batches: NDArray[np.int64] | int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Draw the next images of every piece; see ``ClientSampler.draw``. No two have one draw number."""
        pieces = len(self.partition)
        each = int(np.sum(batches)) // pieces
        rows, draws = super().draw(np.arange(pieces), each)
        return rows, draws * pieces + np.repeat(np.arange(pieces), each)


@dataclass(frozen=True)
class Mixture(Federation):
    """The images that the server pre-trains on. ``partition`` has a piece for the source's and one for the clients'.

    Attributes:
        target: the clients and their images, for whom the pre-training is.
        shared: (k,) int64, rows of the target's training split that are part of the mixture.
        spare_client: none of whose images are.
    """

    target: Federation
    shared: NDArray[np.int64]
    spare_client: int

    @property
    def epoch_images(self) -> int:
        """Images of one epoch: it passes over the source once, or over the clients' images if there is none."""
        return int(self.partition.sizes[0]) * len(self.partition)

    @property
    def scored(self) -> Splits:
        """The clients' images: they are what the encoder is for."""
        return self.target.scored

    def sampler(self, seed: int) -> ClientSampler:
        """Draws equal parts of the source's and the clients' images."""
        return MixedSampler(self.partition, seed)


def mix(config: Config, say: Callable[[str], None]) -> Mixture:
    """Load the source and the clients' images, and mix them as ``pretrain`` says.

    No image of the spare client is in the mixture, nor one with the same pixels as one of its.

    Raises:
        SettingError: the settings leave nothing to pre-train on.
        DataError: the images cannot be used.
    """
    settings = config.pretrain
    if settings.source is None and settings.target_share == 0:
        raise SettingError(
            "pretrain.source: with pretrain.target_share=0 there is nothing to pre-train on; name the server's own "
            "images (as data.source), or set pretrain.target_share"
        )
    target = federate(config, say)
    train = target.splits.train
    spare = target.partition.client(settings.spare_client)
    unseen = fingerprints(train, spare)

    def allowed(images: ImageSet, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return rows[~np.isin(fingerprints(images, rows), unseen)]

    count = round(settings.target_share * len(target.train_rows))
    if settings.target_share > 0 and count == 0:
        raise SettingError(
            f"pretrain.target_share={settings.target_share}: of the clients' {len(target.train_rows)} images that is "
            "not one"
        )
    candidates = allowed(train, target.train_rows) if count else target.train_rows[:0]
    if count and not len(candidates):
        raise SettingError(
            f"pretrain.target_share={settings.target_share}: all images are those of the spare client "
            f"(pretrain.spare_client={settings.spare_client})"
        )
    rng = np.random.default_rng(stream(config.seed, "target share"))
    shared = balanced(candidates, train.labels, min(count, len(candidates)), rng)

    pixels: list[NDArray[np.uint8]] = []
    names: list[tuple[str, ...]] = []
    numbers: list[NDArray[np.int64] | None] = []
    held_out = shared[:0]
    if settings.source is not None:
        channels, size, _ = train.shape
        own = DataSettings(
            source=settings.source,
            images=settings.images,
            size=size,
            channels=1 if channels == 1 else 3,
            memory=config.data.memory,
            skip_corrupt=config.data.skip_corrupt,
        )
        try:
            source = load(own, config.seed, say).train
        except MocosflError as error:
            raise type(error)(re.sub(r"data\.(source|images)=", r"pretrain.\1=", str(error))) from error
        if source.streamed:
            raise SettingError(
                f"pretrain.source={settings.source}: its images are more than data.memory={config.data.memory:g} GiB; "
                "raise that, or use fewer by pretrain.images"
            )
        rows = allowed(source, np.arange(len(source)))
        if not len(rows):
            raise SettingError(f"pretrain.source={settings.source}: all its images are those of the spare client")
        labels = source.labels if not count or train.labels is not None else None
        rows, held_out = set_aside(config.data.held_out, rows, labels, config.seed)
        order = np.concatenate([rows, held_out])
        pixels.append(source.gather(order))
        numbers.append(None if source.labels is None else source.labels[order])
        names.append(source.classes or ())
        held_out = np.arange(len(rows), len(order))
    if count:
        pixels.append(train.gather(shared))
        numbers.append(None if train.labels is None else train.labels[shared] + sum(map(len, names)))
        names.append(train.classes or ())
    labelled = all(piece is not None for piece in numbers)
    labels = np.concatenate([piece for piece in numbers if piece is not None]) if labelled else None
    classes = tuple(name for piece in names for name in piece) if labelled else None
    images = ImageSet(np.concatenate(pixels), labels, classes)

    train_rows = np.setdiff1d(np.arange(len(images)), held_out)
    sizes = [len(train_rows) - len(shared)] * (settings.source is not None) + [len(shared)] * (count > 0)
    pieces = Partition(train_rows, np.concatenate([[0], np.cumsum(sizes)]))
    return Mixture(Splits(images, None), train_rows, held_out, pieces, target, shared, settings.spare_client)


def fingerprints(images: ImageSet, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A number for each of some images, equal where all pixels are: (k,) rows to (k,), by BLAKE2b."""
    numbers = [
        hashlib.blake2b(image.tobytes(), digest_size=8).digest()
        for start in range(0, len(rows), CHUNK)
        for image in images.gather(rows[start : start + CHUNK])
    ]
    return np.frombuffer(b"".join(numbers), dtype=np.uint64)
