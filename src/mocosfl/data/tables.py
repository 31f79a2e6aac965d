"""Images held in the rows of a table: parquet files, and data sets of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mocosfl.config import DataSettings
from mocosfl.data.decode import CHUNK, Item, Split, Undecoded
from mocosfl.errors import DataError, SettingError
from mocosfl_device.pixels import Encoded

LABEL_COLUMNS = ("label", "labels", "fine_label")
"""Names that the column of the labels goes by, the preferred one first."""

Column = Callable[[str, NDArray[np.bool_] | None], Iterator[tuple[str, Any]]]
"""Goes through the values of the column of this name, of some rows or of all (None), each with where it is."""


def read_parquet(files: list[Path], settings: DataSettings) -> Undecoded:
    """List the images of parquet files, and read their labels.

    The files are read with pyarrow, a few rows at a time; ``load_dataset`` would first copy them to a cache.

    Args:
        files: the files of one split, at least one.
        settings: may name the columns.

    Raises:
        DataError: a file is damaged, or lacks a column of the first one; or see ``read_table``.
        SettingError: see ``read_table``.
    """
    import datasets  # takes a second, which a run on digits need not wait for

    schemas, count = [], 0
    for file in files:
        with _blamed_on(file), pq.ParquetFile(file) as parquet:
            schemas.append(parquet.schema_arrow)
            count += parquet.metadata.num_rows
    for file, schema in zip(files, schemas, strict=True):
        missing = set(schemas[0].names).difference(schema.names)
        if missing:
            raise DataError(f"{file}: lacks the columns {', '.join(sorted(missing))} of {files[0]}")
    return read_table(datasets.Features.from_arrow_schema(schemas[0]), count, partial(_parquet_column, files), settings)


def _parquet_column(files: list[Path], name: str, mask: NDArray[np.bool_] | None) -> Iterator[tuple[str, Any]]:
    before = 0  # rows of the files before
    for file in files:
        row = 0
        with _blamed_on(file), pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(CHUNK, columns=[name]):
                here = np.arange(len(batch))
                if mask is not None:
                    here = np.flatnonzero(mask[before + row : before + row + len(batch)])
                for place, value in zip(here.tolist(), batch.column(0).take(pa.array(here)).to_pylist(), strict=True):
                    yield f"row {row + place} of {file}", value
                row += len(batch)
        before += row


def hub_splits(hub: str, config: str | None, settings: DataSettings) -> dict[str, Split]:
    """Splits of a data set on the Hugging Face hub, downloaded where needed.

    Args:
        hub: owner and name.
        config: the configuration of the data set, where it has several.
        settings: may name the columns.

    Returns:
        The splits by name.

    Raises:
        DataError: it cannot be loaded.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(hub, config)
    except Exception as error:  # datasets, huggingface_hub and their transports each have errors of their own
        raise DataError(
            f"data.source={settings.source}: cannot load {hub} from the Hugging Face hub ({error}). A local "
            "copy works too: give the path of a parquet file, or of a folder of parquet files or of images"
        ) from error
    splits = {}
    for name, table in loaded.items():
        # As Arrow, images stay encoded; datasets' own rows would be decoded.
        column = partial(_hub_column, table.with_format("arrow"), f"{hub} ({name})")
        read = partial(read_table, table.features, len(table), column, settings)
        splits[str(name)] = Split(f"{hub} {config} {name} {table._fingerprint}", read)
    return splits


def _hub_column(table: Any, place: str, name: str, mask: NDArray[np.bool_] | None) -> Iterator[tuple[str, Any]]:
    table = table.select_columns(name)
    rows = np.arange(len(table)) if mask is None else np.flatnonzero(mask)
    done = 0
    with _blamed_on(place):
        for batch in (table if mask is None else table.select(rows)).iter(CHUNK):
            for value in batch.column(0).to_pylist():
                yield f"row {rows[done]} of {place}", value
                done += 1


@contextmanager
def _blamed_on(place: Path | str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{place}: cannot be read ({error})") from error


def read_table(features: Mapping[str, Any], count: int, column: Column, settings: DataSettings) -> Undecoded:
    """Find the columns of images and labels, and read the labels.

    Args:
        features: the columns' types, as ``datasets`` describes them.
        count: rows of the table.
        column: reads a column.
        settings: may name the columns.

    Raises:
        DataError: no column holds images, or several do; some rows have a label and others none.
        SettingError: a column named in the settings is missing or of another type.
    """
    image, label = _image_column(features, settings), _label_column(features, settings)

    def some(mask: NDArray[np.bool_] | None) -> Iterator[Item]:
        return ((where, _encoded(cell)) for where, cell in column(image, mask))

    def items() -> Iterator[Item]:
        return some(None)

    if label is None:
        return Undecoded(count, items)
    names = getattr(features[label], "names", None)
    labels, missing = [], None
    for where, value in column(label, None):
        if value is None or (names is not None and value == -1):  # the hub writes "no label" as -1
            missing = missing or where
        elif names is not None and not 0 <= value < len(names):
            raise DataError(f"{where}: {label}={value}, but there are {len(names)} classes")
        else:
            labels.append(value)
    if missing and labels:
        raise DataError(f"{missing}: there is no {label}, while other rows have one")
    return Undecoded(count, items, labels or None, None if names is None else tuple(names), some)


def _encoded(cell: Any) -> Encoded:
    if isinstance(cell, dict):  # the bytes of a file, or only its path
        return cell.get("bytes") or (Path(cell["path"]) if cell.get("path") else None)
    return cell


def _image_column(features: Mapping[str, Any], settings: DataSettings) -> str:
    import datasets

    def holds_images(feature: Any) -> bool:
        return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)

    name = settings.image_column
    if name is not None:
        feature = features.get(name)
        if holds_images(feature) or getattr(feature, "dtype", None) in ("binary", "large_binary"):
            return name
        raise SettingError(f"data.image_column={name}: {_what_is(name, features, 'images')}")
    found = [name for name, feature in features.items() if holds_images(feature)]
    if len(found) == 1:
        return found[0]
    what = f"several columns hold images ({', '.join(found)})" if found else "no column holds images"
    raise DataError(
        f"data.source={settings.source}: {what}; name one in data.image_column. There are: {_listed(features)}"
    )


def _label_column(features: Mapping[str, Any], settings: DataSettings) -> str | None:
    import datasets

    def holds_labels(feature: Any) -> bool:
        kinds = ("int", "uint", "bool", "string", "large_string")
        return isinstance(feature, datasets.ClassLabel | datasets.Value) and feature.dtype.startswith(kinds)

    name = settings.label_column
    if name is not None:
        if holds_labels(features.get(name)):
            return name
        raise SettingError(f"data.label_column={name}: {_what_is(name, features, 'classes, integers or strings')}")
    for name in LABEL_COLUMNS:
        if holds_labels(features.get(name)):
            return name
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    return classes[0] if len(classes) == 1 else None


def _what_is(name: str, features: Mapping[str, Any], wanted: str) -> str:
    what = f"that column does not hold {wanted}" if name in features else "there is no such column"
    return f"{what}. There are: {_listed(features)}"


def _listed(features: Mapping[str, Any]) -> str:
    kinds = ((name, getattr(feature, "dtype", None) or type(feature).__name__) for name, feature in features.items())
    return ", ".join(f"{name} ({kind})" for name, kind in kinds)
