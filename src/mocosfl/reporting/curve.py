"""The picture of a run: loss, contrast accuracy and kNN over its epochs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mocosfl.files import write_atomically

PANELS = (
    ("loss", "loss", 1),
    ("contrast_accuracy", "contrast accuracy, %", 100),
    ("knn_held_out", "kNN, %", 1),
)
SMOOTHING = 40
"""Noisy curves are drawn in the background, with a running mean over 1/40 of the run in front."""


def draw_curve(metrics: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the metrics of a run.

    Args:
        metrics: the lines of metrics.jsonl.
        path: PNG to write.
        title: above the picture.
    """
    shown = [(key, label, scale) for key, label, scale in PANELS if any(key in line for line in metrics)]
    figure = Figure(figsize=(4.2 * max(1, len(shown)), 3.2), layout="constrained", dpi=120)
    figure.suptitle(title)
    for place, (key, label, scale) in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), place + 1)
        epochs = [line["epoch"] for line in metrics if key in line]
        values = [line[key] * scale for line in metrics if key in line]
        if key == "knn_held_out":
            axes.plot(epochs, values, marker="o", markersize=3, color="C2")
            axes.annotate(
                f"{values[-1]:.1f}", (epochs[-1], values[-1]), (-4, 6), textcoords="offset points", ha="right"
            )
            axes.set_title("held-out images, training images as bank", fontsize=8)
        else:
            axes.plot(epochs, values, color="C0", alpha=0.3, linewidth=0.8)
            axes.plot(epochs, running_mean(values), color="C0", marker="o" if len(values) < 3 else None, markersize=3)
        axes.margins(y=0.15)
        axes.set_xlim(left=0)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def running_mean(values: Sequence[float]) -> list[float]:
    """Means over the last 1/``SMOOTHING`` of the values, of each place."""
    window = max(1, len(values) // SMOOTHING)
    means = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        means.append(sum(part) / len(part))
    return means
