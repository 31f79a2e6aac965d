"""From encoded images to pixels: Pillow in a thread pool, one chunk at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mocosfl.errors import DataError

Encoded = Path | bytes | NDArray[np.uint8] | None
"""A file, the bytes of one, or grey pixels (H, W). None, for an empty cell, counts as corrupt."""

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
    """

    count: int
    items: Callable[[], Iterator[Item]]
    labels: list[Any] | None = None
    names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Split:
    """One split of a source, not read yet.

    Attributes:
        stamp: changes whenever the content does.
        read: lists the images and reads the labels.
    """

    stamp: str
    read: Callable[[], Undecoded]


FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
"""What is decoded, with its file names. Of what Pillow knows beyond these, EPS would start Ghostscript."""

EXTENSIONS = tuple(extension for extensions in FORMATS.values() for extension in extensions)

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
                return _convert(_open(item), size, channels)
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
                return min(*_open(item).size, LARGEST)
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


def _open(item: Item) -> Image.Image:
    _, encoded = item
    if encoded is None:
        raise ValueError("there is no image")
    if isinstance(encoded, np.ndarray):
        return Image.fromarray(encoded)
    with Image.open(BytesIO(encoded) if isinstance(encoded, bytes) else encoded, formats=[*FORMATS]) as image:
        return ImageOps.exif_transpose(image)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale grey pixels of 16 bits to 8; Pillow's own conversion would clip them."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"pixels of mode {image.mode} beyond 16 bits have no agreed range")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _convert(image: Image.Image, size: int, channels: int) -> tuple[NDArray[np.uint8], list[str]]:
    """Pixels (C, size, size) uint8, and what had to be done to the image."""
    notes = []
    mode = image.mode
    grey = mode in ("1", "L", "LA") or mode[0] in "IF"
    if mode[0] in "IF":
        image = _eight_bits(image)
        notes.append("had 16 bits a pixel, scaled to 8")
    if image.has_transparency_data:
        # Dropping the alpha channel would show whatever colour an editor left under it.
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
        notes.append("had transparency, laid on white")
    if grey and channels == 3:
        notes.append("were grey, converted to colour")
    elif not grey and channels == 1:
        notes.append("were colour, converted to grey")
    elif not grey and not mode.startswith(("RGB", "P")):
        notes.append(f"were {mode}, converted to RGB")
    image = image.convert("RGB" if channels == 3 else "L")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
        notes.append(f"were not {size}x{size}, resized and cropped")
    pixels = np.asarray(image)  # (size, size, 3) or (size, size)
    return np.ascontiguousarray(np.moveaxis(np.atleast_3d(pixels), 2, 0)), notes
