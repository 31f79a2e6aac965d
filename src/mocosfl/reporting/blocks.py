"""What a page is made of: sections, and blocks that know nothing of runs. ``templates/parts.html`` draws them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Note:
    """A paragraph."""

    text: str
    missing: bool = False
    kind: str = field(default="note", init=False)


@dataclass(frozen=True)
class Plot:
    """A figure for plotly.

    Attributes:
        name: unique on the page.
        title: above it; may be empty.
        says: for those who cannot see it.
        figure: data and layout; colours are names of CSS variables, ``var(--c0)``.
        height: in pixels.
    """

    name: str
    title: str
    says: str
    figure: dict[str, Any]
    height: int = 300
    kind: str = field(default="plot", init=False)


@dataclass(frozen=True)
class Table:
    """Attributes: ``head``, ``rows`` of as many texts, and the numbers of those that are ``marked``."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[int] = frozenset()
    caption: str = ""
    kind: str = field(default="table", init=False)


@dataclass(frozen=True)
class Folded:
    """Blocks that are seen when asked for."""

    title: str
    blocks: Sequence[Block]
    kind: str = field(default="folded", init=False)


@dataclass(frozen=True)
class Beside:
    """Blocks beside each other, where there is room: as a grid of plots, or a column for each run."""

    columns: Sequence[Column]
    kind: str = field(default="beside", init=False)


@dataclass(frozen=True)
class Column:
    """Attributes: ``title`` above it, the number of the run that it is of, if any, and its ``blocks``."""

    blocks: Sequence[Block]
    title: str = ""
    run: int | None = None


@dataclass(frozen=True)
class Cell:
    """An example.

    Attributes:
        source: of the picture; None where no pictures are wanted.
        says: what it is, for those who cannot see it.
        label, below: under it.
        same: whether its class is that of the query; None where that is not known, or it is the query.
    """

    source: str | None
    says: str
    label: str
    below: str = ""
    same: bool | None = None


@dataclass(frozen=True)
class Gallery:
    """Rows of pictures: a query, and its neighbours."""

    rows: Sequence[Sequence[Cell]]
    kind: str = field(default="gallery", init=False)


@dataclass(frozen=True)
class Picture:
    """Attributes: ``source`` of the picture, and what it ``says``."""

    source: str
    says: str
    kind: str = field(default="picture", init=False)


Block = Note | Plot | Table | Folded | Beside | Gallery | Picture


@dataclass(frozen=True)
class Section:
    """Attributes: ``name`` as an anchor, ``title``, how to read it (``text``), and its ``blocks``."""

    name: str
    title: str
    text: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Tile:
    """A headline figure: its label, and for each run the figure and a remark."""

    label: str
    figures: Sequence[tuple[str, str]]


def plots_of(blocks: Iterable[Block]) -> Iterable[Plot]:
    for block in blocks:
        if isinstance(block, Plot):
            yield block
        elif isinstance(block, Folded):
            yield from plots_of(block.blocks)
        elif isinstance(block, Beside):
            for column in block.columns:
                yield from plots_of(column.blocks)
