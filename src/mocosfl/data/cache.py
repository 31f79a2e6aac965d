"""Decoded images kept on disk from one run to the next: one folder a source, in ``$MOCOSFL_CACHE``."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from mocosfl_device.images import cache

VERSION = 1
"""Part of every key; to be raised when the same images would give other pixels, or another layout on disk."""


@dataclass(frozen=True)
class Decoded:
    """The decoded images of a source.

    Attributes:
        pixels: one array (n, C, H, W) uint8 for each split, training split first.
        labels: for each split (n,) int64, or None.
        classes: names of the classes, None where no split has labels.
        said: what the decoding had to say, to be said again whenever the cache is used.
    """

    pixels: Sequence[NDArray[np.uint8]]
    labels: Sequence[NDArray[np.int64] | None]
    classes: tuple[str, ...] | None
    said: list[str]


def cached(key: object, make: Callable[[Path | None], Decoded], say: Callable[[str], None]) -> Decoded:
    """Open an entry of the cache; make it first where there is none, or where it is damaged.

    Args:
        key: everything that the result depends on, as JSON values.
        make: decodes the images; puts their pixels by ``store`` into the folder it is given, or into
            memory where that is None.
        say: told where the cache cannot be written, and the images have to stay in memory.

    Returns:
        The decoded images, their pixels memmaps of the cache's files wherever it could be written.
    """
    folder = cache() / hashlib.sha256(json.dumps([VERSION, key]).encode()).hexdigest()[:32]
    found = _read(folder)
    if found is not None:
        return found
    try:
        cache().mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=cache(), prefix="tmp-", ignore_cleanup_errors=True) as temporary:
            entry = Path(temporary) / "entry"
            entry.mkdir()
            _write(make(entry), entry)
            found = _read(folder)
            if found is not None:  # another process was quicker
                return found
            shutil.rmtree(folder, ignore_errors=True)  # what is there is damaged
            with suppress(OSError):  # another process has made the same entry meanwhile; it is read below
                os.replace(entry, folder)
        found = _read(folder)
        if found is None:
            raise OSError(f"{folder} cannot be read back")
        return found
    except OSError as error:
        reason = error.strerror or error
        say(f"data: cannot write the cache {cache()} ({reason}); the decoded images stay in memory")
        return make(None)


def store(
    chunks: Iterable[tuple[NDArray[np.uint8], NDArray[np.int64]]],
    count: int,
    shape: tuple[int, int, int],
    path: Path | None,
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Put decoded images into one array, in a file or in memory.

    The file is written from front to back, not through a memory map: on a full disk a write fails with an
    error that can be handled, while touching a mapped page would kill the process.

    Args:
        chunks: pixels (k, C, H, W) uint8, and positions (k,) int64.
        count: the most images there can be.
        shape: (C, H, W).
        path: a .npy file to write, or None for memory.

    Returns:
        All pixels (n, C, H, W), a memmap where there is a path, and all positions (n,) int64.
    """
    kept, total = [np.zeros(0, dtype=np.int64)], 0
    if path is None:
        pixels = np.empty((count, *shape), dtype=np.uint8)
        for chunk, positions in chunks:
            pixels[total : total + len(chunk)] = chunk
            kept.append(positions)
            total += len(chunk)
        return pixels[:total], np.concatenate(kept)
    with path.open("wb") as file:
        _header(file, (0, *shape))
        for chunk, positions in chunks:
            file.write(chunk.tobytes())
            kept.append(positions)
            total += len(chunk)
        file.seek(0)
        _header(file, (total, *shape))  # numpy pads headers, so that the number of rows can grow in place
        file.flush()
        os.fsync(file.fileno())
    return npy.open_memmap(path, mode="r"), np.concatenate(kept)


def _header(file: IO[bytes], shape: tuple[int, ...]) -> None:
    npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _write(decoded: Decoded, folder: Path) -> None:
    for index, labels in enumerate(decoded.labels):
        if labels is not None:
            np.save(folder / f"labels{index}.npy", labels)
    entry = {
        "shapes": [pixels.shape for pixels in decoded.pixels],
        "labelled": [labels is not None for labels in decoded.labels],
        "classes": decoded.classes,
        "said": decoded.said,
    }
    (folder / "entry.json").write_text(json.dumps(entry), encoding="utf-8")


def _read(folder: Path) -> Decoded | None:
    try:
        entry = json.loads((folder / "entry.json").read_text(encoding="utf-8"))
        pixels, labels = [], []
        for index, (shape, labelled) in enumerate(zip(entry["shapes"], entry["labelled"], strict=True)):
            images = npy.open_memmap(pixels_file(folder, index), mode="r")
            numbers = np.load(folder / f"labels{index}.npy") if labelled else None
            if images.shape != tuple(shape) or (numbers is not None and len(numbers) != len(images)):
                return None
            pixels.append(images)
            labels.append(numbers)
        classes = None if entry["classes"] is None else tuple(entry["classes"])
        return Decoded(pixels, labels, classes, entry["said"])
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None


def pixels_file(folder: Path, index: int) -> Path:
    """Where the pixels of the split with this number are, within an entry."""
    return folder / f"pixels{index}.npy"
