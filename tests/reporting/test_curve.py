from pathlib import Path

import numpy as np
from PIL import Image

from mocosfl.reporting.curve import draw_curve

LINES = [{"step": s, "epoch": s / 10, "loss": 7 - s / 50, "contrast_accuracy": s / 200} for s in range(1, 100)]
KNN = [{"step": s, "epoch": s / 10, "knn_held_out": 30.0 + s / 10} for s in range(0, 101, 20)]


def ink(path: Path) -> tuple[int, int]:
    """Width of the picture, and how many of its pixels are not white."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("L"))
    return pixels.shape[1], int((pixels < 250).sum())


def test_one_panel_for_each_metric_there_is(tmp_path: Path) -> None:
    draw_curve(LINES + KNN, tmp_path / "all.png", "all")
    draw_curve(LINES, tmp_path / "unlabelled.png", "no kNN")
    (three, ink_of_three), (two, ink_of_two) = ink(tmp_path / "all.png"), ink(tmp_path / "unlabelled.png")
    assert three * 2 == two * 3
    assert ink_of_three > ink_of_two > 5000


def test_a_run_of_one_line_can_be_drawn(tmp_path: Path) -> None:
    draw_curve(LINES[:1], tmp_path / "one.png", "one line")
    assert ink(tmp_path / "one.png")[1] > 2000
