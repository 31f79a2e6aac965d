"""Takes the images out of parquet files: ``python -m mocosfl_device.parquet OUT COLUMN FILE ...`` writes OUT.bin, the
encoded images one after the other, and OUT.npy, where each of them ends. Needs pyarrow."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import IO

import numpy as np

ROWS = 64
"""Rows that are read at a time."""


class Unwritable(Exception):
    """The cache folder is full, or may not be written to."""


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("wb", buffering=0)
    except OSError as error:
        raise Unwritable(error.strerror) from error


def _written(file: IO[bytes], data: bytes) -> int:
    left = memoryview(data)
    try:
        while left:
            left = left[file.write(left) :]
        return len(data)
    except OSError as error:
        raise Unwritable(error.strerror) from error


def unpack(out: Path, column: str, files: list[Path]) -> None:
    """Write what ``images.Pack`` reads.

    Args:
        out: path without its ending.
        column: that holds the images; empty for the only one that does.
        files: parquet files.

    Raises:
        SystemExit: with a message, if they cannot be read.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise SystemExit(
            f"data={files[0]}: reading parquet files needs pyarrow: pip install 'mocosfl-client[parquet]', or give a "
            "folder of images"
        ) from None

    def holds_images(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    ends, end, part = [], 0, out.with_suffix(f".{os.getpid()}")
    path = files[0]
    try:
        with _opened(part) as file:
            for path in files:
                parquet = pq.ParquetFile(path)
                found = [field.name for field in parquet.schema_arrow if holds_images(field.type)]
                if column:
                    found = [name for name in found if name == column]
                if len(found) != 1:
                    names = ", ".join(f"{field.name} ({field.type})" for field in parquet.schema_arrow)
                    what = f"image_column={column} holds no images" if column else f"{len(found)} columns hold images"
                    raise SystemExit(f"{path}: {what}; there are {names}. Name one with --image-column")
                for batch in parquet.iter_batches(ROWS, columns=found):
                    for cell in batch.column(0).to_pylist():
                        image = cell.get("bytes") if isinstance(cell, dict) else cell
                        end += _written(file, image or b"")
                        ends.append(end)
        part.replace(out.with_suffix(".bin"))
        with _opened(part) as file:
            np.save(file, np.array(ends, np.int64))
        part.replace(out.with_suffix(".npy"))
    except Unwritable as error:
        raise SystemExit(f"cannot write to {out.parent} ({error}); MOCOSFL_CACHE names another folder") from None
    except (OSError, pa.ArrowException) as error:
        raise SystemExit(f"{path}: cannot be read ({error})") from None
    finally:
        part.unlink(missing_ok=True)


if __name__ == "__main__":
    unpack(Path(sys.argv[1]), sys.argv[2], [Path(name) for name in sys.argv[3:]])
