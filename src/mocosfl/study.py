"""The commands of a study: `mocosfl recipes` lists what can be run, `mocosfl sweep` makes many runs, `mocosfl compare`
shows runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from mocosfl import published
from mocosfl.config import Config, by_name, value_text
from mocosfl.errors import SettingError, nearest
from mocosfl.recipes import RECIPES

if TYPE_CHECKING:
    from mocosfl.sweep import State

INTERRUPTED = 130


@dataclass
class RecipesArguments:
    """List the named configurations, by the table or figure of the paper that they repeat."""

    what: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="[WHAT]")]] = None
    """A table or figure (such as table-3): its rows, what the paper reports, and what we have measured. A recipe: its
    settings. all: every recipe. Unset: an overview."""


@dataclass
class SweepArguments:
    """Make all runs of a YAML file, each in a process and a folder of its own. What is finished is skipped, what was
    stopped goes on, what failed is kept apart; several sweeps, also on several machines, can share a folder."""

    file: tyro.conf.Positional[Path]
    """The sweep: recipe or config, set, runs, grid (docs/experiments.md)."""
    out: Path | None = None
    """Folder of the runs. Unset: runs/FILE, without its ending."""
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE [NAME=VALUE ...]")] = ()
    """Further settings for all runs, such as data.source=FOLDER."""
    only: str | None = None
    """Only the runs whose names fit this pattern, such as 'sync-*'."""
    jobs: int = 1
    """Runs at a time."""
    threads: int | None = None
    """CPU threads of each run. Unset: OMP_NUM_THREADS, or else an equal part of the cores."""
    retry: bool = False
    """Go on with the runs that failed, too."""
    dry_run: bool = False
    """Check all settings, print where the runs stand, and start none."""


@dataclass
class CompareArguments:
    """Print runs side by side: the settings in which they differ, kNN, linear probe, loss, images, time and bytes; and
    draw them, with their curves. Runs may be under way."""

    runs: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN [RUN ...]")]]
    """Run folders, or folders of runs, such as that of a sweep."""
    sort: str | None = None
    """Order by this: knn, linear_probe, loss, images, seconds, bytes, or a setting. Unset: by name."""
    base: str | None = None
    """Say of each run what it has other than this one. Unset: other than most."""
    mean: bool = False
    """Make one row of finished runs that differ in the seed alone: mean ± standard deviation; without curves."""
    json: bool = False
    """Print JSON instead of a table."""
    csv: bool = False
    """Print CSV instead of a table."""
    markdown: bool = False
    """Print a table in Markdown instead."""
    out: Path | None = None
    """Picture to write. Unset: compare.png, in the folder of the sweep if one is named alone."""


def recipes(args: Sequence[str], console: Console) -> int:
    """List recipes: an overview, the rows of a table, or one of them."""
    given = tyro.cli(RecipesArguments, prog="mocosfl recipes", args=args)
    if given.what is None:
        _overview(console)
    elif given.what == "all":
        for name in RECIPES:
            console.print(name, highlight=False)
    elif (group := published.group(given.what)) is not None:
        _rows(group, console)
    elif given.what in RECIPES:
        _one(given.what, console)
    else:
        known = [*RECIPES, *(group.name for group in published.GROUPS), "all"]
        hint = nearest(given.what, known) or "expected a recipe, a table or figure such as table-3, or all"
        raise SettingError(f"{given.what}: {hint}")
    return 0


def _overview(console: Console) -> None:
    table = _table("recipe", "data", "clients", "model", "time", "result")
    for name in published.elsewhere():
        entry = RECIPES[name]
        c = entry.make()
        images = f", {c.data.images:,}" if c.data.images else ""
        split = "IID" if c.partition.kind == "iid" else f"{c.partition.classes_per_client} classes"
        model = f"{c.model.backbone} x{c.model.width} cut {c.model.cut}"
        clients = f"{c.clients.number:,}, {split}"
        table.add_row(name, c.data.source + images, clients, model, entry.time, entry.result)
    console.print(table)
    table = _table("of the paper", "about", "recipes")
    for group in published.GROUPS:
        names = list(dict.fromkeys(row.recipe for row in group.rows))
        table.add_row(group.name, group.title, f"{names[0]} ... {names[-1]} ({len(names)})")
    console.print(table)
    console.print(
        "result: linear probe, measured here. More: mocosfl recipes table-3, mocosfl recipes NAME, mocosfl recipes all",
        highlight=False,
    )


def _table(*titles: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for title in titles:
        table.add_column(title, overflow="fold", no_wrap=title in ("recipe", "of the paper"))
    return table


def _rows(group: published.Group, console: Console) -> None:
    console.print(f"{group.name}: {group.title}", highlight=False)
    table = _table("recipe", "setting", "published", "ours")
    for row in group.rows:
        table.add_row(row.recipe, row.setting, row.published or published.UNKNOWN, row.ours or "not run")
    console.print(table)
    for line in (f"figure: {group.figure}", group.note, f"ours: {group.results}" if group.results else ""):
        if line:
            console.print(line, highlight=False, markup=False)


def _one(name: str, console: Console) -> None:
    entry = RECIPES[name]
    config = entry.make()
    say = partial(console.print, highlight=False, markup=False)
    say(f"{name}: {entry.time}; linear probe here: {entry.result}")
    for group, row in published.rows_of(name):
        say(f"  {group.name}, {row.setting}: {row.published or published.UNKNOWN} ({group.figure})")
    if config.clients.frozen:
        say(f"  mocosfl pretrain {name} --out PRE; mocosfl train {name} --clients.init PRE")
    else:
        say(f"  mocosfl train {name}")
    say("  settings that are not the defaults:")
    defaults = by_name(Config())
    changed = {key: value for key, value in by_name(config).items() if value != defaults[key] and key != "recipe"}
    for key, value in changed.items():
        say(f"    {key}: {value_text(value)}")


def sweep(args: Sequence[str], console: Console, errors: Console) -> int:
    """Make the runs of a file, and print a summary."""
    given = tyro.cli(SweepArguments, prog="mocosfl sweep", args=args)
    from mocosfl import sweep as sweeps
    from mocosfl.reporting import compare

    if given.jobs < 1 or (given.threads is not None and given.threads < 1):
        raise SettingError(f"jobs={given.jobs}, threads={given.threads}: expected 1 or more")
    runs = sweeps.chosen(sweeps.read(given.file, sweeps.assignments(given.set)), given.only)
    out, first = given.out or Path("runs") / given.file.stem, next(iter(runs))
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    states = sweeps.sweep(
        runs, out, jobs=given.jobs, threads=given.threads, retry=given.retry, dry_run=given.dry_run, say=say
    )
    if given.dry_run:
        rows = compare.of_configs(runs)
        base = compare.reference(rows, compare.differing(rows), first)
        for row in rows:
            say(f"{row.name}: {states[row.name].value}. {compare.told(compare.changes(row, base))}".rstrip(". "))
        say(f"Where nothing else is said: {compare.told(base)}" if base else "")
        return 0
    folder = sweeps.Folder(out, runs)
    paths = [folder.folder(name) for name in runs]
    # what another sweep has just claimed, or what could not be begun, has no settings there yet
    if begun := [path for path in paths if path.parent == folder.failed or (path / "config.yaml").exists()]:
        known = states[first] in (sweeps.State.FINISHED, sweeps.State.BEGUN)
        console.print(compare.table(compare.rows(begun), first if known else None, console.width))
    return _tell(states, out, given, errors)


def _tell(states: Mapping[str, State], out: Path, given: SweepArguments, errors: Console) -> int:
    """What remains, and the exit status."""
    from mocosfl.sweep import State

    say = partial(errors.print, highlight=False, markup=False, soft_wrap=True)
    of = {state: [name for name, found in states.items() if found is state] for state in State}
    if of[State.ELSEWHERE]:
        say(f"under way elsewhere: {', '.join(of[State.ELSEWHERE])}")
    if of[State.FAILED]:
        say(f"failed: {', '.join(of[State.FAILED])}; logs are in {out / 'failed'}, and --retry tries again")
    if remaining := of[State.BEGUN] + of[State.NEW]:
        say(f"stopped; the same command goes on with: {', '.join(remaining)}")
        return INTERRUPTED
    return 1 if of[State.FAILED] else 0


def compare(args: Sequence[str], console: Console, errors: Console) -> int:
    """Print and draw runs side by side."""
    given = tyro.cli(CompareArguments, prog="mocosfl compare", args=args)
    if not given.runs:
        errors.print("name runs, or the folder of a sweep", highlight=False)
        return 2
    if given.json + given.csv + given.markdown > 1:
        errors.print("--json, --csv and --markdown exclude each other", highlight=False)
        return 2
    from mocosfl.reporting import compare as comparing

    rows = comparing.rows(given.runs)
    if given.mean:
        rows = comparing.averaged(rows)
    if given.sort is not None:
        rows = comparing.ordered(rows, given.sort)
    if given.json:
        print(comparing.as_json(rows), end="")
    elif given.csv:
        print(comparing.as_csv(rows), end="")
    elif given.markdown:
        print(comparing.markdown(rows, given.base), end="")
    else:
        console.print(comparing.table(rows, given.base, console.width))
    out = given.out
    if out is None:
        folder = given.runs[0]  # of a sweep, unless it is a run
        out = (
            Path("compare.png") if len(given.runs) > 1 or (folder / "config.yaml").exists() else folder / "compare.png"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    comparing.draw(rows, out)
    errors.print(f"picture: {out}", highlight=False, soft_wrap=True)
    return 0
