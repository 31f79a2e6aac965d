"""Runs side by side: the settings in which they differ, their figures, and their curves."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mocosfl.config import Config, by_name, setting_names, value_text
from mocosfl.errors import RunError, SettingError, nearest
from mocosfl.files import write_atomically
from mocosfl.reporting.cost import size, time
from mocosfl.reporting.curve import running_mean
from mocosfl.reporting.report import Contents, Missing, Reader, Series
from mocosfl.run import FAILED, OF_SWEEP, RESUMABLE

FINISHED = "finished"


@dataclass(frozen=True)
class Row:
    """One run, or several that differ in the seed alone.

    Attributes:
        name: what it is called here.
        state: finished; failed, and why; or how far it has come.
        settings: all, by dotted name; none where they are not known.
        figures: of ``COLUMNS``, those that there are, and ``knn_untrained``.
        spread: standard deviation of the figures, of several runs.
        curves: what was logged, by metric.
        runs: how many.
        members: the names of several runs.
    """

    name: str
    state: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    spread: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Series] = field(default_factory=dict)
    runs: int = 1
    members: tuple[str, ...] = ()


@dataclass(frozen=True)
class Column:
    """A figure: its title, how it is written, and whether a larger one is better."""

    title: str
    text: Callable[[float], str]
    largest_first: bool = False


COLUMNS = {
    "knn": Column("kNN, %", "{:.2f}".format, largest_first=True),
    "linear_probe": Column("probe, %", "{:.2f}".format, largest_first=True),
    "loss": Column("loss", "{:.3f}".format),
    "images": Column("images", "{:,.0f}".format),
    "seconds": Column("time", lambda value: time(value)),
    "bytes": Column("bytes", lambda value: size(value)),
}
"""Of a table, in their order. kNN and linear probe are those on the test set, loss is the last one logged, images those
seen so far, time that of training, and bytes those both ways between one client and the server over the whole run, as
`mocosfl cost` counts."""


def rows(paths: Sequence[str | Path]) -> list[Row]:
    """Read runs.

    Args:
        paths: run folders, or folders of runs, such as that of a sweep.

    Returns:
        The runs in the order given; those of one folder by name, numbers in them by size.

    Raises:
        RunError: there is no run.
        SettingError: a configuration cannot be read.
        OSError: a file is there and cannot be read.
    """
    found: list[tuple[str, Path]] = []
    for path in map(Path, paths):
        if (path / "config.yaml").is_file() or (
            path.parent.name == FAILED and path.with_name(f"{path.name}.log").exists()
        ):
            found.append((path.resolve().name, path))
            continue
        runs = [entry.parent for entry in path.glob("*/config.yaml")] if path.is_dir() else []
        failed = {entry.with_suffix("") if entry.suffix == ".log" else entry for entry in (path / FAILED).glob("*")}
        if not runs and not failed:
            raise RunError(f"{path} is neither a run nor a folder of runs: there is no config.yaml")
        found += [(run.name, run) for run in sorted([*runs, *failed], key=_in_order)]
    names = Counter(name for name, _ in found)
    return [_read(name if names[name] == 1 else str(path), path) for name, path in found]


def _in_order(path: Path) -> list[tuple[bool, int, str]]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", path.name)]


def _read(name: str, path: Path) -> Row:
    failed = path.resolve().parent.name == FAILED
    if failed and not (path / "config.yaml").is_file():  # it failed before it began
        handed = path.parent.parent / OF_SWEEP / f"{path.name}.yaml"
        return Row(name, _why(path), by_name(Config.from_yaml(handed)) if handed.exists() else {})
    found = Reader(path).read()
    state = FINISHED if not isinstance(found.result, Missing) else _why(path) if failed else _so_far(found)
    return Row(name, state, found.settings, _figures(found), curves=found.metrics.series)


def _why(path: Path) -> str:
    """The last line of a failed run's log."""
    log = path.with_name(f"{path.name}.log")
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"{FAILED}: {last}" if last else FAILED


def _so_far(found: Contents) -> str:
    return f"step {found.metrics.step:,}" + (f"/{found.steps:,}" if found.steps else "")


def _figures(found: Contents) -> dict[str, float]:
    """What the files of a run say, as far as they do."""
    figures: dict[str, float | None] = {}
    if not isinstance(found.evaluation, Missing):
        figures |= {name: found.evaluation.get(name) for name in ("knn", "linear_probe", "knn_untrained")}
    figures["loss"] = found.metrics.last("loss")
    if found.images is not None and found.metrics.step:
        figures["images"] = round(found.metrics.epoch * found.images)
    result = {} if isinstance(found.result, Missing) else found.result
    figures["seconds"] = result.get("training_seconds", found.metrics.seconds or None)
    if not isinstance(found.counted, Missing):
        figures["bytes"] = sum(next(iter(found.counted.values())).run.values())
    return {name: float(value) for name, value in figures.items() if value is not None and math.isfinite(value)}


def differing(rows: Sequence[Row]) -> list[str]:
    """The settings that are not the same in all rows, but for those that do not change the numbers."""
    known = [row.settings for row in rows if row.settings]
    names = [name for name in setting_names() if name not in RESUMABLE]
    return [name for name in names if any(settings[name] != known[0][name] for settings in known[1:])]


def reference(rows: Sequence[Row], names: Sequence[str], base: str | None = None) -> dict[str, Any]:
    """What a table leaves out: the settings of one run, or the value of each setting that most runs have.

    Args:
        rows: all.
        names: of the settings.
        base: the run. Unset: what most have; of equally many, the first of them.

    Raises:
        SettingError: there is no such run, or its settings are not known.
    """
    if base is not None:
        row = next((row for row in rows if base in (row.name, *row.members) and row.settings), None)
        if row is None:
            known = [row.name for row in rows if row.settings]
            raise SettingError(f"base={base}: {nearest(base, known) or 'the runs are ' + ', '.join(known)}")
        return {name: row.settings[name] for name in names}
    values = {name: [row.settings[name] for row in rows if row.settings] for name in names}
    return {name: max(found, key=found.count) for name, found in values.items()}


def changes(row: Row, base: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a row that are not those of ``base``."""
    return {name: row.settings[name] for name in base if row.settings and row.settings[name] != base[name]}


def told(settings: Mapping[str, Any]) -> str:
    """Settings as text, with values as YAML has them."""
    return ", ".join(f"{name}={value_text(value)}" for name, value in settings.items())


def averaged(rows: Sequence[Row]) -> list[Row]:
    """Finished runs that differ in the seed alone become one row, with mean and standard deviation of the
    figures that all of them have; others stay."""
    groups: list[list[Row]] = []
    for row in rows:
        same = (group for group in groups if row.state == FINISHED and _same_but_seed(group[0], row))
        group = next(same, None)
        if group is None:
            groups.append([row])
        else:
            group.append(row)
    return [_mean(group) if len(group) > 1 else group[0] for group in groups]


def _same_but_seed(one: Row, other: Row) -> bool:
    mine, theirs = (
        {name: value for name, value in row.settings.items() if name not in ("seed", *RESUMABLE)}
        for row in (one, other)
    )
    return one.state == FINISHED and mine == theirs


def _mean(group: Sequence[Row]) -> Row:
    shared = [name for name in group[0].figures if all(name in row.figures for row in group)]
    figures = {name: [row.figures[name] for row in group] for name in shared}
    spread = {name: statistics.stdev(values) for name, values in figures.items()}
    means = {name: statistics.fmean(values) for name, values in figures.items()}
    settings = {name: value for name, value in group[0].settings.items() if name != "seed"} | {"seed": None}
    members = tuple(row.name for row in group)
    return replace(
        group[0],
        name=_shared_name(members),
        settings=settings,
        figures=means,
        spread=spread,
        runs=len(group),
        members=members,
    )


def _shared_name(names: Sequence[str]) -> str:
    """What the names of runs that differ in the seed have in common: base of base-seed=0 and base-seed=1."""
    length = next((n for n, letters in enumerate(zip(*names, strict=False)) if len(set(letters)) > 1), len(min(names)))
    shared = min(names)[:length]
    return re.sub(r"[-_=. ]*(seed)?[-_=. ]*$", "", shared) or names[0]


def ordered(rows: Sequence[Row], by: str) -> list[Row]:
    """Rows by a figure or a setting: the best accuracy first, else the smallest. Those without come last.

    Raises:
        SettingError: there is no such figure or setting.
    """
    if by in COLUMNS:
        sign = -1 if COLUMNS[by].largest_first else 1
        return sorted(rows, key=lambda row: (by not in row.figures, sign * row.figures.get(by, 0)))
    if by not in setting_names():
        known = [*COLUMNS, *setting_names()]
        raise SettingError(
            f"sort={by}: {nearest(by, known) or 'accepted are ' + ', '.join(COLUMNS) + ', or a setting'}"
        )
    value = {id(row): row.settings.get(by) for row in rows}
    number = {key: isinstance(found, int | float) for key, found in value.items()}
    return sorted(
        rows,
        key=lambda row: (
            value[id(row)] is None,
            not number[id(row)],
            value[id(row)] if number[id(row)] else 0,
            str(value[id(row)]),
        ),
    )


# As text


def _cells(rows: Sequence[Row], base_run: str | None) -> tuple[list[str], list[list[str]], str]:
    """Titles and cells of a table to read, and what to say below it."""
    one_seed = all(row.runs == 1 for row in rows)
    base = reference(rows, [name for name in differing(rows) if one_seed or name != "seed"], base_run)
    shown = [name for name in COLUMNS if any(name in row.figures for row in rows)]
    unfinished = any(row.state != FINISHED for row in rows)
    several = any(row.runs > 1 for row in rows)
    titles = [
        "run",
        *(["settings"] if base else []),
        *(["runs"] if several else []),
        *(["state"] if unfinished else []),
    ]
    titles += [COLUMNS[name].title for name in shown]
    lines = []
    for row in rows:
        line = [row.name, *([told(changes(row, base))] if base else []), *([str(row.runs)] if several else [])]
        line += [row.state] if unfinished else []
        lines.append([*line, *(_figure(row, name) for name in shown)])
    return titles, lines, f"Where nothing else is said: {told(base)}." if base else ""


def _figure(row: Row, name: str) -> str:
    if name not in row.figures:
        return "–"
    text = COLUMNS[name].text(row.figures[name])
    spread = row.spread.get(name)
    return text if spread is None or not COLUMNS[name].largest_first else f"{text} ± {COLUMNS[name].text(spread)}"


def table(rows: Sequence[Row], base: str | None = None, width: int | None = None) -> RenderableType:
    """For a terminal.

    Args:
        rows: the runs.
        base: as of ``reference``.
        width: of the terminal, in characters. Where the settings do not fit beside the figures they stand below.
    """
    titles, lines, note = _cells(rows, base)
    needed = sum(max(map(len, column)) + 1 for column in zip(titles, *lines, strict=True) if column[0] != "settings")
    below = []
    if width is not None and "settings" in titles and needed + 24 > width:
        place = titles.index("settings")
        below = [f"{line[0]}: {line[place]}" for line in lines if line[place]]
        titles, lines = titles[:place] + titles[place + 1 :], [line[:place] + line[place + 1 :] for line in lines]
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for title in titles:
        words = title in ("run", "settings", "state")
        widest = max((len(word) for line in lines for word in line[titles.index(title)].split()), default=0)
        made.add_column(
            title,
            justify="left" if words else "right",
            overflow="fold",
            no_wrap=not words,
            min_width=min(widest, 32) if title == "settings" else None,
        )
    for line in lines:
        made.add_row(*(cell.replace("[", r"\[") for cell in line))
    return Group(made, *map(Text, below), *([Text(f"\n{note}" if below else note, style="italic")] if note else []))


def markdown(rows: Sequence[Row], base: str | None = None) -> str:
    """For a page; ``base`` as of ``reference``."""
    titles, lines, note = _cells(rows, base)
    text = [titles, ["---"] * len(titles), *lines]
    escaped = [" | ".join(cell.replace("|", r"\|") for cell in line) for line in text]
    return "".join(f"| {line} |\n" for line in escaped) + (f"\n{note}\n" if note else "")


def records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For a program: of each run ``run``, ``state``, ``settings`` (those that differ) and ``figures`` (seconds, bytes,
    percent); of several also ``runs`` and ``spread``."""
    names = differing(rows)
    found = []
    for row in rows:
        record: dict[str, Any] = {"run": row.name, "state": row.state}
        record["settings"] = {name: row.settings[name] for name in names if row.settings}
        record["figures"] = dict(row.figures)
        found.append(record | ({"runs": row.runs, "spread": dict(row.spread)} if row.runs > 1 else {}))
    return found


def as_json(rows: Sequence[Row]) -> str:
    """``records`` as text."""
    return json.dumps(records(rows), indent=1, ensure_ascii=False) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """For a spreadsheet: a column for each setting that differs, and one for each figure; where rows are of several
    runs also ``runs``, and behind each figure its standard deviation, ``FIGURE_std``."""
    names = differing(rows)
    figures = [name for name in ("knn_untrained", *COLUMNS) if any(name in row.figures for row in rows)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    several = any(row.runs > 1 for row in rows)
    titles = [title for name in figures for title in (name, f"{name}_std")] if several else figures
    writer.writerow(["run", "state", *(["runs"] if several else []), *names, *titles])
    for row in rows:
        values = dict(row.figures) | {f"{name}_std": value for name, value in row.spread.items()}
        settings = [value_text(row.settings[name]) if row.settings else "" for name in names]
        count = [row.runs] if several else []
        writer.writerow([row.name, row.state, *count, *settings, *(values.get(title, "") for title in titles)])
    return out.getvalue()


# As a picture

STYLES = ("-", "--", ":")
COLOURS = 10


def draw(rows: Sequence[Row], path: Path) -> None:
    """Accuracies of the runs, and the curves of loss and kNN, each run in its colour.

    Losses are drawn of one objective alone, that of most runs. Means over seeds have no curves.

    Args:
        rows: those without any figure are left out.
        path: PNG to write.
    """
    rows = [row for row in rows if row.figures]
    looks = {id(row): (f"C{n % COLOURS}", STYLES[n // COLOURS % len(STYLES)]) for n, row in enumerate(rows)}
    single = [row for row in rows if row.runs == 1]
    objectives = Counter(row.settings.get("contrast.objective") for row in single if len(row.curves.get("loss", ())))
    objective = objectives.most_common(1)[0][0] if objectives else None
    alike = [row for row in single if row.settings.get("contrast.objective") == objective]
    label = "loss" if len(objectives) < 2 else f"loss of {objective}"
    panels = [("loss", label, alike), ("knn_held_out", "kNN of held-out images, %", single)]
    panels = [(name, label, some) for name, label, some in panels if any(len(row.curves.get(name, ())) for row in some)]
    figure = Figure(figsize=(5 + 4 * len(panels), max(3.2, 1.2 + 0.24 * len(rows))), layout="constrained", dpi=120)
    places = figure.subplots(1, 1 + len(panels), squeeze=False, width_ratios=[1.25, *[1] * len(panels)])[0]
    _draw_accuracies(places[0], rows, looks)
    for axes, (name, label, some) in zip(places[1:], panels, strict=True):
        for row in some:
            series = row.curves.get(name)
            if series is None or not len(series):
                continue
            values = series.values.tolist()
            smooth = running_mean(values) if name == "loss" else values
            colour, style = looks[id(row)]
            marker = "o" if len(values) < 3 else None
            axes.plot(series.epochs, smooth, color=colour, linestyle=style, linewidth=1.2, marker=marker, markersize=3)
        axes.set_xlim(left=0)
        axes.set_xlabel("epoch")
        axes.set_title(label, fontsize=9)
        axes.grid(alpha=0.25)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def _draw_accuracies(axes: Any, rows: Sequence[Row], looks: Mapping[int, tuple[str, str]]) -> None:
    places = range(len(rows))
    for name, marker, label in (("knn", "o", "kNN"), ("linear_probe", "D", "linear probe")):
        if not any(name in row.figures for row in rows):
            continue
        axes.plot([], [], marker, color="0.3", markersize=5, label=label)
        for place, row in zip(places, rows, strict=True):
            if name in row.figures:
                axes.errorbar(
                    row.figures[name],
                    place,
                    xerr=row.spread.get(name),
                    fmt=marker,
                    color=looks[id(row)][0],
                    markersize=5,
                    capsize=2,
                )
    for place, row in zip(places, rows, strict=True):  # the key to the curves beside
        colour, style = looks[id(row)]
        axes.axhline(place, color=colour, linestyle=style, linewidth=0.8, alpha=0.35, zorder=0)
    axes.set_yticks(list(places), [row.name for row in rows], fontsize=8)
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_color(looks[id(row)][0])
    axes.set_ylim(max(1, len(rows)) - 0.5, -0.5)
    bars = "; bars: standard deviation over seeds" if any(row.spread for row in rows) else ""
    axes.set_title(f"accuracy on test images, %{bars}", fontsize=9)
    axes.grid(axis="x", alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def of_configs(configs: Mapping[str, Config]) -> list[Row]:
    """Rows of runs that have not been made, for their settings."""
    return [Row(name, "", by_name(config)) for name, config in configs.items()]
