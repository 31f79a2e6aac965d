"""A client's own images: files in a folder, in one that a camera adds to, or in parquet files. One is decoded at a
time."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mocosfl_device.errors import DataError
from mocosfl_device.pixels import EXTENSIONS, Encoded, converted, opened

SETTLED = 2.0
"""Seconds since the last change of a file in a folder that grows, after which it counts as complete."""
LOOK = 1.0
"""Seconds between two looks at a folder that grows."""
SPLITS = {"train", "test", "validation", "valid", "val"}
"""Names of folders that are parts of a data set; of those, a client uses train."""


class Source(Protocol):
    """Images by number, from 0."""

    def __len__(self) -> int:
        """How many there are now."""

    def look(self) -> None:
        """Take up what has come since."""

    def encoded(self, number: int) -> Encoded:
        """An image, not decoded yet. Raises ``OSError`` if it is gone."""

    def name(self, number: int) -> str:
        """Where an image is, for messages."""

    def drop(self, number: int) -> None:
        """Leave an image out from now on; those after it move up."""


class Folder:
    """Image files of a folder and of those below it, in the order of their names.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = _train(path, _files(path, EXTENSIONS))

    def __len__(self) -> int:
        return len(self.files)

    def look(self) -> None:
        """What comes later is not taken up."""

    def encoded(self, number: int) -> Encoded:
        """See ``Source``."""
        return self.files[number].read_bytes()

    def name(self, number: int) -> str:
        """See ``Source``."""
        return str(self.files[number])

    def drop(self, number: int) -> None:
        """See ``Source``."""
        del self.files[number]


class Spool(Folder):
    """A folder that a camera adds to, in the order of arrival.

    Files are taken up once nothing has been written to them for ``SETTLED`` seconds; those that are deleted are
    forgotten. A half-written or damaged one is left out until it changes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: list[Path] = []
        self._dropped: dict[Path, float] = {}
        self._looked = -LOOK
        self.look()

    def look(self) -> None:
        """See ``Source``."""
        if time.monotonic() - self._looked < LOOK:
            return
        self._looked = time.monotonic()
        known, found = set(self.files), []
        for file in _files(self.path, EXTENSIONS):
            try:
                changed = file.stat().st_mtime
            except OSError:  # deleted meanwhile
                continue
            if file in known or (time.time() - changed >= SETTLED and self._dropped.get(file) != changed):
                found.append((file not in known, changed, file))
        there = {file for _, _, file in found}
        self.files = [file for file in self.files if file in there]
        self.files += [file for new, _, file in sorted(found) if new]

    def drop(self, number: int) -> None:
        """See ``Source``."""
        file = self.files.pop(number)
        try:
            self._dropped[file] = file.stat().st_mtime
        except OSError:
            self._dropped.pop(file, None)


class Pack:
    """Encoded images one after the other in a file, unpacked from parquet files by a process of its own.

    So whoever takes part in a run never holds what reads parquet, which takes more memory than all else.

    Args:
        path: a parquet file, or a folder of them.
        column: that holds the images. None: the only one that does.
        say: told what is done.

    Raises:
        DataError: they cannot be read.
    """

    def __init__(self, path: Path, column: str | None, say: Callable[[str], None]) -> None:
        files = [path] if path.is_file() else _train(path, _files(path, (".parquet",)))
        self.path = path
        stamp = hashlib.sha256(f"{column}".encode())
        for file in files:
            stat = file.stat()
            stamp.update(f"\0{os.path.abspath(file)}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
        out = cache() / f"unpacked-{stamp.hexdigest()[:24]}"
        if not out.with_suffix(".npy").exists():
            say(f"unpacking {len(files)} parquet files; what is in them is kept in {out.parent}")
            out.parent.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "mocosfl_device.parquet", str(out), column or "", *map(str, files)]
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                raise DataError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"{path}: not read")
        self.ends = np.load(out.with_suffix(".npy"))
        self.rows = np.arange(len(self.ends))
        self.file = out.with_suffix(".bin")

    def __len__(self) -> int:
        return len(self.rows)

    def look(self) -> None:
        """Nothing is added to it."""

    def encoded(self, number: int) -> Encoded:
        """See ``Source``."""
        row = self.rows[number]
        start = int(self.ends[row - 1]) if row else 0
        with self.file.open("rb") as file:
            file.seek(start)
            return file.read(int(self.ends[row]) - start) or None

    def name(self, number: int) -> str:
        """See ``Source``."""
        return f"row {self.rows[number]} of {self.path}"

    def drop(self, number: int) -> None:
        """See ``Source``."""
        self.rows = np.delete(self.rows, number)


def cache() -> Path:
    """Folder for what is kept between two runs: MOCOSFL_CACHE, or the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MOCOSFL_CACHE") or Path(base) / "mocosfl")


def source_of(path: Path, grows: bool, column: str | None, say: Callable[[str], None]) -> Source:
    """The images at a place.

    Args:
        path: a folder of images or of parquet files, or a parquet file.
        grows: whether images are added to the folder while the client takes part.
        column: of parquet files, that holds the images.
        say: told what is done.

    Raises:
        DataError: there are none, or they cannot be read.
    """
    accepted = f"a folder of images ({', '.join(EXTENSIONS)}) or of parquet files, or a parquet file"
    if not path.exists():
        raise DataError(f"data={path}: there is no such file or folder; accepted are {accepted}")
    if grows:
        if not path.is_dir():
            raise DataError(f"data={path}: only a folder can grow")
        return Spool(path)
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise DataError(f"data={path}: accepted are {accepted}")
        return Pack(path, column, say)
    if _files(path, (".parquet",)):
        return Pack(path, column, say)
    folder = Folder(path)
    if not len(folder):
        raise DataError(f"data={path}: there are no images; accepted are {accepted}")
    return folder


def decoded(source: Source, number: int, size: int, channels: int) -> NDArray[np.uint8]:
    """Pixels of an image, (C, S, S).

    Raises:
        DataError: it is gone, or cannot be decoded.
    """
    try:
        return converted(opened(source.encoded(number), size), size, channels)[0]
    except Exception as error:  # a damaged file makes Pillow raise nearly anything, SyntaxError included
        raise DataError(f"{source.name(number)}: cannot be decoded ({error})") from error


def _files(root: Path, endings: tuple[str, ...]) -> list[Path]:
    """Files below a folder with these endings, but hidden ones, sorted.

    Raises:
        DataError: a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise DataError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    found: list[Path] = []
    for folder, below, names in os.walk(root, onerror=fail):
        below[:] = sorted(name for name in below if not name.startswith("."))
        found += [Path(folder, n) for n in names if not n.startswith(".") and n.lower().endswith(endings)]
    return sorted(found)


def _train(root: Path, files: list[Path]) -> list[Path]:
    """Those of the training part, where folders or the names of files say which are."""

    def part(file: Path) -> str:
        first = file.relative_to(root).parts[0]
        return (file.stem.partition("-")[0] if first == file.name else first).lower()

    parts = {part(file) for file in files}
    return [file for file in files if part(file) == "train"] if "train" in parts <= SPLITS else files
