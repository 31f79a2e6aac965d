"""Files of a data set in a folder, and which of its splits each belongs to."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from mocosfl_device.errors import DataError

TEST_SPLITS = ("test", "validation", "valid", "val")
"""Names that a test split goes by, the preferred one first."""


def files_below(root: Path, failed: Callable[[OSError], None] | None = None) -> list[Path]:
    """All files below a folder but hidden ones, sorted.

    Args:
        root: the folder.
        failed: told of folders that cannot be read.

    Raises:
        DataError: a folder cannot be read, and there is no ``failed``.
    """

    def fail(error: OSError) -> None:
        raise DataError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    files: list[Path] = []
    seen = set()
    for folder, below, names in os.walk(root, onerror=failed or fail, followlinks=True):
        # Folders of links to class folders are common, but a link back up must not be followed for ever.
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not name.startswith("."))
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(files)


def _known_names(train: str, test: str | None) -> set[str]:
    """Names of splits, in lower case: Train and Test are to be refused as splits, not taken for classes."""
    return {name.lower() for name in {"train", train, test or "test", *TEST_SPLITS}}


def by_name(root: Path, files: list[Path], train: str = "train", test: str | None = None) -> dict[str, list[Path]]:
    """Parquet files by split, which a folder on the way names, or a word of the file's name.

    Args:
        root: the data set's folder.
        files: below it.
        train, test: names of the splits, where they are known.
    """
    known = _known_names(train, test)
    groups: dict[str, list[Path]] = {}
    for file in files:
        letters = re.findall("[A-Za-z]+", file.stem)
        words = [*file.relative_to(root).parts[:-1], file.stem.partition("-")[0], *letters]
        other = letters[0] if letters else "train"
        groups.setdefault(next((word for word in words if word.lower() in known), other), []).append(file)
    if len(groups) == 1 and not known & {name.lower() for name in groups}:
        return {"train": files}  # part-0, part-1 and so on
    return groups


def by_folder(
    root: Path, files: list[Path], train: str = "train", test: str | None = None
) -> tuple[dict[str, list[Path]], int]:
    """Image files by split, and how many levels of folders are splits, 1 or 0.

    Beside other folders, ``train`` alone does not make splits: it may be a class of vehicles.

    Args:
        root, files, train, test: as for ``by_name``.
    """
    groups: dict[str, list[Path]] = {}
    for file in files:
        first, *rest = file.relative_to(root).parts
        if rest:
            groups.setdefault(first, []).append(file)
    found = {name.lower() for name in groups}
    named = train != "train" or test is not None or bool(found & {*TEST_SPLITS})
    if groups and (found <= _known_names(train, test) or (train.lower() in found and named)):
        return groups, 1
    return {"train": files}, 0
