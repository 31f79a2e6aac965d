"""Tables and pictures of audits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from torch import Tensor

from mocosfl.files import write_atomically

SHOWN = 16
"""Images in the picture, the first ones."""

COLUMNS = {
    "mse": ("MSE", "{:.4f}"),
    "psnr": ("PSNR, dB", "{:.1f}"),
    "ssim": ("SSIM", "{:.3f}"),
    "identified": ("recognised", "{:.1f} %"),
    "lpips": ("LPIPS", "{:.3f}"),
}


def table(report: dict[str, Any]) -> Table:
    """The scores of every attack, the worst of them, and what guessing gives.

    Args:
        report: as in privacy.json.
    """
    shown = [name for name in COLUMNS if name in report["worst"]]
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column(f"attack on {report['images']} images of client {report['client']}")
    for name in shown:
        made.add_column(COLUMNS[name][0], justify="right")

    def row(title: str, scores: dict[str, float], style: str = "", end: bool = False) -> None:
        made.add_row(title, *(COLUMNS[name][1].format(scores[name]) for name in shown), style=style, end_section=end)

    for place, (name, scores) in enumerate(report["attacks"].items()):
        row(f"{name}: {scores['what']}", scores, end=place == len(report["attacks"]) - 1)
    row("the worst of each", {name: report["worst"][name]["value"] for name in shown}, "bold")
    row("for comparison: the mean image", report["mean image"])
    return made


def draw_reconstructions(
    originals: Tensor, reconstructions: dict[str, Tensor], report: dict[str, Any], path: Path
) -> None:
    """Draw the first images, and below them what every attack made of them.

    Args:
        originals: (n, C, S, S) in [0, 1].
        reconstructions: of every attack, of the same shape.
        report: as in privacy.json; for the scores beside the pictures.
        path: PNG to write.
    """
    rows = {"original": originals, **reconstructions}
    columns = min(SHOWN, len(originals))
    figure = Figure(figsize=(1.9 + 0.72 * columns, 0.4 + 0.75 * len(rows)), dpi=130)
    figure.suptitle(f"{report['run']}: what the server could see of client {report['client']}", fontsize=10)
    grid = figure.add_gridspec(
        len(rows),
        columns,
        left=1.6 / figure.get_figwidth(),
        right=0.995,
        top=0.93,
        bottom=0.01,
        wspace=0.04,
        hspace=0.06,
    )
    for line, (name, images) in enumerate(rows.items()):
        label = name
        if name in report["attacks"]:
            scores = report["attacks"][name]
            label += f"\nMSE {scores['mse']:.4f}\nSSIM {scores['ssim']:.2f}"
        for place, image in enumerate(images[:columns].cpu().float().permute(0, 2, 3, 1).numpy()):
            axes = figure.add_subplot(grid[line, place])
            axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            if place == 0:
                axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def comparison(rows: Sequence[dict[str, Any]]) -> Table:
    """Runs side by side.

    Args:
        rows: as ``privacy.audit.compare`` gives them.
    """
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("run", "kNN", "probe", "MSE", "SSIM", "recognised", "KiB up", "down"):
        made.add_column(title, justify="left" if title == "run" else "right", overflow="fold")
    for row in rows:
        made.add_row(
            row["name"],
            *("-" if row[key] is None else f"{row[key]:.2f} %" for key in ("knn", "linear_probe")),
            f"{row['mse']:.4f}",
            f"{row['ssim']:.3f}",
            f"{row['identified']:.1f} %",
            f"{row['up'] / 1024:g}",
            f"{row['down'] / 1024:g}",
        )
    made.caption = "scores of the worst attack; up and down: sent and received by a client for an image and epoch"
    return made


def draw_comparison(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the trade-off: accuracy against the worst MSE and the worst SSIM, and what is sent.

    Args:
        rows: as ``privacy.audit.compare`` gives them.
        path: PNG to write.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained", dpi=120)
    accuracy = "linear_probe" if all(row["linear_probe"] is not None for row in rows) else "knn"
    for place, (key, label) in enumerate(
        (("mse", "worst MSE (right: safer)"), ("ssim", "worst SSIM (left: safer)")), start=1
    ):
        axes = figure.add_subplot(1, 2, place)
        for row in rows:
            if row[accuracy] is None:
                continue
            size = 40 + 4 * (row["up"] + row["down"]) / 1024
            axes.scatter(row[key], row[accuracy], s=size, alpha=0.6)
            axes.annotate(
                f"{row['name']} ({(row['up'] + row['down']) / 1024:.0f} KiB)",
                (row[key], row[accuracy]),
                (0, math.sqrt(size) / 2 + 4),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        axes.set_xlabel(label)
        axes.set_ylabel("linear probe, %" if accuracy == "linear_probe" else "kNN, %")
        axes.margins(0.25)
        axes.grid(alpha=0.25)
    figure.suptitle("area: bytes for an image and epoch", fontsize=9)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))
