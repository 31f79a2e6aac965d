"""A partition as a printed table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Group
from rich.table import Table
from rich.text import Text

from mocosfl.files import write_atomically

_TABLE_CLIENTS = 20
_TABLE_CLASSES = 3
NUMBERED_CLIENTS = 30
"""Up to here a client's column is wide enough for its number."""
_COLUMNS = 500  # more would be narrower than two pixels
_NAMED_CLASSES = 50  # more names would overlap
_BLUES = LinearSegmentedColormap.from_list("blues", ["#d3e3f3", "#6baed6", "#2171b5", "#08306b"])


def table(counts: np.ndarray, class_names: Sequence[str] | None) -> Group:
    """The first clients with their largest classes, and a summary of all clients.

    Args:
        counts: images of each client in each class, integer, shape (N, classes). Unlabelled: images of each
            client, shape (N,).
        class_names: one for each class. None: unlabelled.

    Returns:
        Table and summary, to print with rich.
    """
    cells = counts.reshape(len(counts), -1)
    sizes = cells.sum(1)
    summary = f"clients: {len(sizes):,}\nimages: {sizes.sum():,}\nimages a client: {_spread(sizes)}"
    clients = Table()
    clients.add_column("client", justify="right")
    clients.add_column("images", justify="right")
    if class_names is not None:
        summary += f"\nclasses a client: {_spread((cells > 0).sum(1))}"
        clients.add_column("classes", justify="right")
        clients.add_column("images of each class")

    for client, size in enumerate(sizes[:_TABLE_CLIENTS]):
        row = [f"{client}", f"{size:,}"]
        if class_names is not None:
            row += [f"{np.count_nonzero(cells[client])}", _largest_classes(cells[client], class_names)]
        clients.add_row(*(Text(text) for text in row))  # as Text, a class name is never taken for markup
    if len(sizes) > _TABLE_CLIENTS:
        clients.add_row(*["…"] * len(clients.columns))
    return Group(clients, Text(summary))


def draw(counts: np.ndarray, class_names: Sequence[str] | None, path: str | Path, title: str) -> None:
    """Draw the volume of every client and a heat map of clients and classes, as a PNG file.

    Clients too many to be numbered are put in the order of their largest classes, so that those with the
    same classes stand together. Where they are too many for the pixels, neighbours in this order share a
    column: the heat map shows their average, the volumes are dark up to the least and light up to the most.

    Args:
        counts: images of each client in each class, integer, shape (N, classes). Unlabelled: images of each
            client, shape (N,).
        class_names: one for each class. None: unlabelled, and there is no heat map.
        path: the file, in a folder that exists. It is never left half-written.
        title: stands above.

    Raises:
        OSError: the file cannot be written.
    """
    cells = counts.reshape(len(counts), -1)
    clients, classes = cells.shape
    numbered = clients <= NUMBERED_CLIENTS
    order, edges = arranged(cells)
    cells, shared = cells[order], edges[1]

    if class_names is None:
        figure = Figure(figsize=(10, 3.5), layout="constrained")
        volumes = bottom = figure.subplots()
    else:
        height = float(np.clip(0.25 * classes, 2, 9))
        figure = Figure(figsize=(10, height + 2), layout="constrained")
        volumes, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1, height])
        volumes.tick_params("x", length=0)
        _draw_heat_map(bottom, cells, edges, class_names)
    _draw_volumes(volumes, cells.sum(1), edges)

    volumes.set_title(title, parse_math=False)
    if numbered:
        bottom.set_xticks(np.arange(clients) + 0.5, [str(client) for client in range(clients)])
        bottom.set_xlabel("client")
    else:
        by = "volume" if class_names is None else "largest class"
        columns = f", {shared} a column" if shared > 1 else ""
        bottom.set_xlabel(f"{clients:,} clients in order of their {by}{columns}")
        bottom.xaxis.set_major_formatter("{x:,.0f}")
    write_atomically(Path(path), lambda file: figure.savefig(file, format="png", dpi=150))


def arranged(cells: np.ndarray, columns: int = _COLUMNS) -> tuple[np.ndarray, np.ndarray]:
    """The order in which clients are drawn, and which of them share a column.

    Args:
        cells: images of each client in each class, shape (N, classes).
        columns: at most.

    Returns:
        Clients, (N,), as they are numbered or, where they are too many for that, by their largest classes; and the
        places in this order at which columns begin and end, (columns + 1,).
    """
    clients, classes = cells.shape
    order = np.arange(clients)
    if clients > NUMBERED_CLIENTS:
        largest = np.argsort(-cells, axis=1, kind="stable")
        order = np.lexsort((-cells.sum(1), largest[:, min(1, classes - 1)], largest[:, 0]))
    shared = -(-clients // columns)
    return order, np.append(np.arange(0, clients, shared), clients)


def shared_by_columns(cells: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Means over the clients of each column, (columns, classes)."""
    return np.add.reduceat(cells, edges[:-1], axis=0) / np.diff(edges)[:, None]


def _draw_volumes(axes: Axes, sizes: np.ndarray, edges: np.ndarray) -> None:
    for bound, colour in ((np.maximum, "#a9cbe6"), (np.minimum, "#2171b5")):
        axes.stairs(bound.reduceat(sizes, edges[:-1]), edges, fill=True, color=colour)
    axes.vlines(edges, 0, sizes.max(), color=_lines(edges))
    axes.set_xlim(0, edges[-1])
    axes.set_ylim(0, 1.1 * sizes.max())
    axes.set_ylabel("images" if edges[1] == 1 else "least and\nmost images")
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_heat_map(axes: Axes, cells: np.ndarray, edges: np.ndarray, class_names: Sequence[str]) -> None:
    classes, widths = cells.shape[1], np.diff(edges)
    average = shared_by_columns(cells, edges)
    mesh = axes.pcolormesh(
        edges,
        np.arange(classes + 1),
        np.ma.masked_equal(average.T, 0),  # none stays white, well apart from few
        cmap=_BLUES,
        vmin=0,
        edgecolors=_lines(edges),
    )
    axes.figure.colorbar(
        mesh,
        ax=axes,
        label=f"{'images' if widths[0] == 1 else 'average images'} of a class; white: none",
        pad=0.01,
        aspect=np.clip(classes / 2, 20, 50),
        format="{x:,g}",
    )
    named = np.arange(0, classes, -(-classes // _NAMED_CLASSES))
    axes.set_yticks(named + 0.5, [short(class_names[label]) for label in named], parse_math=False)
    axes.tick_params("y", length=0, labelsize=9 if len(named) <= 30 else 7)
    axes.set_ylabel("class")
    axes.invert_yaxis()


def _lines(edges: np.ndarray) -> str:
    """Colour of the lines between clients; narrow columns would vanish behind them."""
    return "white" if len(edges) <= NUMBERED_CLIENTS + 1 else "none"


def _spread(values: np.ndarray) -> str:
    median = f"{np.median(values):,.1f}".removesuffix(".0")
    return f"least {values.min():,}, median {median}, most {values.max():,}"


def _largest_classes(images: np.ndarray, class_names: Sequence[str]) -> str:
    largest = np.argsort(-images, kind="stable")[: np.count_nonzero(images)]
    shown = [f"{short(class_names[label])}: {images[label]:,}" for label in largest[:_TABLE_CLASSES]]
    if len(largest) > _TABLE_CLASSES:
        shown.append(f"+{len(largest) - _TABLE_CLASSES}")
    return ", ".join(shown)


def short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"
