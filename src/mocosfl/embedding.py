"""Features of a user's images by a trained encoder, as a parquet file."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from mocosfl.config import DataSettings
from mocosfl.data.decode import Item, Undecoded, decode
from mocosfl.data.images import upload
from mocosfl.data.sources import find_splits
from mocosfl.encoder import CONFIG, Encoder, load_encoder
from mocosfl.errors import DataError, MocosflError, RunError
from mocosfl.experiment import choose_device, prepared
from mocosfl.files import write_atomically
from mocosfl.run import Run

ROWS = 4096
"""Images of a row group: as many features are held in memory before they are written."""

SECONDS_BETWEEN_LINES = 15
"""Where there is no terminal to draw on, a plain line of progress is printed this often."""


def embed(
    run: str | Path,
    data: str,
    out: str | Path,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    skip_corrupt: bool = False,
    device: str = "auto",
    overwrite: bool = False,
    console: Console | None = None,
) -> int:
    """Compute the features of all images of a source, and write them to a parquet file.

    Images are brought to the size and channels of the encoder as for training, decoded and computed a few hundred at a
    time, and never kept. The file has a row for each, split after split, with

    - ``file``: path below ``data``, where the images are files; or ``row``: number within the split, from 0
    - ``split``: name of the split, ``train`` where the source has but one
    - ``label``: name or number of the class, where there are any
    - ``features``: a list of D float32, as the encoder returns them

    Args:
        run: a finished run, or a folder that `mocosfl export` has written.
        data: as ``data.source``.
        out: the file.
        image_column, label_column, skip_corrupt: as in ``data``.
        device: as ``train.device``.
        overwrite: replace the file.
        console: where progress is drawn. Unset: nowhere.

    Returns:
        How many images it holds.

    Raises:
        RunError: there is no trained encoder, or the file is there or cannot be written.
        DataError, SettingError: the images cannot be used, or none of them can be decoded.
    """
    console, out = console or Console(quiet=True), Path(out)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    encoder = _opened(Path(run))
    if out.exists() and not overwrite:
        raise RunError(f"{out} is already there; replace it with --overwrite, or choose another file with --out")
    chosen = choose_device(device)
    encoder.to(chosen)
    notes: Counter[str] = Counter()
    began = time.monotonic()
    with own_words(), prepared(chosen):
        settings = DataSettings(
            source=data,
            size=encoder.size,
            channels=1 if encoder.channels == 1 else 3,
            image_column=image_column,
            label_column=label_column,
            skip_corrupt=skip_corrupt,
        )
        splits = {name: split.read() for name, split in find_splits(settings, say).items()}
        total = sum(split.count for split in splits.values())
        if not total:
            raise DataError(f"data.source={data}: there are no images")
        schema = _schema(splits, Path(run).resolve().name, encoder)
        line = _Line(console, total)
        tables = _tables(splits, schema, encoder, settings, notes, line)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with line:
                write_atomically(out, partial(_write, schema=schema, tables=tables))
        except OSError as error:
            raise RunError(f"cannot write {out}: {error.strerror or error}") from error
    for note, count in sorted(notes.items()):
        say(f"data: {count:,} of {total:,} images {note}")
    seconds = time.monotonic() - began
    say(f"{out}: {encoder.features} features of {line.done:,} images, {line.done / seconds:,.0f} images/s on {chosen}")
    return line.done


def _opened(folder: Path) -> Encoder:
    if (folder / CONFIG).exists():
        return Encoder.from_pretrained(folder)
    return load_encoder(Run.open(folder).path)


@contextmanager
def own_words() -> Iterator[None]:
    """Errors of a source name settings of a run; here they are flags."""
    try:
        yield
    except MocosflError as error:
        text = re.sub(r"\bdata\.source=", "--data ", str(error)).replace("data.skip_corrupt=true", "--skip-corrupt")
        text = re.sub(r"\bdata\.(image|label)_column\b", r"--\1-column", text)
        raise type(error)(text) from error


def _schema(splits: dict[str, Undecoded], run: str, encoder: Encoder) -> pa.Schema:
    labels = [label for split in splits.values() for label in _labels(split) or ()]
    fields = [("file", pa.string()) if _are_files(splits) else ("row", pa.int64()), ("split", pa.string())]
    if labels:
        fields.append(("label", pa.int64() if all(isinstance(label, int) for label in labels) else pa.string()))
    fields.append(("features", pa.list_(pa.float32(), encoder.features)))
    metadata = {
        "mocosfl.run": run,
        "mocosfl.model": json.dumps(encoder.settings.model_dump(mode="json")),
        "mocosfl.images": f"{encoder.channels}x{encoder.size}x{encoder.size}",
        "mocosfl.features": str(encoder.features),
        "mocosfl.normalised": "no",
    }
    return pa.schema(fields, metadata)


def _are_files(splits: dict[str, Undecoded]) -> bool:
    first = next(chain.from_iterable(split.items() for split in splits.values()), None)
    return first is not None and isinstance(first[1], Path) and first[0] == str(first[1])  # a row may name a file too


def _labels(split: Undecoded) -> list[Any] | None:
    """Names of the classes where they have any, else numbers."""
    if split.labels is None or split.names is None:
        return split.labels
    return [split.names[number] for number in split.labels]


def _tables(
    splits: dict[str, Undecoded],
    schema: pa.Schema,
    encoder: Encoder,
    settings: DataSettings,
    notes: Counter[str],
    line: _Line,
) -> Iterator[pa.Table]:
    """Row groups: each is made when it is asked for."""
    root = Path(settings.source).expanduser()
    for name, split in splits.items():
        labels = _labels(split)
        text = labels is not None and schema.field("label").type == pa.string()
        places: dict[int, str] = {}
        columns: dict[str, list[Any]] = {field: [] for field in schema.names if field != "features"}
        features: list[NDArray[np.float32]] = []

        def noted(split: Undecoded = split, places: dict[int, str] = places) -> Iterator[Item]:
            for position, item in enumerate(split.items()):
                places[position] = item[0]
                yield item

        for pixels, positions in decode(noted(), encoder.size, encoder.channels, settings.skip_corrupt, notes):
            with torch.inference_mode():
                features.append(encoder(upload(pixels, encoder.mean.device).float() / 255).float().cpu().numpy())
            for position in positions.tolist():
                if "file" in columns:
                    columns["file"].append(_below(root, places[position]))
                else:
                    columns["row"].append(position)
                columns["split"].append(name)
                if "label" in columns:
                    label = None if labels is None else labels[position]
                    columns["label"].append(str(label) if text and label is not None else label)
            places.clear()
            line.advance(len(positions))
            if len(columns["split"]) >= ROWS:
                yield _table(schema, columns, features)
        if features:
            yield _table(schema, columns, features)
    if not line.done:
        raise DataError(f"data.source={settings.source}: none of its {line.total:,} images can be decoded")


def _below(root: Path, place: str) -> str:
    path = Path(place)
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _table(schema: pa.Schema, columns: dict[str, list[Any]], features: list[NDArray[np.float32]]) -> pa.Table:
    """A table of what has gathered; it starts to gather anew."""
    width = schema.field("features").type.list_size
    numbers = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(features).ravel()), width)
    arrays = [
        numbers if name == "features" else pa.array(columns[name], schema.field(name).type) for name in schema.names
    ]
    features.clear()
    for column in columns.values():
        column.clear()
    return pa.Table.from_arrays(arrays, schema=schema)


def _write(file: IO[bytes], schema: pa.Schema, tables: Iterator[pa.Table]) -> None:
    with pq.ParquetWriter(file, schema) as writer:
        for table in tables:
            writer.write_table(table)


class _Line:
    """Progress: drawn on a terminal, else a line now and then."""

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total, self.done = console, total, 0
        self.bar = Progress(console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("images", total=total)
        self.printed = time.monotonic()

    def __enter__(self) -> None:
        self.bar.start()

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def advance(self, images: int) -> None:
        """So many images more."""
        self.done += images
        self.bar.update(self.task, completed=self.done)
        if not self.console.is_terminal and time.monotonic() - self.printed > SECONDS_BETWEEN_LINES:
            self.printed = time.monotonic()
            self.console.print(f"{self.done:,} of {self.total:,} images", highlight=False)
