"""Figures for plotly.js, as data and layout, and pictures as data URLs.

Nothing of plotly's Python is needed for that. Colours are names of CSS variables, which the page replaces: so a figure
is right in the dark and in the light.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mocosfl.footprint.traffic import KINDS
from mocosfl.reporting.blocks import Plot
from mocosfl.reporting.cost import size
from mocosfl.reporting.curve import SMOOTHING
from mocosfl.reporting.examples import Examples
from mocosfl.reporting.partition import NUMBERED_CLIENTS, arranged, shared_by_columns, short
from mocosfl.reporting.report import Held

COLOURS = 8
"""Colours of a page."""
POINTS = 1000
"""Points of a curve, at most."""
BARS = 200
"""Clients that get a bar each, at most."""
CLASSES = 100
"""Rows of a heat map, at most."""
THUMBNAIL, TILE = 64, 32
"""Pixels of an example and of an image beside the map, at most."""


def per_client(name: str, title: str, values: NDArray[np.int64], number: int) -> Plot:
    """A number of each client: a bar each, or all in order where they are many."""
    trace: dict[str, Any] = {"marker": {"color": colour(number)}, "name": ""}
    if len(values) <= BARS:
        trace |= {"type": "bar", "x": list(range(len(values))), "y": values.tolist()}
        trace["hovertemplate"] = "client %{x}: %{y:,} images<extra></extra>"
        axis = "client"
    else:
        places = np.unique(np.linspace(0, len(values) - 1, POINTS // 2).round().astype(int))
        trace |= {
            "type": "scatter",
            "mode": "lines",
            "fill": "tozeroy",
            "line": {"color": colour(number), "shape": "hv"},
        }
        trace |= {"x": (places + 1).tolist(), "y": np.sort(values)[::-1][places].tolist()}
        trace["hovertemplate"] = "%{x:,} clients: %{y:,} images or more<extra></extra>"
        axis = f"{len(values):,} clients in order"
    figure = figure_of([trace], axis, "images", hover="closest")
    figure["layout"]["yaxis"] |= {"rangemode": "tozero"}
    figure["layout"] |= {"bargap": 0.1}
    return Plot(name, title, f"{title}: {axis}", figure, 260)


def curve(
    epochs: NDArray[np.float64], values: NDArray[np.float64], name: str, number: int, points: bool = False
) -> list[dict[str, Any]]:
    """What was logged, pale, and its running mean; the former alone where it is short or smooth."""
    ink = colour(number)
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines",
        "name": plain(name),
        "line": {"color": ink, "width": 2},
    }
    window = len(values) // SMOOTHING
    if points or window < 2:
        x, y = thinned(epochs, values)
        mode = "lines+markers" if points or len(values) == 1 else "lines"
        return [trace | {"x": numbers(x), "y": numbers(y), "mode": mode, "marker": {"size": 5, "color": ink}}]
    x, y = thinned(epochs, values)
    pale = {"line": {"color": ink, "width": 1}, "opacity": 0.3, "hoverinfo": "skip", "showlegend": False}
    mean_x, mean_y = thinned(epochs, running_mean(values, window), POINTS // 2)
    return [
        trace | pale | {"x": numbers(x), "y": numbers(y)},
        trace | {"x": numbers(mean_x), "y": numbers(mean_y)},
    ]


def running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Mean of each value and the ``window`` - 1 before it, as far as there are any; those that are no number are left
    out."""
    known = np.isfinite(values)
    sums = np.cumsum(np.where(known, values, 0.0))
    counts = np.cumsum(known).astype(float)
    sums[window:], counts[window:] = sums[window:] - sums[:-window], counts[window:] - counts[:-window]
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def thinned(
    x: NDArray[np.float64], y: NDArray[np.float64], points: int = POINTS
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fewer points of a curve, as it would look: the least and the greatest of each of many short pieces.

    Args:
        x, y: (n,).
        points: at most; a curve of no more is left as it is.
    """
    if len(y) <= points:
        return x, y
    pieces = points // 2 - 1  # first and last are kept too
    length = -(-len(y) // pieces)
    padded = np.resize(np.arange(len(y)), pieces * length)
    padded[len(y) :] = len(y) - 1
    blocks = y[padded].reshape(pieces, length)
    least, greatest = (np.where(np.isfinite(blocks), blocks, bad) for bad in (np.inf, -np.inf))
    starts = np.arange(pieces) * length
    kept = np.concatenate([starts + least.argmin(axis=1), starts + greatest.argmax(axis=1), [0, len(y) - 1]])
    kept = np.unique(kept.clip(max=len(y) - 1))
    return x[kept], y[kept]


def figure_of(
    traces: list[dict[str, Any]], x: str, y: str, legend: bool = False, hover: str = "x unified"
) -> dict[str, Any]:
    """Data and layout, in the page's colours."""

    def axis(title: str) -> dict[str, Any]:
        lines = dict.fromkeys(("gridcolor", "zerolinecolor", "linecolor"), "var(--line)")
        return {**lines, "automargin": True, "title": {"text": plain(title), "standoff": 6}, "ticks": ""}

    layout = {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "var(--ink)"},
        "margin": {"l": 44, "r": 12, "t": 12, "b": 40},
        "xaxis": axis(x),
        "yaxis": axis(y),
        "hovermode": hover,
        "hoverlabel": {
            "bgcolor": "var(--card)",
            "bordercolor": "var(--line)",
            "font": {"color": "var(--ink)"},
            "namelength": 30,
        },
        "showlegend": legend,
        "legend": {
            "orientation": "h",
            "xref": "container",
            "x": 0.02,
            "yref": "container",
            "y": 0,
            "yanchor": "bottom",
            "traceorder": "normal",
        },
        "uirevision": "kept",  # zoom and hidden lines stay when new data come
    }
    return {"data": traces, "layout": layout}


def numbers(values: NDArray[Any]) -> list[float | None]:
    """For JSON, which has no NaN: six digits are more than a screen shows."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]


def plain(text: str) -> str:
    """For plotly, which takes some HTML in texts."""
    return html.escape(text, quote=False)


def colour(number: int) -> str:
    return f"var(--c{number % COLOURS})"


def _id(key: str) -> str:
    return key.replace("_", "-")


def _distinct(names: Sequence[str]) -> Iterable[str]:
    """Shortened names, no two alike."""
    seen: set[str] = set()
    for number, name in enumerate(map(short, names)):
        seen.add(name := name if name not in seen else f"{name} ({number})")
        yield name


def heat_map(number: int, held: Held) -> Plot:
    assert held.counts is not None
    order, edges = arranged(held.counts)
    cells = held.counts[order]
    shown, classes = shared_by_columns(cells, edges), list(_distinct(held.classes))
    if len(classes) > CLASSES:
        rows = np.linspace(0, len(classes), CLASSES + 1).astype(int)
        shown = np.add.reduceat(shown, rows[:-1], axis=1)
        classes = [
            f"{classes[a]} and {b - a - 1} more" if b - a > 1 else classes[a] for a, b in itertools.pairwise(rows)
        ]
    clients, columns = len(order), len(edges) - 1
    numbered = clients <= NUMBERED_CLIENTS
    if columns == clients:
        labels = [f"client {client}" for client in order]
    else:
        labels = [f"{a + 1:,} to {b:,}" for a, b in itertools.pairwise(edges)]
    each = "images" if columns == clients else "images a client"
    trace = {
        "type": "heatmap",
        "x": labels,
        "y": [plain(name) for name in classes],
        "z": [[None if value == 0 else round(float(value), 2) for value in row] for row in shown.T],
        "colorscale": [[place / 3, f"var(--heat{place})"] for place in range(4)],
        "zmin": 0,
        "zmax": max(1, float(shown.max())),
        "xgap": 1 if columns <= 150 else 0,
        "ygap": 1 if len(classes) <= 30 else 0,
        "hovertemplate": "%{x}<br>%{y}: %{z:,} " + each + "<extra></extra>",
        "colorbar": {"thickness": 10, "outlinewidth": 0, "title": {"text": each, "side": "right"}},
    }
    title = "client" if numbered else f"{clients:,} clients in order of their largest class"
    if columns < clients:
        title += f", {edges[1]:,} a column"
    figure = figure_of([trace], title, "", hover="closest")
    figure["layout"]["xaxis"] |= {"type": "category", "showticklabels": numbered, "showgrid": False, "tickangle": 0}
    figure["layout"]["yaxis"] |= {"type": "category", "autorange": "reversed", "showgrid": False}
    if numbered:
        figure["layout"]["xaxis"] |= {"tickvals": labels, "ticktext": [str(client) for client in order]}
    says = f"Heat map of the images of {clients:,} clients in {len(held.classes)} classes"
    return Plot(
        f"partition-{number}", "Images of each client and class", says, figure, min(120 + 20 * len(classes), 640)
    )


def stacked_bars(name: str, title: str, bars: Sequence[tuple[str, str, dict[str, float]]]) -> Plot:
    """Stacked bars of bytes by kind."""
    traces = []
    for place, kind in enumerate(KINDS):
        values = [amounts.get(kind, 0) for _, _, amounts in bars]
        if not any(values):
            continue
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": kind,
                "y": [plain(label) for label, _, _ in bars],
                "x": numbers(np.array(values, dtype=float)),
                "customdata": [size(value) for value in values],
                "hovertemplate": kind + ": %{customdata}<extra></extra>",
                "marker": {"color": colour(place)},
            }
        )
    figure = figure_of(traces, "", "", legend=True, hover="closest")
    figure["layout"] |= {"barmode": "stack", "bargap": 0.35}
    figure["layout"]["xaxis"] |= {"exponentformat": "SI", "ticksuffix": "B", "nticks": 5}
    figure["layout"]["yaxis"] |= {"type": "category", "autorange": "reversed", "showgrid": False}
    return Plot(name, title, f"{title}, by kind", figure, 130 + 38 * len(bars))


def scatter(number: int, found: Examples, places: NDArray[np.float32], images: bool) -> Plot:
    marks = ("circle", "diamond", "square", "cross", "triangle-up")
    labels = np.zeros(len(found.images), np.int64) if found.labels is None else found.labels
    traces = []
    for mark, label in enumerate(np.unique(labels).tolist()):
        rows = np.flatnonzero(labels == label)
        name = "images" if found.labels is None else plain(short(found.classes[label]))
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "x": numbers(places[rows, 0]),
                "y": numbers(places[rows, 1]),
                "customdata": rows.tolist(),
                "hovertemplate": "%{fullData.name}<extra></extra>",
                "marker": {
                    "color": colour(mark),
                    "symbol": marks[mark // COLOURS % len(marks)],
                    "size": 6,
                    "opacity": 0.8,
                },
            }
        )
    figure = figure_of(traces, "", "", legend=len(traces) <= 20, hover="closest")
    for axis in ("xaxis", "yaxis"):
        figure["layout"][axis] |= {"showticklabels": False, "showgrid": False, "zeroline": False, "showline": False}
    figure["layout"]["yaxis"] |= {"scaleanchor": "x"}
    if images:
        figure["pictures"] = _sheet(found.images)
    says = f"Map of the features of {len(found.images):,} images"
    return Plot(f"map-{number}", "", says, figure, 520)


def _sheet(images: NDArray[np.uint8]) -> dict[str, Any]:
    """All images on one sheet, row by row."""
    side, columns = min(images.shape[-1], TILE), math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("L" if images.shape[1] == 1 else "RGB", (columns * side, rows * side))
    for place, pixels in enumerate(images):
        sheet.paste(_picture(pixels, TILE), (place % columns * side, place // columns * side))
    return {"source": data_url(sheet, "JPEG", quality=85), "side": side, "columns": columns, "rows": rows}


def thumbnail(found: Examples, number: int) -> str:
    return data_url(_picture(found.images[number], THUMBNAIL), "PNG")


def _picture(pixels: NDArray[np.uint8], most: int) -> Image.Image:
    """(C, H, W) uint8 as a picture of so many pixels a side at most."""
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    return picture if picture.width <= most else picture.resize((most, most), Image.Resampling.LANCZOS)


def data_url(picture: Image.Image | bytes, kind: str, **options: Any) -> str:
    """A picture as a data URL."""
    if isinstance(picture, Image.Image):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        picture = buffer.getvalue()
    return f"data:image/{kind.lower()};base64,{base64.b64encode(picture).decode()}"
