"""Nearest neighbours and the map of features, of images that no client trained on."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import mocosfl
from mocosfl.data.federation import federate
from mocosfl.privacy.mixture import fingerprints
from mocosfl.reporting import examples as module
from mocosfl.reporting.examples import NEIGHBOURS, QUERIES, examples, placed
from mocosfl.reporting.page import page
from mocosfl.reporting.report import Missing, Reader
from mocosfl.reporting.sections import Shown
from mocosfl.run import Run

CPU = torch.device("cpu")


def silent(text: str) -> None:
    pass


def reset(folder: Path, changes: dict[str, object]) -> None:
    """Give a run other settings."""
    (folder / "config.yaml").write_text(Run.open(folder).config.updated(changes).to_yaml())


def test_neighbours_are_the_nearest_others(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IMAGES", 120)
    found = examples(finished, CPU, silent)
    assert (found.what, found.total, len(found.images)) == ("test images", 359, 120)
    assert np.bincount(found.labels).tolist() == [12] * 10
    assert found.neighbours.shape == found.similarity.shape == (QUERIES, NEIGHBOURS)
    assert len(set(found.labels[found.queries])) == QUERIES
    features = mocosfl.load_encoder(finished)(torch.from_numpy(found.images) / 255).detach().numpy()
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    for query, nearest, cosines in zip(found.queries, found.neighbours, found.similarity, strict=True):
        others = np.delete(np.arange(120), query)
        order = others[np.argsort(-(features[others] @ features[query]), kind="stable")][:NEIGHBOURS]
        np.testing.assert_allclose(features[nearest] @ features[query], cosines, atol=1e-5)
        np.testing.assert_allclose(features[order] @ features[query], cosines, atol=1e-5)
        assert query not in nearest
    assert found.places.shape == (120, 2)
    again = examples(finished, CPU, silent)
    assert (again.queries == found.queries).all()


def test_images_are_those_of_the_test_split(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IMAGES", 100)
    federation = federate(Run.open(finished).config, silent)
    found = examples(finished, CPU, silent)
    train = federation.splits.train
    trained_on = {image.tobytes() for image in train.gather(federation.train_rows)}
    test = {image.tobytes() for image in federation.splits.test.gather(np.arange(359))}
    assert {image.tobytes() for image in found.images} <= test
    assert len(fingerprints(train, federation.train_rows)) == len(trained_on)
    assert not {image.tobytes() for image in found.images} & trained_on


def test_without_a_test_split_held_out_images_are_taken_and_never_others(
    copied: Callable[[str], Path], tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 8, 8), dtype=np.uint8)
    for place, image in enumerate(pixels):
        target = tmp_path / f"flat/{place:02}.png"
        target.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(target)
    folder = copied("unlabelled")
    reset(folder, {"data.source": str(tmp_path / "flat"), "data.held_out": 0})
    assert "clients trained on every image there is" in examples(folder, CPU, silent).why


@pytest.mark.parametrize(
    ("changes", "files", "why"),
    [
        ({"data.source": "/nowhere/at/all"}, (), "there is no such file or folder"),
        ({"data.size": 16}, (), "another size"),
        ({}, ("encoder.safetensors",), "it is written when training ends"),
    ],
)
def test_what_is_no_longer_there_is_named(
    copied: Callable[[str], Path], changes: dict[str, object], files: tuple[str, ...], why: str
) -> None:
    folder = copied("gone")
    reset(folder, changes)
    for name in files:
        (folder / name).unlink()
    found = examples(folder, CPU, silent)
    assert isinstance(found, Missing)
    assert why in found.why


@pytest.mark.parametrize("kind", ["serve", "flower"])
@pytest.mark.parametrize(("own", "what"), [(None, "served without evaluate_on"), ("digits", None)])
def test_a_served_run_shows_images_of_the_server(
    copied: Callable[[str], Path], own: str | None, what: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IMAGES", 20)
    folder = copied("served")
    facts = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps(facts | {"kind": kind, "evaluate_on": own}))
    reset(folder, {"data.source": "clients-have-them"})
    found = examples(folder, CPU, silent)
    assert found.what == "test images" if what is None else what in found.why


def test_the_map_keeps_neighbours_together() -> None:
    """Three clumps far apart stay three clumps."""
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    features = (5 * np.eye(3, 20)[labels] + rng.normal(size=(90, 20)) / 4).astype(np.float32)
    places = placed(features)
    distances = np.linalg.norm(places[:, None] - places, axis=2)
    np.fill_diagonal(distances, np.inf)
    assert (labels[distances.argmin(axis=1)] == labels).mean() > 0.95
    assert (placed(features) == places).all()
    assert np.isfinite(placed(features[:10])).all()


def test_a_damaged_file_of_the_run_is_named(copied: Callable[[str], Path]) -> None:
    folder = copied("damaged")
    for text in ('{"kind": "tr', "[]"):
        (folder / "data.json").write_text(text)
        assert f"{folder}/data.json cannot be read" in examples(folder, CPU, silent).why


def test_a_dead_encoder_has_no_map(copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """t-SNE would end the process by a segmentation fault."""
    monkeypatch.setattr(module, "IMAGES", 20)
    folder = copied("dead")
    weights = load_file(folder / "encoder.safetensors")
    dead = {name: tensor * (not name.startswith("server.")) for name, tensor in weights.items()}
    save_file(dead, folder / "encoder.safetensors")
    found = examples(folder, CPU, silent)
    assert found.places.why == "all images have the same features"
    section = page([Shown("dead", Reader(folder).read(), found)]).state()["parts"]["map"]
    assert "Nothing to show: all images have the same features." in section
    features = np.full((20, 8), 8**-0.5, np.float32)
    assert "the same features" in placed(np.nextafter(features, features * (np.arange(20) % 2)[:, None])).why
    features[3, 3] = np.nan
    assert placed(features).why == "some features are not finite"
