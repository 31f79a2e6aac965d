"""The sections of a page: what is said of runs, and which plots say it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mocosfl.config import Config, setting_names
from mocosfl.footprint.traffic import DOWN, UP, way
from mocosfl.reporting.blocks import (
    Beside,
    Block,
    Cell,
    Column,
    Folded,
    Gallery,
    Note,
    Picture,
    Plot,
    Section,
    Table,
)
from mocosfl.reporting.cost import size, time
from mocosfl.reporting.examples import IMAGES, QUERIES, Examples
from mocosfl.reporting.partition import short
from mocosfl.reporting.plots import (
    COLOURS,
    POINTS,
    colour,
    curve,
    data_url,
    figure_of,
    heat_map,
    numbers,
    per_client,
    plain,
    scatter,
    stacked_bars,
    thinned,
    thumbnail,
)
from mocosfl.reporting.privacy import COLUMNS
from mocosfl.reporting.report import Contents, Missing, layers, running_total

LAYERS = COLOURS
"""Layers whose divergence is drawn, at most: those with the largest."""


@dataclass(frozen=True)
class Live:
    """A run that is under way, as its process knows it.

    Attributes:
        doing: what it is at.
        ended: whether there is nothing more to come.
        step, steps: done, and of the whole run; None before training.
        left: seconds left, about; None where that is not known.
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


def clients(live: Live) -> Section:
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


def settings(runs: Sequence[Shown]) -> Section:
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
    return reduce(getattr, name.split("."), config)


def _value(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(map(_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def curves(runs: Sequence[Shown]) -> Section:
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
        "ones the running mean over a fortieth of the run. Loss usually falls, then rises a little as the learning "
        "rate falls and the queue's keys become more alike; accuracies should rise; a variance of features near 0 "
        "means collapse.",
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
        traces += curve(series.epochs, series.values * scale, run.name, number, points=key == "knn_held_out")
    if not traces:
        return Column([Note(f"Nothing to draw: {why}.", missing=True)], title)
    plot = Plot(key.replace("_", "-"), title, f"{title} over epochs", figure_of(traces, "epoch", unit))
    return Column([plot, *_lacking(lacking, len(runs))], title)


def _rates(runs: Sequence[Shown]) -> Column:
    traces: list[dict[str, Any]] = []
    for number, run in enumerate(runs):
        for key, who, dash in (("server_lr", "server", "solid"), ("client_lr", "clients", "dot")):
            if (series := run.contents.metrics.series.get(key)) is not None:
                name = who if len(runs) == 1 else f"{run.name}: {who}"
                x, y = thinned(series.epochs, series.values)
                line = {"color": colour(number), "width": 2, "dash": dash}
                traces.append({"type": "scatter", "mode": "lines", "x": numbers(x), "y": numbers(y)})
                traces[-1] |= {"name": plain(name), "line": line}
    title = "Learning rates"
    if not traces:
        return Column([Note("Nothing to draw: no line has been logged yet.", missing=True)], title)
    figure = figure_of(traces, "epoch", "", legend=len(runs) == 1)
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
        traces += curve(series.epochs, series.values, "all layers" if len(runs) == 1 else run.name, number)
    if not traces:
        why = (
            "Nothing to draw: where one half stands for all clients there is none, and otherwise none has been logged."
        )
        return Column([Note(why, missing=True)], title)
    found = list(layers(runs[0].contents.metrics))
    if len(runs) == 1 and len(found) > 1:  # a single one is all there is
        found.sort(key=lambda pair: -pair[1].values[-1])
        for place, (name, series) in enumerate(found[:LAYERS], start=1):
            x, y = thinned(series.epochs, series.values, POINTS // 4)
            line = {"color": colour(place), "width": 1, "dash": "dot" if place >= COLOURS else "solid"}
            traces.append({"type": "scatter", "mode": "lines", "x": numbers(x), "y": numbers(y), "line": line})
            traces[-1] |= {"name": plain(name), "opacity": 0.8, "visible": "legendonly" if place > 4 else True}
    figure = figure_of(traces, "epoch", "", legend=len(runs) == 1 and len(traces) > 1)
    note = Note(
        "How far the clients' weights are from their average just before they are averaged, as a share of its length: "
        "the mean over clients."
    )
    says = "Divergence of the client halves from their average over epochs"
    return Column([Plot("divergence", title, says, figure, 340), note, *_lacking(lacking, len(runs))], title)


def partition(runs: Sequence[Shown]) -> Section:
    """Who holds what."""

    def blocks(number: int, run: Shown) -> list[Block]:
        held = run.contents.partition
        if isinstance(held, Missing):
            return [_missing(held)]
        if held.counts is None:
            title = "Images of each client"
            return [per_client(f"partition-{number}", title, held.images, number), _spread("images", held.images)]
        return [heat_map(number, held), _spread("images", held.images)]

    return Section(
        "partition",
        "Who holds which images",
        "A column is a client and a row a class: the darker (in the dark: the lighter), the more images; an empty "
        "place is none. Few filled places in a column mean that a client sees few classes.",
        _by_run(runs, blocks),
    )


def participation(runs: Sequence[Shown]) -> Section:
    """How often clients took part."""

    def blocks(number: int, run: Shown) -> list[Block]:
        drawn, made = run.contents.participation, list[Block]()
        if isinstance(drawn, Missing):
            made.append(_missing(drawn))
        else:
            never = int((drawn == 0).sum())
            made.append(per_client(f"participation-{number}", "Images drawn from each client", drawn, number))
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


def traffic(runs: Sequence[Shown]) -> Section:
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
        blocks.append(stacked_bars("traffic", "Bytes of one client over the whole run", bars))
    blocks += [_on_the_wire(number, run) for number, run in enumerate(runs) if run.contents.measured is not None]
    if rows:
        head = ["", *(run.name for run in runs)] if len(runs) > 1 else ["", "bytes"]
        blocks.append(Table(head, [[name, *texts] for name, texts in rows.items()]))
    return Section(
        "traffic",
        "Bytes by direction",
        "Counted: the tensors that cross between one client and the server in a run in which nobody is late, as "
        "mocosfl cost counts them; simulated clients send nothing over a network. Measured: what the operating system "
        "counted at the server's sockets, with everything around the tensors.",
        blocks + missing,
    )


def _on_the_wire(number: int, run: Shown) -> Plot:
    series, traces = run.contents.metrics.series, list[dict[str, Any]]()
    for place, (key, name) in enumerate((("socket_bytes_in", "from clients"), ("socket_bytes_out", "to clients"))):
        x, y = thinned(series[key].epochs, running_total(series[key].values))
        traces.append({"type": "scatter", "mode": "lines", "x": numbers(x), "y": numbers(y), "name": name})
        traces[-1] |= {"line": {"color": colour(place), "width": 2}}
    figure = figure_of(traces, "epoch", "", legend=True)
    figure["layout"]["yaxis"] |= {"exponentformat": "SI", "ticksuffix": "B"}
    title = f"Measured at the sockets: {run.name}"
    return Plot(f"wire-{number}", title, "Bytes across the server's sockets over epochs", figure)


def time_by_phase(runs: Sequence[Shown]) -> Section:
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
            "name": plain(phase),
            "y": [plain(run.name) for run in runs],
            "x": numbers(np.array([found.get(phase, 0.0) for found in spent])),
            "customdata": [_share(found, phase) for found in spent],
            "hovertemplate": "%{customdata}<extra></extra>",
            "marker": {"color": colour(place)},
        }
        for place, phase in enumerate(names)
    ]
    columns = []
    if traces:
        figure = figure_of(traces, "", "", legend=True, hover="closest")
        figure["layout"] |= {"barmode": "stack", "bargap": 0.35}
        figure["layout"]["yaxis"] |= {"type": "category", "autorange": "reversed", "showgrid": False}
        title = "Seconds in each phase"
        plot = Plot("time", title, "Seconds spent in each phase", figure, 170 + 38 * len(runs))
        head = ["phase", *(run.name for run in runs)] if len(runs) > 1 else ["phase", "time"]
        table = Table(head, [[phase, *(_share(found, phase) for found in spent)] for phase in names])
        columns.append(Column([plot, table], title))
    columns.append(_panel(runs, "images_per_second", "Images a second", "", 1, "no line has been logged yet"))
    return Section(
        "time",
        "Time by phase",
        "Where the time went: clients' forward and backward passes, the server's step, averaging (synchronise), "
        "evaluation during training and after it, checkpoints, and everything else.",
        [Beside(columns), *missing],
    )


def _share(found: dict[str, float], phase: str) -> str:
    total = math.fsum(found.values())
    if phase not in found:
        return "–"
    return f"{time(found[phase])} ({100 * found[phase] / total:.0f} %)" if total else time(0)


def evaluation(runs: Sequence[Shown], waits: bool) -> Section:
    """Figures on the test set."""
    labels = {
        "knn_untrained": "kNN of the untrained encoder",
        "knn": "kNN",
        "linear_probe": "linear probe",
        "linear_probe_train": "linear probe on its own training images",
        "logistic_probe": "linear probe by L-BFGS",
        "finetune_10": "fine-tuned with 10 % of the labels",
        "finetune_1": "fine-tuned with 1 % of the labels",
        "alignment": "alignment of views (less is better)",
        "uniformity": "uniformity of views (less is better)",
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
        "How well features tell classes apart, on test images that were used for nothing else: by a vote of the "
        "nearest training images (kNN) and by a linear classifier trained on the features (linear probe).",
        blocks,
    )


def _score(figures: dict[str, Any] | Missing, key: str) -> str:
    if isinstance(figures, Missing) or key not in figures:
        return "–"
    if key in ("alignment", "uniformity"):
        return f"{figures[key]:.4f}"
    return f"{figures[key]:,}" if key.endswith("_images") else f"{figures[key]:.2f} %"


def neighbours(runs: Sequence[Shown], images: bool, waits: bool) -> Section:
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
        f"{QUERIES} images on the left, drawn at random, each with the five others whose features are most like its "
        "own (below: class and cosine of the features). A good encoder finds images of the same class (✓) without ever "
        "having seen a label.",
        _by_run(runs, blocks),
    )


def _which(found: Examples) -> str:
    few = f"{len(found.images):,} of {found.total:,} {found.what}"
    all_ = f"all {found.total:,} {found.what}"
    return f"Shown and searched: {few if len(found.images) < found.total else all_}; no client trained on any of them."


def _row(found: Examples, place: int, images: bool) -> list[Cell]:
    query = int(found.queries[place])
    cells = [Cell(thumbnail(found, query) if images else None, f"query: {_class(found, query)}", _class(found, query))]
    for number, cosine in zip(found.neighbours[place].tolist(), found.similarity[place].tolist(), strict=True):
        same = None if found.labels is None else bool(found.labels[number] == found.labels[query])
        what = _class(found, number)
        says = f"neighbour: {what}, {cosine:.2f}" + {None: "", True: ", same class", False: ", another class"}[same]
        source = thumbnail(found, number) if images else None
        cells.append(Cell(source, says, what, f"{cosine:.2f}", same))
    return cells


def _class(found: Examples, number: int) -> str:
    return "" if found.labels is None else short(found.classes[found.labels[number]])


def map_of_features(runs: Sequence[Shown], images: bool, waits: bool) -> Section:
    """A map of the features."""

    def blocks(number: int, run: Shown) -> list[Block]:
        found = run.examples
        if isinstance(found, Missing):
            return [_later(found, waits)]
        if isinstance(found.places, Missing):
            return [_missing(found.places), Note(_which(found))]
        return [scatter(number, found, found.places, images), Note(_which(found))]

    return Section(
        "map",
        "Map of features",
        f"Each point is an image, at most {IMAGES:,}; near points have like features (PCA, then t-SNE). Clumps of one "
        "class are what a good encoder makes. Only nearness means something: axes, sizes of clumps and distances "
        "between them do not." + (" Point at one to see its image." if images else ""),
        _by_run(runs, blocks),
    )


def privacy(runs: Sequence[Shown], images: bool) -> Section:
    """What attackers made of the latents."""
    audits = {
        number: run.contents.privacy for number, run in enumerate(runs) if not isinstance(run.contents.privacy, Missing)
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
            made += [
                Picture(data_url(picture, "PNG"), says),
                Note(f"{says}. These are training images of that client."),
            ]
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
                    "name": plain(runs[number].name),
                    "x": [plain(name) for name in attacks],
                    "y": numbers(values),
                    "marker": {"color": colour(number)},
                    "hovertemplate": "%{x}: %{y:.3f}<extra>%{fullData.name}</extra>",
                }
            )
        figure = figure_of(traces, "", "SSIM", hover="closest")
        figure["layout"] |= {"bargap": 0.45}
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
            Note(
                "SSIM of images and reconstructions: 1 is the image itself; the dashed line is what guessing reaches."
            ),
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


def _connected(number: int, run: Shown) -> Plot:
    series, traces = run.contents.metrics.series, list[dict[str, Any]]()
    for place, (key, name) in enumerate((("clients", "connected"), ("stragglers", "late, since the start"))):
        if key in series:
            x, y = thinned(series[key].epochs, series[key].values)
            traces.append({"type": "scatter", "mode": "lines", "x": numbers(x), "y": numbers(y), "name": name})
            traces[-1] |= {"line": {"color": colour(place), "shape": "hv", "width": 2}}
    figure = figure_of(traces, "epoch", "clients", legend=True)
    return Plot(f"connected-{number}", "Connected clients", "Connected and late clients over epochs", figure)


def _by_run(runs: Sequence[Shown], blocks: Callable[[int, Shown], list[Block]]) -> list[Block]:
    """Blocks of one run, or a column for each of several."""
    made = [blocks(number, run) for number, run in enumerate(runs)]
    if len(runs) == 1:
        return made[0]
    return [
        Beside([Column(found, run.name, number) for number, (found, run) in enumerate(zip(made, runs, strict=True))])
    ]


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
