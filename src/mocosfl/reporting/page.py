"""The page that shows one or several runs: what it says, and what it draws.

A page is made of sections, sections of blocks, and blocks know nothing of runs; ``templates/`` turns them into HTML, and
plotly.js draws the plots in the browser. A file (``html``) and a page that is still being written (``dashboard``) are
the same page: its parts and its figures (``Page.state``) are either in it, or asked for again and again.
"""

from __future__ import annotations

import base64
import hashlib
import html as markup
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image
from plotly.offline import get_plotlyjs

from mocosfl.config import Config, setting_names
from mocosfl.errors import SettingError
from mocosfl.files import write_atomically
from mocosfl.footprint.traffic import DOWN, KINDS, UP, way
from mocosfl.reporting.cost import size, time
from mocosfl.reporting.curve import SMOOTHING
from mocosfl.reporting.examples import IMAGES, QUERIES, Examples
from mocosfl.reporting.partition import NUMBERED_CLIENTS, arranged, shared_by_columns, short
from mocosfl.reporting.privacy import COLUMNS
from mocosfl.reporting.report import Contents, Held, Missing, layers, running_total

RUNS = 8
"""Runs on one page, at most: more have no colour of their own."""
POINTS = 1000
"""Points of a curve, at most."""
LAYERS = 8
"""Layers whose divergence is drawn, at most: those with the largest."""
BARS = 200
"""Clients that get a bar each, at most."""
CLASSES = 100
"""Rows of a heat map, at most."""
THUMBNAIL, TILE = 64, 32
"""Pixels of an example and of an image beside the map, at most."""
KNN = "kNN accuracy"


# What a page is made of


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
        title: above it.
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
        label: below it.
        same: whether its class is that of the query; None where that is not known, or it is the query.
    """

    source: str | None
    says: str
    label: str
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


@dataclass(frozen=True)
class Live:
    """A run that is under way, as its process knows it.

    Attributes:
        doing: what it is at.
        ended: whether there is nothing more to come.
        step, steps: done, and of the whole run; None before training.
        left: seconds left, about; None where that is not known.
        address: of this page.
        clients: head and rows of the table of connected clients; None for a run without any.
        more: of them than there are rows.
        counts: what is counted at the server, and what that is.
    """

    doing: str
    ended: bool = False
    step: int | None = None
    steps: int | None = None
    left: float | None = None
    clients: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None
    more: int = 0
    counts: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Shown:
    """A run on a page.

    Attributes:
        name: that it goes by.
        contents: of its folder.
        examples: what its encoder makes of some images.
    """

    name: str
    contents: Contents
    examples: Examples | Missing


@dataclass(frozen=True)
class Page:
    """A page that has been put together.

    Attributes:
        title: of the page.
        names: of the runs.
        status: where each of them stands.
        tiles: the headline figures.
        sections: the others, in their order.
        live: of a run that is under way.
        images: whether there are pictures in it.
    """

    title: str
    names: Sequence[str]
    status: Sequence[str]
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    live: Live | None
    images: bool

    def state(self) -> dict[str, Any]:
        """Everything that may change while a run is under way, ready for JSON: parts of the page by name, as HTML, and
        figures by name."""
        template = _templates().get_template("parts.html").module
        parts = {"head": template.head(self), "contents": template.contents(self)}  # type: ignore[attr-defined]
        parts |= {section.name: template.section(section) for section in self.sections}  # type: ignore[attr-defined]
        return {
            "parts": {name: str(part) for name, part in parts.items()},
            "figures": {plot.name: plot.figure for section in self.sections for plot in _plots(section.blocks)},
            "ended": self.live is None or self.live.ended,
        }


def _plots(blocks: Iterable[Block]) -> Iterable[Plot]:
    for block in blocks:
        if isinstance(block, Plot):
            yield block
        elif isinstance(block, Folded):
            yield from _plots(block.blocks)
        elif isinstance(block, Beside):
            for column in block.columns:
                yield from _plots(column.blocks)


def names_of(paths: Sequence[Path]) -> list[str]:
    """What runs are called on a page: their folders' names, with as many of the folders above as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    depth = 1
    while depth < max(map(len, parts)) and len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def page(runs: Sequence[Shown], live: Live | None = None, images: bool = True) -> Page:
    """Put a page together.

    Args:
        runs: beside each other.
        live: of the only one, where it is under way.
        images: whether pictures are put in.

    Raises:
        SettingError: they are too many to tell apart.
    """
    if len(runs) > RUNS:
        raise SettingError(f"{len(runs)} runs: a page shows {RUNS} at most")
    waits = live is not None and not live.ended
    sections = [
        *([_clients(live)] if live is not None and live.clients is not None else []),
        _settings(runs),
        _curves(runs),
        _partition(runs),
        _participation(runs),
        _traffic(runs),
        _time(runs),
        _evaluation(runs, waits),
        _neighbours(runs, images, waits),
        _map(runs, images, waits),
        _privacy(runs, images),
    ]
    names = [run.name for run in runs]
    title = names[0] if len(runs) == 1 else f"{len(runs)} runs"
    return Page(title, names, [_status(run.contents) for run in runs], _tiles(runs), sections, live, images)


def html(made: Page, poll: str | None = None) -> str:
    """The page as one HTML document that needs nothing besides itself.

    Args:
        made: the page.
        poll: where it asks for its state again and again. Unset: it is as it is.
    """
    style, script, plotly = _source("page.css"), _source("page.js"), get_plotlyjs()
    allowed = " ".join(f"'sha256-{_hash(text)}'" for text in (plotly, script))
    return _templates().get_template("page.html").render(
        page=made,
        state=made.state(),
        poll=poll,
        policy=f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        f"connect-src {'none' if poll is None else 'self'!r}".replace("connect-src none", "connect-src 'none'"),
        style=Markup(style),
        script=Markup(script),
        plotly=Markup(plotly),
    )


def write(made: Page, path: Path) -> None:
    """Write the page to a file; an older one is replaced, or untouched if that fails."""
    text = html(made)
    write_atomically(path, lambda file: file.write(text.encode()))


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("mocosfl.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["anchor"] = lambda text: text.replace(" ", "-")
    return environment


def _source(name: str) -> str:
    return (files("mocosfl.reporting") / "templates" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# Headline figures


def _status(run: Contents) -> str:
    steps = f"{run.metrics.step:,} of {run.steps:,} steps" if run.steps else f"{run.metrics.step:,} steps"
    if isinstance(run.result, Missing):
        return f"not finished, {steps}"
    return f"finished, {run.steps:,} steps" if run.steps else "finished"


def _tiles(runs: Sequence[Shown]) -> list[Tile]:
    contents = [run.contents for run in runs]
    makers: list[tuple[str, Callable[[Contents], tuple[str, str]]]] = [
        (KNN, _knn),
        ("linear probe", lambda run: _percent(run, "linear_probe")),
        ("clients", _number),
        ("images of all clients", lambda run: ("–" if run.images is None else f"{run.images:,}", "")),
        ("bytes a client", _bytes_of_client),
        ("time", _whole_time),
    ]
    return [Tile(label, [figure(run) for run in contents]) for label, figure in makers]


def _knn(run: Contents) -> tuple[str, str]:
    if not isinstance(run.evaluation, Missing):
        return _percent(run, "knn")
    last = run.metrics.last("knn_held_out")
    return ("–", "") if last is None or math.isnan(last) else (f"{last:.1f} %", "held-out images, so far")


def _percent(run: Contents, name: str) -> tuple[str, str]:
    if isinstance(run.evaluation, Missing) or name not in run.evaluation:
        return "–", ""
    return f"{run.evaluation[name]:.1f} %", "test images"


def _number(run: Contents) -> tuple[str, str]:
    if run.command == "pretrain":
        return "none", "pre-training on the server"
    config = run.config
    return f"{config.clients.number:,}", f"{config.pool:,} active at a time" if config.pool < config.clients.number else ""


def _bytes_of_client(run: Contents) -> tuple[str, str]:
    if run.measured is not None:
        return size(sum(run.measured) / run.config.clients.number), "both ways, measured, so far"
    if isinstance(run.counted, Missing):
        return "–", ""
    first = next(iter(run.counted.values()))
    return size(sum(first.run.values())), "both ways, counted, whole run"


def _whole_time(run: Contents) -> tuple[str, str]:
    if isinstance(run.result, Missing):
        return time(run.metrics.seconds), "so far"
    seconds = run.result.get("training_seconds", 0) + run.result.get("evaluation_seconds", 0)
    return time(seconds), f"on {run.result['device']}" if "device" in run.result else ""


# Sections


def _clients(live: Live) -> Section:
    """Who is connected."""
    assert live.clients is not None
    head, rows = live.clients
    more = [Note(f"and {live.more:,} more")] if live.more else []
    if not rows:
        more = [Note("no client is connected", missing=True)]
    counts = Folded("What the server has counted", [Table(["", "since it was started"], live.counts)])
    return Section(
        "clients",
        "Connected clients",
        "Who is connected now, with the bytes of its messages. Late in a row: steps that went on without it; heard: "
        "seconds since its last sign of life.",
        [Table(head, rows), *more, counts],
    )


def _settings(runs: Sequence[Shown]) -> Section:
    """Settings that differ first; of a single run, those that are not the defaults."""
    names = setting_names()
    rows = {name: [_value(run.contents.settings[name]) for run in runs] for name in names}
    head = ["setting", *(run.name for run in runs)]
    if len(runs) > 1:
        chosen = [name for name in names if len(set(rows[name])) > 1]
        text = "Settings in which the runs differ come first; they are marked among all settings below."
        nothing = "The runs have the same settings."
    else:
        usual = Config()
        default = {name: _value(_setting(usual, name)) for name in names}
        chosen = [name for name in names if rows[name][0] != default[name]]
        text = "Settings that differ from the defaults; all of them are below."
        nothing = "All settings are the defaults."
    table: Block = Table(head, [[name, *rows[name]] for name in chosen]) if chosen else Note(nothing)
    marked = frozenset(names.index(name) for name in chosen)
    everything = Folded(f"All {len(names)} settings", [Table(head, [[name, *rows[name]] for name in names], marked)])
    return Section("settings", "Settings", text, [table, everything])


def _setting(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _value(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(map(_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _curves(runs: Sequence[Shown]) -> Section:
    """Everything that is logged over the run."""
    panels: list[tuple[str, str, str, float, str]] = [
        ("loss", "Loss", "InfoNCE", 1, ""),
        ("contrast_accuracy", "Contrast accuracy", "%", 100, ""),
        ("knn_held_out", "kNN on held-out images", "%", 1, "there are no held-out images with labels"),
    ]
    columns = []
    for key, title, unit, scale, why in panels:
        columns.append(_panel(runs, key, title, unit, scale, why or "no line has been logged yet"))
    columns += [_rates(runs), _divergence(runs)]
    columns.append(_panel(runs, "spread", "Variance of features", "", 1, "it was not logged"))
    return Section(
        "curves",
        "Curves",
        "Over epochs: how often each training image has been used on average. Pale lines are what was logged, strong "
        "ones the running mean over a fortieth of the run. Loss usually falls, then rises a little as the learning rate "
        "falls and the queue's keys become more alike; accuracies should rise; a variance of features near 0 means "
        "collapse.",
        [Beside(columns)],
    )


def _panel(runs: Sequence[Shown], key: str, title: str, unit: str, scale: float, why: str) -> Column:
    traces: list[dict[str, Any]] = []
    lacking = []
    for number, run in enumerate(runs):
        series = run.contents.metrics.series.get(key)
        if series is None:
            lacking.append(run.name)
            continue
        traces += _curve(series.epochs, series.values * scale, run.name, number, points=key == "knn_held_out")
    if not traces:
        return Column([Note(f"Nothing to draw: {why}.", missing=True)], title)
    plot = Plot(_id(key), title, f"{title} over epochs", _figure(traces, "epoch", unit))
    return Column([plot, *_lacking(lacking, len(runs))], title)


def _rates(runs: Sequence[Shown]) -> Column:
    traces: list[dict[str, Any]] = []
    for number, run in enumerate(runs):
        for key, who, dash in (("server_lr", "server", "solid"), ("client_lr", "clients", "dot")):
            if (series := run.contents.metrics.series.get(key)) is not None:
                name = who if len(runs) == 1 else f"{run.name}: {who}"
                x, y = thinned(series.epochs, series.values)
                line = {"color": _colour(number), "width": 2, "dash": dash}
                traces.append({"type": "scatter", "mode": "lines", "x": _numbers(x), "y": _numbers(y)})
                traces[-1] |= {"name": _text(name), "line": line}
    title = "Learning rates"
    if not traces:
        return Column([Note("Nothing to draw: no line has been logged yet.", missing=True)], title)
    figure = _figure(traces, "epoch", "", legend=len(runs) == 1)
    note = [Note("Dotted: clients.")] if len(runs) > 1 else []
    return Column([Plot("rates", title, "Learning rates of server and clients over epochs", figure), *note], title)


def _divergence(runs: Sequence[Shown]) -> Column:
    title = "Divergence of client halves"
    traces: list[dict[str, Any]] = []
    lacking = []
    for number, run in enumerate(runs):
        series = run.contents.metrics.series.get("divergence")
        if series is None:
            lacking.append(run.name)
            continue
        traces += _curve(series.epochs, series.values, "all layers" if len(runs) == 1 else run.name, number)
    if not traces:
        why = (
            "Nothing to draw: where one half stands for all clients there is none, and otherwise none has been logged."
        )
        return Column([Note(why, missing=True)], title)
    if len(runs) == 1:
        found = [(name, series) for name, series in layers(runs[0].contents.metrics) if len(series)]
        found.sort(key=lambda pair: -pair[1].values[-1])
        for place, (name, series) in enumerate(found[:LAYERS], start=1):
            x, y = thinned(series.epochs, series.values, POINTS // 4)
            line = {"color": _colour(place), "width": 1, "dash": "dot" if place >= RUNS else "solid"}
            traces.append({"type": "scatter", "mode": "lines", "x": _numbers(x), "y": _numbers(y), "line": line})
            traces[-1] |= {"name": _text(name), "opacity": 0.8, "visible": "legendonly" if place > 4 else True}
    figure = _figure(traces, "epoch", "", legend=len(runs) == 1)
    note = Note(
        "How far the clients' weights are from their average just before they are averaged, as a share of its length: "
        "the mean over clients."
    )
    says = "Divergence of the client halves from their average over epochs"
    return Column([Plot("divergence", title, says, figure, 340), note, *_lacking(lacking, len(runs))], title)


def _partition(runs: Sequence[Shown]) -> Section:
    """Who holds what."""

    def blocks(number: int, run: Shown) -> list[Block]:
        held = run.contents.partition
        if isinstance(held, Missing):
            return [_missing(held)]
        if held.counts is None:
            title = "Images of each client"
            return [_per_client(f"partition-{number}", title, held.images, number), _spread("images", held.images)]
        return [_heat_map(number, held), _spread("images", held.images)]

    return Section(
        "partition",
        "Who holds which images",
        "A column is a client and a row a class: the darker (in the dark: the lighter), the more images; an empty place "
        "is none. Few filled places in a column mean that a client sees few classes.",
        _by_run(runs, blocks),
    )


def _heat_map(number: int, held: Held) -> Plot:
    assert held.counts is not None
    order, edges = arranged(held.counts)
    cells = held.counts[order]
    shown, classes = shared_by_columns(cells, edges), list(_distinct(held.classes))
    if len(classes) > CLASSES:
        rows = np.linspace(0, len(classes), CLASSES + 1).astype(int)
        shown = np.add.reduceat(shown, rows[:-1], axis=1)
        classes = [f"{classes[a]} and {b - a - 1} more" if b - a > 1 else classes[a] for a, b in zip(rows, rows[1:], strict=False)]
    clients, columns = len(order), len(edges) - 1
    numbered = clients <= NUMBERED_CLIENTS
    if columns == clients:
        labels = [f"client {client}" for client in order]
    else:
        labels = [f"{a + 1:,} to {b:,}" for a, b in zip(edges, edges[1:], strict=False)]
    each = "images" if columns == clients else "images a client"
    trace = {
        "type": "heatmap",
        "x": labels,
        "y": [_text(name) for name in classes],
        "z": [[None if value == 0 else round(float(value), 2) for value in row] for row in shown.T],
        "colorscale": [[place / 3, f"var(--heat{place})"] for place in range(4)],
        "zmin": 0,
        "xgap": 1 if columns <= 150 else 0,
        "ygap": 1 if len(classes) <= 30 else 0,
        "hovertemplate": "%{x}<br>%{y}: %{z:,} " + each + "<extra></extra>",
        "colorbar": {"thickness": 10, "outlinewidth": 0, "title": {"text": each, "side": "right"}},
    }
    title = "client" if numbered else f"{clients:,} clients in order of their largest class"
    if columns < clients:
        title += f", {edges[1]:,} a column"
    figure = _figure([trace], title, "", hover="closest")
    figure["layout"]["xaxis"] |= {"type": "category", "showticklabels": numbered, "showgrid": False, "tickangle": 0}
    figure["layout"]["yaxis"] |= {"type": "category", "autorange": "reversed", "showgrid": False}
    if numbered:
        figure["layout"]["xaxis"] |= {"tickvals": labels, "ticktext": [str(client) for client in order]}
    says = f"Heat map of the images of {clients:,} clients in {len(held.classes)} classes"
    return Plot(f"partition-{number}", "Images of each client and class", says, figure, min(120 + 20 * len(classes), 640))


def _participation(runs: Sequence[Shown]) -> Section:
    """How often clients took part."""

    def blocks(number: int, run: Shown) -> list[Block]:
        drawn, made = run.contents.participation, list[Block]()
        if isinstance(drawn, Missing):
            made.append(_missing(drawn))
        else:
            never = int((drawn == 0).sum())
            made.append(_per_client(f"participation-{number}", "Images drawn from each client", drawn, number))
            made.append(_spread("images drawn", drawn, f"; {never:,} clients have not taken part" if never else ""))
        series = run.contents.metrics.series
        if "clients" in series:
            made.append(_connected(number, run))
        return made

    return Section(
        "participation",
        "Client participation",
        "How many images the server has had drawn from each client, up to the last checkpoint. With all clients active "
        "they are even; with pools of clients they spread, the less the longer the run.",
        _by_run(runs, blocks),
    )


def _connected(number: int, run: Shown) -> Plot:
    series, traces = run.contents.metrics.series, []
    for place, (key, name) in enumerate((("clients", "connected"), ("stragglers", "late, since the start"))):
        if key in series:
            x, y = thinned(series[key].epochs, series[key].values)
            traces.append({"type": "scatter", "mode": "lines", "x": _numbers(x), "y": _numbers(y), "name": name})
            traces[-1] |= {"line": {"color": _colour(place), "shape": "hv", "width": 2}}
    figure = _figure(traces, "epoch", "clients", legend=True)
    return Plot(f"connected-{number}", "Connected clients", "Connected and late clients over epochs", figure)


def _traffic(runs: Sequence[Shown]) -> Section:
    """Bytes by direction."""
    rows: dict[str, list[str]] = {}
    bars: list[tuple[str, str, dict[str, float]]] = []
    missing: list[Block] = []
    for number, run in enumerate(runs):
        counted, figures = run.contents.counted, dict[str, str]()
        if isinstance(counted, Missing):
            missing.append(_missing(counted, run.name if len(runs) > 1 else ""))
        else:
            for who, traffic in counted.items():
                for name, kinds in (("sends", UP), ("receives", DOWN)):
                    figures[f"{who} {name}, whole run (counted)"] = size(way(traffic.run, kinds))
                    figures[f"{who} {name}, an epoch (counted)"] = size(way(traffic.epoch, kinds))
                    label = f"{who} {name}" if len(runs) == 1 else f"{run.name}: {who} {name}"
                    bars.append((label, name, {kind: traffic.run[kind] for kind in kinds}))
        if run.contents.measured is not None:
            into, out = run.contents.measured
            figures["all clients send, so far (measured)"] = size(into)
            figures["all clients receive, so far (measured)"] = size(out)
        for name, text in figures.items():
            rows.setdefault(name, ["–"] * len(runs))[number] = text
    blocks: list[Block] = []
    if bars:
        blocks.append(_bars("traffic", "Bytes of one client over the whole run", bars))
    blocks += [_on_the_wire(number, run) for number, run in enumerate(runs) if run.contents.measured is not None]
    if rows:
        head = ["", *(run.name for run in runs)] if len(runs) > 1 else ["", "bytes"]
        blocks.append(Table(head, [[name, *texts] for name, texts in rows.items()]))
    return Section(
        "traffic",
        "Bytes by direction",
        "Counted: the tensors that cross between one client and the server in a run in which nobody is late, as mocosfl "
        "cost counts them; simulated clients send nothing over a network. Measured: what the operating system counted "
        "at the server's sockets, with everything around the tensors.",
        blocks + missing,
    )


def _bars(name: str, title: str, bars: Sequence[tuple[str, str, dict[str, float]]]) -> Plot:
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
                "y": [_text(label) for label, _, _ in bars],
                "x": _numbers(np.array(values, dtype=float)),
                "customdata": [size(value) for value in values],
                "hovertemplate": kind + ": %{customdata}<extra></extra>",
                "marker": {"color": _colour(place)},
            }
        )
    figure = _figure(traces, "bytes", "", legend=True, hover="closest")
    figure["layout"] |= {"barmode": "stack", "bargap": 0.35}
    figure["layout"]["xaxis"] |= {"exponentformat": "SI", "ticksuffix": "B", "nticks": 6}
    figure["layout"]["yaxis"] |= {"type": "category", "autorange": "reversed", "showgrid": False}
    return Plot(name, title, f"{title}, by kind", figure, 130 + 38 * len(bars))


def _on_the_wire(number: int, run: Shown) -> Plot:
    series, traces = run.contents.metrics.series, []
    for place, (key, name) in enumerate((("socket_bytes_in", "from clients"), ("socket_bytes_out", "to clients"))):
        x, y = thinned(series[key].epochs, running_total(series[key].values))
        traces.append({"type": "scatter", "mode": "lines", "x": _numbers(x), "y": _numbers(y), "name": name})
        traces[-1] |= {"line": {"color": _colour(place), "width": 2}}
    figure = _figure(traces, "epoch", "", legend=True)
    figure["layout"]["yaxis"] |= {"exponentformat": "SI", "ticksuffix": "B"}
    title = f"Measured at the sockets: {run.name}"
    return Plot(f"wire-{number}", title, "Bytes across the server's sockets over epochs", figure)


def _time(runs: Sequence[Shown]) -> Section:
    """Where the time went."""
    names: dict[str, None] = {}
    spent: list[dict[str, float]] = []
    missing: list[Block] = []
    for run in runs:
        phases = run.contents.phases
        if isinstance(phases, Missing):
            missing.append(_missing(phases, run.name if len(runs) > 1 else ""))
        found = {} if isinstance(phases, Missing) else dict(phases)
        result = run.contents.result
        if found and not isinstance(result, Missing) and "evaluation_seconds" in result:
            found["evaluation at the end"] = float(result["evaluation_seconds"])
        names |= dict.fromkeys(found)
        spent.append(found)
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": _text(phase),
            "y": [_text(run.name) for run in runs],
            "x": _numbers(np.array([found.get(phase, 0.0) for found in spent])),
            "customdata": [_share(found, phase) for found in spent],
            "hovertemplate": "%{customdata}<extra></extra>",
            "marker": {"color": _colour(place)},
        }
        for place, phase in enumerate(names)
    ]
    columns = []
    if traces:
        figure = _figure(traces, "seconds", "", legend=True, hover="closest")
        figure["layout"] |= {"barmode": "stack", "bargap": 0.35}
        figure["layout"]["yaxis"] |= {"type": "category", "autorange": "reversed", "showgrid": False}
        title = "Time by phase"
        plot = Plot("time", title, "Seconds spent in each phase", figure, 170 + 38 * len(runs))
        head = ["phase", *(run.name for run in runs)] if len(runs) > 1 else ["phase", "time"]
        table = Table(head, [[phase, *(_share(found, phase) for found in spent)] for phase in names])
        columns.append(Column([plot, table], title))
    columns.append(_panel(runs, "images_per_second", "Images a second", "", 1, "no line has been logged yet"))
    return Section(
        "time",
        "Time by phase",
        "Where the time went: clients' forward and backward passes, the server's step, averaging, evaluation during "
        "training and after it, and everything else, such as logs and checkpoints.",
        [Beside(columns), *missing],
    )


def _share(found: dict[str, float], phase: str) -> str:
    total = math.fsum(found.values())
    if phase not in found:
        return "–"
    return f"{time(found[phase])} ({100 * found[phase] / total:.0f} %)" if total else time(0)


def _evaluation(runs: Sequence[Shown], waits: bool) -> Section:
    """Figures on the test set."""
    labels = {
        "knn_untrained": "kNN of the untrained encoder",
        "knn": "kNN",
        "linear_probe": "linear probe",
        "linear_probe_train": "linear probe on its own training images",
        "test_images": "test images",
        "bank_images": "training images (bank)",
    }
    found = [run.contents.evaluation for run in runs]
    rows = []
    for key, label in labels.items():
        texts = [_score(figures, key) for figures in found]
        if any(text != "–" for text in texts):
            rows.append([label, *texts])
    blocks: list[Block] = []
    if rows:
        head = ["on the test set", *(run.name for run in runs)] if len(runs) > 1 else ["on the test set", ""]
        blocks.append(Table(head, rows))
    for run, figures in zip(runs, found, strict=True):
        if isinstance(figures, Missing):
            blocks.append(_later(figures, waits) if len(runs) == 1 else _missing(figures, run.name))
    return Section(
        "evaluation",
        "Evaluation",
        "How well features tell classes apart, on test images that were used for nothing else: by a vote of the nearest "
        "training images (kNN) and by a linear classifier trained on the features (linear probe).",
        blocks,
    )


def _score(figures: dict[str, Any] | Missing, key: str) -> str:
    if isinstance(figures, Missing) or key not in figures:
        return "–"
    return f"{figures[key]:,}" if key.endswith("_images") else f"{figures[key]:.2f} %"


def _neighbours(runs: Sequence[Shown], images: bool, waits: bool) -> Section:
    """Queries, and what is nearest to them."""

    def blocks(number: int, run: Shown) -> list[Block]:
        found = run.examples
        if isinstance(found, Missing):
            return [_later(found, waits)]
        rows = [_row(found, place, images) for place in range(len(found.queries))]
        made: list[Block] = [Gallery(rows), Note(_which(found))]
        if not images:
            made.append(Note("Pictures are left out, as was asked for."))
        return made

    return Section(
        "neighbours",
        "Nearest neighbours",
        f"{QUERIES} images on the left, drawn at random, each with the five others whose features are most like its own "
        "(below: class and cosine of the features). A good encoder finds images of the same class (✓) without ever "
        "having seen a label.",
        _by_run(runs, blocks),
    )


def _which(found: Examples) -> str:
    few = f"{len(found.images):,} of {found.total:,} {found.what}"
    all_ = f"all {found.total:,} {found.what}"
    return f"Shown and searched: {few if len(found.images) < found.total else all_}; no client trained on any of them."


def _row(found: Examples, place: int, images: bool) -> list[Cell]:
    query = int(found.queries[place])
    cells = [Cell(_thumbnail(found, query) if images else None, f"query: {_class(found, query)}", _class(found, query))]
    for number, cosine in zip(found.neighbours[place].tolist(), found.similarity[place].tolist(), strict=True):
        same = None if found.labels is None else bool(found.labels[number] == found.labels[query])
        what = _class(found, number)
        says = f"neighbour: {what}, {cosine:.2f}" + {None: "", True: ", same class", False: ", another class"}[same]
        source = _thumbnail(found, number) if images else None
        cells.append(Cell(source, says, f"{what} {cosine:.2f}".strip(), same))
    return cells


def _class(found: Examples, number: int) -> str:
    return "" if found.labels is None else short(found.classes[found.labels[number]])


def _thumbnail(found: Examples, number: int) -> str:
    return _data(_picture(found.images[number], THUMBNAIL), "PNG")


def _picture(pixels: NDArray[np.uint8], most: int) -> Image.Image:
    """(C, H, W) uint8 as a picture of so many pixels a side at most."""
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    return picture if picture.width <= most else picture.resize((most, most), Image.Resampling.LANCZOS)


def _data(picture: Image.Image | bytes, kind: str, **options: Any) -> str:
    """A picture as a data URL."""
    if isinstance(picture, Image.Image):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        picture = buffer.getvalue()
    return f"data:image/{kind.lower()};base64,{base64.b64encode(picture).decode()}"


def _map(runs: Sequence[Shown], images: bool, waits: bool) -> Section:
    """A map of the features."""

    def blocks(number: int, run: Shown) -> list[Block]:
        found = run.examples
        if isinstance(found, Missing):
            return [_later(found, waits)]
        return [_scatter(number, found, images), Note(_which(found))]

    return Section(
        "map",
        "Map of features",
        f"Each point is an image, at most {IMAGES:,}; near points have like features (PCA, then t-SNE). Clumps of one "
        "class are what a good encoder makes. Only nearness means something: axes, sizes of clumps and distances between "
        "them do not." + (" Point at one to see its image." if images else ""),
        _by_run(runs, blocks),
    )


def _scatter(number: int, found: Examples, images: bool) -> Plot:
    marks = ("circle", "diamond", "square", "cross", "triangle-up")
    labels = np.zeros(len(found.images), np.int64) if found.labels is None else found.labels
    traces = []
    for place, label in enumerate(np.unique(labels).tolist()):
        rows = np.flatnonzero(labels == label)
        name = "images" if found.labels is None else _text(short(found.classes[label]))
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "x": _numbers(found.places[rows, 0]),
                "y": _numbers(found.places[rows, 1]),
                "customdata": rows.tolist(),
                "hovertemplate": "%{fullData.name}<extra></extra>",
                "marker": {
                    "color": _colour(place),
                    "symbol": marks[place // RUNS % len(marks)],
                    "size": 6,
                    "opacity": 0.8,
                },
            }
        )
    figure = _figure(traces, "", "", legend=len(traces) <= 20, hover="closest")
    for axis in ("xaxis", "yaxis"):
        figure["layout"][axis] |= {"showticklabels": False, "showgrid": False, "zeroline": False}
    figure["layout"]["yaxis"] |= {"scaleanchor": "x"}
    if images:
        figure["pictures"] = _sheet(found.images)
    says = f"Map of the features of {len(found.images):,} images"
    return Plot(f"map-{number}", "Map of features", says, figure, 520)


def _sheet(images: NDArray[np.uint8]) -> dict[str, Any]:
    """All images on one sheet, row by row."""
    side, columns = min(images.shape[-1], TILE), math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("L" if images.shape[1] == 1 else "RGB", (columns * side, rows * side))
    for place, pixels in enumerate(images):
        sheet.paste(_picture(pixels, TILE), (place % columns * side, place // columns * side))
    return {"source": _data(sheet, "JPEG", quality=85), "side": side, "columns": columns, "rows": rows}


def _privacy(runs: Sequence[Shown], images: bool) -> Section:
    """What attackers made of the latents."""
    audits = {
        number: run.contents.privacy
        for number, run in enumerate(runs)
        if not isinstance(run.contents.privacy, Missing)
    }

    def blocks(number: int, run: Shown) -> list[Block]:
        report, picture = run.contents.privacy, run.contents.reconstructions
        if isinstance(report, Missing):
            return [_missing(report)]
        made: list[Block] = [_scores(report)]
        if isinstance(picture, Missing):
            made.append(_missing(picture))
        elif images:
            says = f"Images of client {report['client']} in the first row, and what each attack made of their latents"
            made += [Picture(_data(picture, "PNG"), says), Note(f"{says}. These are training images of that client.")]
        else:
            made.append(Note("The picture of reconstructions is left out, as was asked for."))
        return made

    above: list[Block] = []
    if audits:
        traces = []
        for number, report in audits.items():
            attacks = {name: scores.get("ssim") for name, scores in report["attacks"].items()}
            values = np.array([math.nan if value is None else value for value in attacks.values()], dtype=float)
            traces.append(
                {
                    "type": "bar",
                    "name": _text(runs[number].name),
                    "x": [_text(name) for name in attacks],
                    "y": _numbers(values),
                    "marker": {"color": _colour(number)},
                    "hovertemplate": "%{x}: %{y:.3f}<extra>%{fullData.name}</extra>",
                }
            )
        figure = _figure(traces, "", "SSIM", hover="closest")
        figure["layout"]["yaxis"] |= {"range": [0, 1]}
        figure["layout"]["xaxis"] |= {"type": "category"}
        guess = [report["mean image"].get("ssim", math.nan) for report in audits.values()]
        if all(map(math.isfinite, guess)):
            line = {"color": "var(--muted)", "width": 1, "dash": "dash"}
            figure["layout"]["shapes"] = [
                {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": level, "y1": level, "line": line}
                for level in guess
            ]
        title = "Likeness of reconstructions"
        above = [
            Plot("privacy", title, "Structural similarity of the reconstructions of each attack", figure, 280),
            Note("SSIM of images and reconstructions: 1 is the image itself; the dashed line is what guessing reaches."),
        ]
    return Section(
        "privacy",
        "Privacy audit",
        "What a server could make of the latents that a client sends, by the attacks of mocosfl attack: the higher the "
        "error and the lower likeness and recognition, the safer. The worst attack counts, score by score.",
        [*above, *_by_run(runs, blocks)],
    )


def _scores(report: dict[str, Any]) -> Table:
    shown = [name for name in COLUMNS if name in report["worst"]]

    def row(title: str, scores: dict[str, Any]) -> list[str]:
        texts = [COLUMNS[name][1].format(float(scores[name])) if name in scores else "–" for name in shown]
        return [title, *texts]

    rows = [row(f"{name}: {scores.get('what', '')}", scores) for name, scores in report["attacks"].items()]
    rows.append(row("the worst of each", {name: report["worst"][name]["value"] for name in shown}))
    worst = len(rows) - 1
    rows.append(row("for comparison: the mean image", report["mean image"]))
    head = [f"attack on {report['images']} images of client {report['client']}", *(COLUMNS[name][0] for name in shown)]
    return Table(head, rows, frozenset([worst]))


# Pieces of plots


def _by_run(runs: Sequence[Shown], blocks: Callable[[int, Shown], list[Block]]) -> list[Block]:
    """Blocks of one run, or a column for each of several."""
    made = [blocks(number, run) for number, run in enumerate(runs)]
    if len(runs) == 1:
        return made[0]
    return [Beside([Column(found, run.name, number) for number, (found, run) in enumerate(zip(made, runs, strict=True))])]


def _per_client(name: str, title: str, values: NDArray[np.int64], number: int) -> Plot:
    """A number of each client: a bar each, or all in order where they are many."""
    trace: dict[str, Any] = {"marker": {"color": _colour(number)}, "name": ""}
    if len(values) <= BARS:
        trace |= {"type": "bar", "x": list(range(len(values))), "y": values.tolist()}
        trace["hovertemplate"] = "client %{x}: %{y:,} images<extra></extra>"
        axis = "client"
    else:
        places = np.unique(np.linspace(0, len(values) - 1, POINTS // 2).round().astype(int))
        trace |= {"type": "scatter", "mode": "lines", "fill": "tozeroy", "line": {"color": _colour(number), "shape": "hv"}}
        trace |= {"x": (places + 1).tolist(), "y": np.sort(values)[::-1][places].tolist()}
        trace["hovertemplate"] = "%{x:,} clients: %{y:,} images or more<extra></extra>"
        axis = f"{len(values):,} clients in order"
    figure = _figure([trace], axis, "images", hover="closest")
    figure["layout"]["yaxis"] |= {"rangemode": "tozero"}
    figure["layout"] |= {"bargap": 0.1}
    return Plot(name, title, f"{title}: {axis}", figure, 260)


def _curve(
    epochs: NDArray[np.float64], values: NDArray[np.float64], name: str, number: int, points: bool = False
) -> list[dict[str, Any]]:
    """What was logged, pale, and its running mean; the former alone where it is short or smooth."""
    colour = _colour(number)
    trace: dict[str, Any] = {"type": "scatter", "mode": "lines", "name": _text(name), "line": {"color": colour, "width": 2}}
    window = len(values) // SMOOTHING
    if points or window < 2:
        x, y = thinned(epochs, values)
        mode = "lines+markers" if points or len(values) == 1 else "lines"
        return [trace | {"x": _numbers(x), "y": _numbers(y), "mode": mode, "marker": {"size": 5, "color": colour}}]
    x, y = thinned(epochs, values)
    pale = {"line": {"color": colour, "width": 1}, "opacity": 0.3, "hoverinfo": "skip", "showlegend": False}
    mean_x, mean_y = thinned(epochs, running_mean(values, window), POINTS // 2)
    return [
        trace | pale | {"x": _numbers(x), "y": _numbers(y)},
        trace | {"x": _numbers(mean_x), "y": _numbers(mean_y)},
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


def _figure(
    traces: list[dict[str, Any]], x: str, y: str, legend: bool = False, hover: str = "x unified"
) -> dict[str, Any]:
    """Data and layout, in the page's colours."""

    def axis(title: str) -> dict[str, Any]:
        lines = {name: "var(--line)" for name in ("gridcolor", "zerolinecolor", "linecolor")}
        return {**lines, "automargin": True, "title": {"text": _text(title), "standoff": 6}, "ticks": ""}

    layout = {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "var(--ink)"},
        "margin": {"l": 44, "r": 12, "t": 28, "b": 40},
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
        "legend": {"orientation": "h", "y": -0.18, "yanchor": "top", "x": 0},
        "uirevision": "kept",  # zoom and hidden lines stay when new data come
    }
    return {"data": traces, "layout": layout}


def _numbers(values: NDArray[Any]) -> list[float | None]:
    """For JSON, which has no NaN: six digits are more than a screen shows."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]


def _text(text: str) -> str:
    """For plotly, which takes some HTML in texts."""
    return markup.escape(text, quote=False)


def _colour(number: int) -> str:
    return f"var(--c{number % RUNS})"


def _id(key: str) -> str:
    return key.replace("_", "-")


def _distinct(names: Sequence[str]) -> Iterable[str]:
    """Shortened names, no two alike."""
    seen: set[str] = set()
    for number, name in enumerate(map(short, names)):
        seen.add(name := name if name not in seen else f"{name} ({number})")
        yield name


def _spread(what: str, values: NDArray[np.int64], more: str = "") -> Note:
    return Note(
        f"{len(values):,} clients; {what} a client: least {values.min():,}, median {np.median(values):,g}, most "
        f"{values.max():,}{more}."
    )


def _lacking(names: Sequence[str], runs: int) -> list[Block]:
    if not names or runs == 1:
        return []
    return [Note(f"Not logged by {', '.join(names)}.", missing=True)]


def _missing(missing: Missing, name: str = "") -> Note:
    return Note(f"{name}: {missing.why}." if name else f"Nothing to show: {missing.why}.", missing=True)


def _later(missing: Missing, waits: bool) -> Note:
    if waits:
        return Note("This section appears when the run is over: it needs the trained encoder.", missing=True)
    return _missing(missing)


def dumps(state: dict[str, Any]) -> bytes:
    """A page's state as JSON."""
    return json.dumps(state, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
