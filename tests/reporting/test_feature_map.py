"""The picture of a map of features."""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from mocosfl.reporting.examples import placed
from mocosfl.reporting.feature_map import draw_map


def colours(path: Path) -> set[tuple[int, int, int]]:
    """Colours of many pixels; greys are left out."""
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    found, counts = np.unique(pixels, axis=0, return_counts=True)
    return {tuple(map(int, c)) for c, n in zip(found, counts, strict=True) if n > 30 and np.ptp(c) > 20}


def test_each_class_has_a_colour_of_its_own(tmp_path: Path) -> None:
    """Also where names look like markup, are long, or begin as matplotlib hides them."""
    classes = ["_a", "$x_", "b" * 60, *(f"kind {n}" for n in range(9))]
    labels = np.arange(150) % len(classes)
    places = np.random.default_rng(0).normal(size=(150, 2)).astype(np.float32)
    draw_map(places, labels, classes, tmp_path / "map.png", "t-SNE of $5_ and more")
    assert len(colours(tmp_path / "map.png")) >= len(classes)
    draw_map(places, np.zeros_like(labels), classes, tmp_path / "one.png", "one")
    legend = np.asarray(Image.open(tmp_path / "one.png").convert("RGB"))[:, 800:]
    names = np.asarray(Image.open(tmp_path / "map.png").convert("RGB"))[:, 800:]
    assert (legend == names).all()  # all classes are in the legend, whoever is there


def test_many_classes_share_a_scale(tmp_path: Path) -> None:
    places = np.random.default_rng(0).normal(size=(300, 2)).astype(np.float32)
    draw_map(places, np.arange(300) % 100, [str(n) for n in range(100)], tmp_path / "map.png", "a hundred")
    assert len(colours(tmp_path / "map.png")) > 20


def test_umap_is_told_of_the_number_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in; the real one takes half a minute to compile (below)."""
    told = {}

    class UMAP:
        def __init__(self, **settings: object) -> None:
            told.update(settings)

        def fit_transform(self, features: np.ndarray) -> np.ndarray:
            told["shape"] = features.shape
            return features[:, :2]

    module = ModuleType("umap")
    module.UMAP = UMAP
    monkeypatch.setitem(sys.modules, "umap", module)
    features = np.random.default_rng(0).normal(size=(12, 80)).astype(np.float32)
    assert placed(features, "umap").shape == (12, 2)
    assert told == {"n_neighbors": 11, "random_state": 0, "n_jobs": 1, "shape": (12, 12)}


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")  # of its libraries
def test_umap_keeps_neighbours_together() -> None:
    pytest.importorskip("umap")
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    features = (5 * np.eye(3, 20)[labels] + rng.normal(size=(90, 20)) / 4).astype(np.float32)
    places = placed(features, "umap")
    nearest = np.argsort(np.linalg.norm(places[:, None] - places, axis=2), axis=1)[:, 1:6]
    assert (labels[nearest] == labels[:, None]).all()
    assert (placed(features, "umap") == places).all()
