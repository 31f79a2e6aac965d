"""Features of a user's images, as a parquet file."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

import mocosfl
from mocosfl import embedding
from mocosfl.cli import main
from mocosfl.config import Config, DataSettings
from mocosfl.data.sources import load_unlabelled
from mocosfl.embedding import embed
from mocosfl.encoder import Encoder
from mocosfl.errors import DataError, RunError, SettingError
from mocosfl.exporting.export import export
from mocosfl.run import Run


def finished(folder: Path, channels: int, size: int) -> Run:
    config = Config().updated({"model.width": 4, "model.server_norm": "batch"})
    run = Run.create(folder, config)
    encoder = Encoder(config.model, channels, size, seed=2)
    encoder.std.fill_(0.3)
    encoder.save(run.path, {})
    return run


def features(path: Path) -> np.ndarray:
    return np.stack(pq.read_table(path)["features"].to_numpy())


@pytest.fixture
def pictures(tmp_path: Path, photos: Callable[..., Tensor]) -> Path:
    """Class folders in two splits: 9 images of 20x20 pixels."""
    folder = tmp_path / "pictures"
    for number, image in enumerate(photos(9, 20)):
        path = folder / ("train" if number < 6 else "test") / ("cat" if number % 2 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(path)
    return folder


def test_a_folder_of_images(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "ROWS", 2)
    monkeypatch.setattr("mocosfl.data.decode.CHUNK", 2)
    run = finished(tmp_path / "run", 3, 16)
    assert embed(run.path, str(pictures), tmp_path / "new" / "f.parquet") == 9
    file = pq.ParquetFile(tmp_path / "new" / "f.parquet")
    assert file.num_row_groups == 5  # two images each, and one of the test split alone
    assert file.schema_arrow.names == ["file", "split", "label", "features"]
    rows = file.read().to_pylist()
    assert sorted(row["file"] for row in rows) == sorted(
        path.relative_to(pictures).as_posix() for path in pictures.rglob("*.png")
    )
    encoder = mocosfl.load_encoder(run.path)
    for row in rows:
        split, label, _ = row["file"].split("/")
        assert (row["split"], row["label"]) == (split, label)
    for split in ("train", "test"):
        settings = DataSettings(source=str(pictures), size=16, train_split=split)
        images = torch.from_numpy(np.array(load_unlabelled(settings).images)).float() / 255
        of_split = [row["features"] for row in rows if row["split"] == split]
        np.testing.assert_allclose(of_split, encoder(images).detach().numpy(), atol=1e-6)
    metadata = {key.decode(): value.decode() for key, value in file.schema_arrow.metadata.items()}
    assert metadata["mocosfl.run"] == "run"  # and no path of this machine
    assert json.loads(metadata["mocosfl.model"])["backbone"] == "resnet18"
    assert metadata["mocosfl.images"] == "3x16x16"
    assert metadata["mocosfl.features"] == str(encoder.features)
    assert metadata["mocosfl.normalised"] == "no"


def test_the_command_on_digits_from_run_and_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    run = finished(Path("run"), 1, 8)
    export(run.path, formats=["huggingface"])
    assert main(["embed", "run", "--data", "digits"]) == 0
    assert "features.parquet: 32 features of 1,797 images" in capsys.readouterr().out
    assert main(["embed", "run/export", "--data", "digits", "--out", "b.parquet"]) == 0
    table = pq.read_table("features.parquet")
    assert table.column_names == ["row", "split", "label", "features"]
    assert table["row"].to_pylist() == list(range(1797))
    assert table["label"].to_pylist()[:10] == [str(digit) for digit in range(10)]
    assert np.array_equal(features(Path("features.parquet")), features(Path("b.parquet")))
    assert main(["embed", "run", "--data", "digits"]) == 1
    assert "features.parquet is already there; replace it with --overwrite" in capsys.readouterr().err
    assert main(["embed", "run", "--data", "digits", "--overwrite"]) == 0


def test_damaged_images(tmp_path: Path, pictures: Path) -> None:
    run, out = finished(tmp_path / "run", 3, 16), tmp_path / "f.parquet"
    whole = tmp_path / "whole.parquet"
    embed(run.path, str(pictures), whole)
    victim = pictures / "train" / "cat" / "3.png"
    victim.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"3\.png: cannot be decoded .*; --skip-corrupt leaves such images out"):
        embed(run.path, str(pictures), out)
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []
    assert not out.exists()
    assert embed(run.path, str(pictures), out, skip_corrupt=True) == 8
    kept = {row["file"]: row for row in pq.read_table(out).to_pylist()}
    before = {row["file"]: row for row in pq.read_table(whole).to_pylist()}
    assert before.keys() - kept.keys() == {"train/cat/3.png"}
    for name, row in kept.items():
        np.testing.assert_allclose(row["features"], before[name]["features"], atol=1e-6)
        assert (row["split"], row["label"]) == (before[name]["split"], before[name]["label"])
    for path in pictures.rglob("*.png"):
        path.write_bytes(b"no image")
    none = tmp_path / "none.parquet"
    with pytest.raises(DataError, match=f"--data {pictures}: none of its 9 images can be decoded"):
        embed(run.path, str(pictures), none, skip_corrupt=True)
    assert not none.exists()


def test_unlabelled_images_and_numbers_as_labels(tmp_path: Path, pictures: Path) -> None:
    import datasets

    run = finished(tmp_path / "run", 3, 16)
    assert embed(run.path, str(pictures / "train" / "cat"), tmp_path / "a.parquet") == 3
    assert pq.read_schema(tmp_path / "a.parquet").names == ["file", "split", "features"]
    images = [Image.open(path).copy() for path in sorted((pictures / "train" / "cat").iterdir())]
    table = datasets.Dataset.from_dict({"x": images, "label": [7, 5, 7]}).cast_column("x", datasets.Image())
    table.to_parquet(tmp_path / "table.parquet")
    assert embed(run.path, str(tmp_path / "table.parquet"), tmp_path / "b.parquet") == 3
    table = pq.read_table(tmp_path / "b.parquet")
    assert table["row"].to_pylist() == [0, 1, 2]
    assert table["label"].to_pylist() == [7, 5, 7]
    np.testing.assert_allclose(features(tmp_path / "a.parquet"), features(tmp_path / "b.parquet"), atol=1e-6)


def test_errors_name_flags(tmp_path: Path, pictures: Path) -> None:
    run, out = finished(tmp_path / "run", 3, 16), tmp_path / "f.parquet"
    with pytest.raises(DataError, match="--data /none: there is no such file or folder"):
        embed(run.path, "/none", out)
    with pytest.raises(RunError, match="is not a run"):
        embed(tmp_path, str(pictures), out)
    (run.path / "encoder.safetensors").unlink()
    with pytest.raises(RunError, match=r"encoder\.safetensors is missing \(it is written when training ends\)"):
        embed(run.path, str(pictures), out)
    with pytest.raises(SettingError, match="device=quantum"):
        embed(finished(tmp_path / "other", 3, 16).path, str(pictures), out, device="quantum")
    assert not out.exists()
