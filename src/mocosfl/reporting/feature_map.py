"""The map of the features of some images, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mocosfl.files import write_atomically
from mocosfl.reporting.partition import short

NAMED = 20
"""Classes that have a colour of their own and a line in the legend; more are told apart by a scale of colours."""


def draw_map(
    places: NDArray[np.float32], labels: NDArray[np.int64], classes: Sequence[str], path: Path, title: str
) -> None:
    """Draw a point for each image, in the colour of its class.

    Args:
        places: (n, 2), as ``mocosfl.reporting.examples.placed`` finds them.
        labels: (n,) class numbers.
        classes: their names.
        path: PNG to write, in a folder that exists.
        title: above the picture.

    Raises:
        OSError: the file cannot be written.
    """
    named, (x, y) = len(classes) <= NAMED, places.T
    colours = matplotlib.colormaps["tab10" if len(classes) <= 10 else "tab20" if named else "turbo"]
    figure = Figure(figsize=(7.5 if named else 7, 6), layout="constrained", dpi=120)
    axes = figure.add_subplot()
    if named:
        points = [
            axes.scatter(x[labels == number], y[labels == number], s=12, color=colours(number), linewidths=0)
            for number in range(len(classes))
        ]
        legend = figure.legend(points, ["x"] * len(points), loc="outside right upper", markerscale=2, frameon=False)
        for text, name in zip(legend.get_texts(), classes, strict=True):
            text.set_parse_math(False)
            text.set_text(short(name))  # not as a label: one that begins with _ would be left out
    else:
        points = [axes.scatter(x, y, s=12, c=labels, cmap=colours, vmin=0, vmax=len(classes) - 1, linewidths=0)]
        figure.colorbar(points[0], ax=axes, label="class number", pad=0.01)
    axes.set_title(title, parse_math=False)
    axes.set_aspect("equal", "datalim")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color("0.8")
    write_atomically(path, lambda file: figure.savefig(file, format="png"))
