"""The page that shows one or several runs, as one HTML document.

A file (``write``) and a page of a run that is under way (``dashboard``) are the same page: its parts and its figures
(``Page.state``) are either in it, or asked for again and again.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from mocosfl.errors import RunError, SettingError
from mocosfl.files import write_atomically
from mocosfl.reporting import sections
from mocosfl.reporting.blocks import Section, Tile, plots_of
from mocosfl.reporting.cost import size, time
from mocosfl.reporting.plots import COLOURS
from mocosfl.reporting.report import Contents, Missing
from mocosfl.reporting.sections import Live, Shown

RUNS = COLOURS
"""Runs on one page, at most: more have no colour of their own."""
GENERATOR = b'<meta name="generator" content="mocosfl">'
"""What tells our pages from other files."""


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
            "figures": {plot.name: plot.figure for section in self.sections for plot in plots_of(section.blocks)},
            "ended": self.live is None or self.live.ended,
        }


def names_of(paths: Sequence[Path]) -> list[str]:
    """What runs are called on a page: their folders' names, with as many of the folders above as tell them apart.

    Raises:
        SettingError: one is there twice, or they are too many to tell apart.
    """
    folders = [path.resolve() for path in paths]
    for place, folder in enumerate(folders):
        if folder in folders[:place]:
            raise SettingError(f"{paths[place]} is named twice; a page shows each run once")
    if len(paths) > RUNS:
        raise SettingError(f"{len(paths)} runs: a page shows {RUNS} at most")
    parts = [folder.parts for folder in folders]
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
    """
    waits = live is not None and not live.ended
    shown = [
        *([sections.clients(live)] if live is not None and live.clients is not None else []),
        sections.settings(runs),
        sections.curves(runs),
        sections.partition(runs),
        sections.participation(runs),
        sections.traffic(runs),
        sections.time_by_phase(runs),
        sections.evaluation(runs, waits),
        sections.neighbours(runs, images, waits),
        sections.map_of_features(runs, images, waits),
        sections.privacy(runs, images),
    ]
    names = [run.name for run in runs]
    title = names[0] if len(runs) == 1 else f"{len(runs)} runs"
    return Page(
        title, names, [_status(run.contents) if live is None else "" for run in runs], _tiles(runs), shown, live, images
    )


def html(made: Page, poll: str | None = None) -> str:
    """The page as one HTML document that needs nothing besides itself.

    Args:
        made: the page.
        poll: where it asks for its state again and again. Unset: it is as it is.
    """
    style, script, plotly = _source("page.css"), _source("page.js"), get_plotlyjs()
    allowed = " ".join(f"'sha256-{_hash(text)}'" for text in (plotly, script))
    asks = "'none'" if poll is None else "'self'"
    return (
        _templates()
        .get_template("page.html")
        .render(
            page=made,
            state=made.state(),
            poll=poll,
            policy=f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
            f"connect-src {asks}",
            style=Markup(style),
            script=Markup(script),
            plotly=Markup(plotly),
        )
    )


def check_replaceable(path: Path) -> None:
    """Make sure that a report may be written to a file.

    Raises:
        RunError: it is a file of somebody else's.
        OSError: it cannot be read.
    """
    if path.exists():
        with path.open("rb") as file:
            if GENERATOR not in file.read(2000):
                raise RunError(f"{path} is already there and is no report of mocosfl; choose another file with --out")


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
        ("kNN accuracy", _knn),
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
    return (
        f"{config.clients.number:,}",
        f"{config.pool:,} active at a time" if config.pool < config.clients.number else "",
    )


def _bytes_of_client(run: Contents) -> tuple[str, str]:
    if run.measured is not None:
        return size(sum(run.measured) / run.config.clients.number), "both ways, measured"
    if isinstance(run.counted, Missing):
        return "–", ""
    first = next(iter(run.counted.values()))
    return size(sum(first.run.values())), "both ways, counted"


def _whole_time(run: Contents) -> tuple[str, str]:
    if isinstance(run.result, Missing):
        return time(run.metrics.seconds), "so far"
    seconds = run.result.get("training_seconds", 0) + run.result.get("evaluation_seconds", 0)
    return time(seconds), f"on {run.result['device']}" if "device" in run.result else ""


def dumps(state: dict[str, Any]) -> bytes:
    """A page's state as JSON."""
    return json.dumps(state, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
