"""What a file or folder holds before anything is decoded: its splits, their images, and their labels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from mocosfl.config import DataSettings
from mocosfl.data.decode import Item, Split, Undecoded
from mocosfl.data.tables import read_parquet
from mocosfl.errors import DataError
from mocosfl_device.folders import by_folder, by_name, files_below
from mocosfl_device.pixels import EXTENSIONS


def local_splits(path: Path, settings: DataSettings, say: Callable[[str], None]) -> dict[str, Split]:
    """Splits of a parquet file, of a folder of parquet files or of a folder of images.

    Args:
        path: the file or folder.
        settings: where the names of the splits and columns are taken from.
        say: told which files of the folder are not used.

    Returns:
        The splits by name; ``train`` alone where nothing names them.

    Raises:
        DataError: there are no images, or it is unclear which class they belong to.
    """
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise DataError(f"data.source={settings.source}: a file must be a parquet file, named .parquet")
        return {"train": _parquet_split([path], settings)}
    files = files_below(path)
    tables = [file for file in files if file.suffix.lower() == ".parquet"]
    images = [file for file in files if file.suffix.lower() in EXTENSIONS]
    if not tables and not images:
        found = f"none of its {len(files)} files is one" if files else "it is empty"
        raise DataError(
            f"data.source={settings.source}: the folder holds no images, {found}; accepted are parquet "
            f"files, and images named {', '.join(EXTENSIONS)}"
        )
    names = settings.train_split, settings.test_split
    if tables:
        groups, depth = by_name(path, tables, *names), 0
    else:
        groups, depth = by_folder(path, images, *names)
    unused = set(files).difference(*groups.values())
    if unused:
        kinds = ", ".join(sorted({file.suffix or file.name for file in unused}))
        say(f"data: files in {path} that are not used: {len(unused):,} ({kinds})")
    if tables:
        return {name: _parquet_split(group, settings) for name, group in groups.items()}
    return {name: _folder_split(path, group, depth) for name, group in groups.items()}


# Plain paths and not the imagefolder builder of datasets: that one reads splits out of file names, obeys
# metadata files that it finds, and keeps a list of the files in a cache of its own. All that would have to be
# turned off.
def _folder_split(root: Path, files: list[Path], depth: int) -> Split:
    """Images in class folders, each class the first level below the split; or flat and unlabelled."""
    places = [file.relative_to(root).parts[depth:] for file in files]
    loose = [file for file, place in zip(files, places, strict=True) if len(place) == 1]
    if loose and len(loose) < len(files):
        raise DataError(
            f"{loose[0].parent}: images such as {loose[0].name} ({len(loose)} in all) lie beside sub-folders "
            "of images; put every image into the sub-folder of its class, or all of them into one folder"
        )
    labels = None if loose else [place[0] for place in places]

    def items() -> Iterator[Item]:
        return ((str(file), file) for file in files)

    return Split(_stamp(files, f"{root.resolve()} {depth}"), lambda: Undecoded(len(files), items, labels))


def _parquet_split(files: list[Path], settings: DataSettings) -> Split:
    return Split(_stamp(files), partial(read_parquet, files, settings))


def _stamp(files: list[Path], layout: str = "") -> str:
    digest = hashlib.sha256(os.fsencode(layout))
    for file in files:
        digest.update(os.fsencode(os.path.abspath(file)))
        with suppress(OSError):  # such as a link to nowhere; reading it says so
            stat = file.stat()
            digest.update(f"\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()
