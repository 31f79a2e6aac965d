"""A client's own images: files in a folder, in one that a camera adds to, or in parquet files. One is decoded at a
time."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mocosfl_device.errors import DataError
from mocosfl_device.folders import by_folder, by_name, files_below
from mocosfl_device.pixels import EXTENSIONS, Encoded, converted, opened

SETTLED = 2.0
"""Seconds since the last change of a file in a folder that grows, after which it counts as complete."""
LOOK = 1.0
"""Seconds between two looks at a folder that grows."""


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
        groups, _ = by_folder(path, _ending(files_below(path), EXTENSIONS))
        self.files = _train(groups, path)

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
        files_below(path)  # says whether it can be read
        self.path = path
        self.files: list[Path] = []
        self._changed: dict[Path, float] = {}  # of the files that are there, as they were last looked at
        self._dropped: dict[Path, float] = {}
        self._looked = -LOOK
        self.look()

    def look(self) -> None:
        """See ``Source``."""
        if time.monotonic() - self._looked < LOOK:
            return
        self._looked = time.monotonic()
        self._changed = {}
        for file in _ending(files_below(self.path, failed=lambda error: None), EXTENSIONS):
            with suppress(OSError):  # deleted meanwhile
                self._changed[file] = file.stat().st_mtime
        self._dropped = {file: at for file, at in self._dropped.items() if self._changed.get(file) == at}
        self.files = [file for file in self.files if file in self._changed]
        new = self._changed.keys() - self._dropped.keys() - set(self.files)
        settled = [(self._changed[file], file) for file in new if time.time() - self._changed[file] >= SETTLED]
        self.files += [file for _, file in sorted(settled)]

    def drop(self, number: int) -> None:
        """See ``Source``."""
        file = self.files.pop(number)
        if file in self._changed:
            self._dropped[file] = self._changed[file]


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
        files = [path] if path.is_file() else _train(by_name(path, _ending(files_below(path), (".parquet",))), path)
        self.path = path
        stamp = hashlib.sha256(f"{column}".encode())
        for file in files:
            stat = file.stat()
            stamp.update(f"\0{os.path.abspath(file)}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
        out = cache() / f"unpacked-{stamp.hexdigest()[:24]}"
        if not out.with_suffix(".npy").exists():
            say(f"unpacking {len(files)} parquet files; what is in them is kept in {out.parent}")
            try:
                out.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DataError(
                    f"cannot write to {out.parent} ({error.strerror}); MOCOSFL_CACHE names another folder"
                ) from error
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
    """Folder for what is kept between two runs: ``$MOCOSFL_CACHE``, or ``~/.cache/mocosfl``."""
    return Path(os.environ.get("MOCOSFL_CACHE") or "~/.cache/mocosfl").expanduser()


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
    if _ending(files_below(path), (".parquet",)):
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


def _ending(files: list[Path], endings: tuple[str, ...]) -> list[Path]:
    return [file for file in files if file.name.lower().endswith(endings)]


def _train(groups: dict[str, list[Path]], path: Path) -> list[Path]:
    """Files of the training split.

    Raises:
        DataError: there are splits, and none is it.
    """
    if "train" not in groups:
        raise DataError(f"data={path}: there are {', '.join(groups)} and no train: name the folder or file to use")
    return groups["train"]
