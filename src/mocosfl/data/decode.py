"""From encoded images to pixels: Pillow in a thread pool, one chunk at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mocosfl.errors import DataError
from mocosfl_device.pixels import Encoded, converted, opened

Item = tuple[str, Encoded]
"""Where an image is, for messages, and the image."""


@dataclass(frozen=True)
class Undecoded:
    """The images of one split, before decoding.

    Attributes:
        count: how many there are.
        items: goes through them; each call starts anew.
        labels: a class name or number for each, or None.
        names: the names of all classes, where ``labels`` holds numbers of such a list; else None.
        some: goes through those of a mask, (count,) bool, without reading the others; None where that saves nothing.
    """

    count: int
    items: Callable[[], Iterator[Item]]
    labels: list[Any] | None = None
    names: tuple[str, ...] | None = None
    some: Callable[[NDArray[np.bool_]], Iterator[Item]] | None = None


@dataclass(frozen=True)
class Split:
    """One split of a source, not read yet.

    Attributes:
        stamp: changes whenever the content does.
        read: lists the images and reads the labels.
    """

    stamp: str
    read: Callable[[], Undecoded]


CHUNK = 256
"""Images decoded before the next ones are read."""

LARGEST = 224
"""Greatest size in pixels that is taken from the images where none is set."""


def decode(
    items: Iterable[Item], size: int, channels: int, skip_corrupt: bool, notes: Counter[str]
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Decode images to one size and one number of channels, in order.

    Args:
        items: the images.
        size: S, height and width in pixels.
        channels: C, 1 or 3.
        skip_corrupt: leave out images that cannot be decoded.
        notes: gets the number of images that each kind of conversion was made for.

    Yields:
        Pixels of the next images, (k, C, S, S) uint8, and their positions in ``items``, (k,) int64.

    Raises:
        DataError: an image cannot be decoded, and ``skip_corrupt`` is off.
    """

    def work(item: Item) -> tuple[NDArray[np.uint8], list[str]] | DataError:
        try:
            with _blamed_on(item):
                return converted(opened(item[1], size), size, channels)
        except DataError as error:
            return error

    items, done = iter(items), 0
    with ThreadPoolExecutor() as pool:
        while chunk := list(islice(items, CHUNK)):
            pixels, kept = [], []
            for position, result in enumerate(pool.map(work, chunk), start=done):
                if isinstance(result, DataError):
                    if not skip_corrupt:
                        raise result
                    notes["could not be decoded, left out"] += 1
                    continue
                pixels.append(result[0])
                kept.append(position)
                notes.update(result[1])
            done += len(chunk)
            if pixels:
                yield np.stack(pixels), np.array(kept)


def first_size(items: Iterable[Item], skip_corrupt: bool) -> int:
    """Shorter side of the first image (with ``skip_corrupt``: that can be decoded) in pixels, at most 224.

    Raises:
        DataError: it cannot be decoded, or none can.
    """
    last = None
    for item in items:
        try:
            with _blamed_on(item):
                return min(*opened(item[1]).size, LARGEST)
        except DataError as error:
            if not skip_corrupt:
                raise
            last = error
    raise DataError(f"not one image can be decoded; the last: {last}")


@contextmanager
def _blamed_on(item: Item) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged file makes Pillow raise nearly anything, SyntaxError included
        raise DataError(
            f"{item[0]}: cannot be decoded ({error}); data.skip_corrupt=true leaves such images out"
        ) from error
