"""Where a client without PyTorch has its images from."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mocosfl.config import DataSettings
from mocosfl.data.sources import load_unlabelled
from mocosfl_device import images
from mocosfl_device.errors import DataError
from mocosfl_device.images import Folder, Pack, Spool, decoded, source_of
from mocosfl_device.pixels import opened


def picture(path: Path, grey: int = 0, size: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (size, size), grey).save(path)
    return path


def ignore(text: str) -> None:
    """Say nothing."""


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets time pass: ``later(3)``."""
    passed, now, monotonic = [0.0], time.time, time.monotonic
    monkeypatch.setattr(images.time, "time", lambda: now() + passed[0])
    monkeypatch.setattr(images.time, "monotonic", lambda: monotonic() + passed[0])

    def let_pass(seconds: float) -> None:
        passed[0] += seconds

    return let_pass


def test_a_folder_is_read_as_mocosfl_join_reads_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("b/2.png", "a/10.png", "a/9.png", "c.d/1.PNG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 13, 3), np.uint8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    picture(tmp_path / ".hidden/1.png")
    source = source_of(tmp_path, False, None, ignore)
    theirs = load_unlabelled(DataSettings(source=str(tmp_path), size=8), ignore).gather(np.arange(4))
    assert np.array_equal(np.stack([decoded(source, n, 8, 3) for n in range(len(source))]), theirs)


@pytest.mark.parametrize(
    ("files", "train"),
    [
        (["train/a/1.png", "test/a/1.png"], 1),
        (["train/a/1.png", "car/1.png"], 2),  # a class of vehicles
        (["train-1.png", "test-1.png"], 2),
    ],
)
def test_of_a_data_set_the_training_part_is_used(files: list[str], train: int, tmp_path: Path) -> None:
    for name in files:
        picture(tmp_path / name)
    assert len(Folder(tmp_path)) == train
    assert len(load_unlabelled(DataSettings(source=str(tmp_path), channels=1), ignore)) == train


def test_a_folder_of_links_and_one_without_a_training_part(tmp_path: Path) -> None:
    picture(tmp_path / "elsewhere/1.png")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/a").symlink_to(tmp_path / "elsewhere")
    assert len(Folder(tmp_path / "links")) == 1
    for name in ("validation/a/1.png", "test/a/1.png"):
        picture(tmp_path / "more" / name)
    with pytest.raises(DataError, match="there are test, validation and no train"):
        Folder(tmp_path / "more")


def table(path: Path, **columns: list) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def test_parquet_is_unpacked_once_by_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOCOSFL_CACHE", str(tmp_path / "cache"))
    encoded = [picture(tmp_path / f"{grey}.png", grey).read_bytes() for grey in (10, 20, 30)]
    cells = [{"bytes": data, "path": None} for data in encoded]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/data").mkdir()
    table(tmp_path / "data/data/train-00000-of-00002.parquet", img=cells[:2], label=[0, 1])
    table(tmp_path / "data/data/train-00001-of-00002.parquet", img=cells[2:], label=[0])
    table(tmp_path / "data/data/test-00000-of-00001.parquet", img=cells, label=[0, 1, 0])
    said: list[str] = []
    for _ in range(2):
        source = source_of(tmp_path / "data", False, None, said.append)
        assert [source.encoded(n) for n in range(len(source))] == encoded
    assert len(said) == 1
    assert "unpacking 2 parquet files" in said[0]
    source.drop(1)
    assert [source.encoded(n) for n in range(len(source))] == [encoded[0], encoded[2]]
    assert source.name(1) == f"row 2 of {tmp_path / 'data'}"


def test_parquet_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOCOSFL_CACHE", str(tmp_path / "cache"))
    two = table(tmp_path / "two.parquet", a=[b"x"], b=[b"y"])
    with pytest.raises(DataError, match=r"two\.parquet: 2 columns hold images; there are a \(binary\), b \(binary\)"):
        Pack(two, None, ignore)
    assert len(Pack(two, "b", ignore)) == 1
    with pytest.raises(DataError, match="image_column=c holds no images"):
        Pack(two, "c", ignore)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"broken\.parquet: cannot be read"):
        Pack(broken, None, ignore)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix not in (".bin", ".npy")]
    monkeypatch.setenv("MOCOSFL_CACHE", str(two / "cache"))
    with pytest.raises(DataError, match=r"cannot write to .*two\.parquet/cache.*MOCOSFL_CACHE"):
        Pack(two, "a", ignore)


def test_a_folder_that_grows(tmp_path: Path, later: Callable[[float], None]) -> None:
    source = source_of(tmp_path, True, None, ignore)
    assert isinstance(source, Spool)
    assert len(source) == 0
    second = picture(tmp_path / "a.png")
    later(5)
    source.look()
    assert source.files == [second]
    first, half = picture(tmp_path / "z.png"), tmp_path / "0.png"
    half.write_bytes(first.read_bytes()[:20])
    os.utime(half, (time.time() + 1, time.time() + 1))
    source.look()  # too soon: what is new may not be complete
    assert source.files == [second]
    later(5)
    source.look()
    assert source.files == [second, first, half]  # in the order in which they came
    with pytest.raises(DataError, match=r"0\.png: cannot be decoded"):
        decoded(source, 2, 8, 1)
    source.drop(2)
    later(5)
    source.look()
    assert source.files == [second, first]  # a damaged one is not taken again
    picture(half)
    later(5)
    source.look()
    assert source.files == [second, first, half]  # until it has changed
    second.unlink()
    with pytest.raises(DataError, match=r"a\.png: cannot be decoded"):
        decoded(source, 0, 8, 1)
    later(5)
    source.look()
    assert source.files == [first, half]
    shutil.rmtree(tmp_path)
    later(5)
    source.look()
    assert source.files == []


@pytest.mark.parametrize(
    ("name", "grows", "message"),
    [
        ("nowhere", False, "there is no such file or folder; accepted are a folder of images"),
        ("file.txt", False, "accepted are a folder of images"),
        ("file.txt", True, "only a folder can grow"),
        ("empty", False, "there are no images"),
    ],
)
def test_what_holds_no_images_is_named(name: str, grows: bool, message: str, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message) as caught:
        source_of(tmp_path / name, grows, None, ignore)
    assert str(tmp_path / name) in str(caught.value)


def test_large_photographs_are_decoded_at_a_fraction_of_their_size(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:1200, :1600]
    photo = np.stack([rows * 255 // 1200, columns * 255 // 1600, 0 * rows + 90], axis=2).astype(np.uint8)
    path = tmp_path / "photo.jpg"
    Image.fromarray(photo).save(path, quality=95)
    assert opened(path).size == (1600, 1200)
    assert opened(path, 32).size == (200, 150)
    assert opened(path, 300).size == (1600, 1200)
    source = Folder(tmp_path)
    whole = Image.open(path).convert("RGB").crop((200, 0, 1400, 1200)).resize((32, 32), Image.Resampling.BOX)
    apart = np.abs(decoded(source, 0, 32, 3).transpose(1, 2, 0).astype(int) - np.asarray(whole).astype(int))
    assert apart.max() <= 3
