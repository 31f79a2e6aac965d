"""What a run costs, as a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich import box
from rich.table import Table

from mocosfl.footprint.cost import Comparison, Cost, ServerCost
from mocosfl.footprint.published import Published
from mocosfl.footprint.traffic import DOWN, KINDS, UP, way

Row = tuple[str, Callable[[Cost], str]]


def table(comparison: Comparison) -> Table:
    """One column a client, one row a figure; sections as in ``mocosfl.footprint``."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), title=comparison.title)
    table.add_column("one client", no_wrap=True)
    for column in comparison.columns:
        table.add_column(column.name, justify="right")
    for section in _sections(comparison):
        rows = [(label, [figure(column) for column in comparison.columns]) for label, figure in section]
        rows = [(label, figures) for label, figures in rows if any(figures)]
        for label, figures in rows:
            table.add_row(label, *figures, end_section=label == rows[-1][0])
    return table


def server_table(cost: ServerCost) -> Table:
    """What the server spends."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("server")
    table.add_column(justify="right")
    table.add_row("parameters", f"{cost.parameters:,}")
    for name, macs in cost.macs.items():
        table.add_row(f"multiply-adds an image, {name}", amount(macs))
    table.add_row("multiply-adds of the run", amount(cost.macs_of_run))
    table.add_row(f"peak memory at {cost.batch:,} images", size(cost.memory))
    if cost.kept:
        table.add_row("latents kept", size(cost.kept))
    return table


def _sections(comparison: Comparison) -> list[list[Row]]:
    setting: list[Row] = [
        ("images", lambda c: f"{c.images:,.0f}"),
        ("epochs", lambda c: f"{c.epochs:g}"),
        ("images a step", lambda c: f"{c.batch:,}"),
        ("steps", lambda c: f"{c.steps:,.0f}"),
        ("synchronisations", lambda c: f"{c.averages:,.0f}"),
    ]
    arithmetic: list[Row] = [
        ("parameters", lambda c: f"{c.parameters:,}"),
        *((f"multiply-adds an image, {name}", _macs(name)) for name in ("forward", "backward", "momentum", "contrast")),
        ("multiply-adds of the run", lambda c: amount(c.macs_of_run)),
    ]
    memory: list[Row] = [
        ("peak memory, PyTorch", lambda c: size(c.memory)),
        ("peak memory, numpy", lambda c: size(c.memory_in_numpy) if c.memory_in_numpy else ""),
    ]
    traffic: list[Row] = [
        ("a step: up", lambda c: size(way(c.step, UP))),
        ("a step: down", lambda c: size(way(c.step, DOWN))),
        ("a synchronisation: up", lambda c: size(way(c.average, UP))),
        ("a synchronisation: down", lambda c: size(way(c.average, DOWN))),
        ("an epoch: up", lambda c: size(way(c.epoch, UP))),
        ("an epoch: down", lambda c: size(way(c.epoch, DOWN))),
        *((f"the run: {kind}", _kind(kind)) for kind in KINDS),
        ("the run: up", lambda c: size(way(c.run, UP))),
        ("the run: down", lambda c: size(way(c.run, DOWN))),
        ("in messages, up + down", lambda c: _pair(c.messages)),
        ("on the socket, about", lambda c: _pair(c.socket)),
    ]
    name = comparison.device.name
    device: list[Row] = [
        (f"{name}: computing", lambda c: time(c.seconds)),
        ("sending and receiving", lambda c: time(c.seconds_to_send)),
        ("energy", lambda c: energy(c.joules)),
        ("fits into its memory", lambda c: "yes" if c.fits else "no"),
    ]
    published: list[Row] = []
    for label, figures in (("as the paper counts", _counted), ("the paper", _paper)):
        published += [
            (f"{label}: operations", _of(figures, "operations", "G")),
            (f"{label}: weights", _of(figures, "weights", "MB")),
            (f"{label}: latents", _of(figures, "latents", "MB")),
            (f"{label}: memory", _of(figures, "memory", "MB")),
            (f"{label}: power", _of(figures, "watts", "W")),
            (f"{label}: energy", _of(figures, "watt_hours", "Wh")),
        ]
    return [setting, arithmetic, memory, traffic, device, published]


def _counted(cost: Cost) -> Published | None:
    return cost.as_published


def _paper(cost: Cost) -> Published | None:
    return cost.paper


def _of(figures: Callable[[Cost], Published | None], name: str, unit: str) -> Callable[[Cost], str]:
    def figure(cost: Cost) -> str:
        found = figures(cost)
        value = None if found is None else getattr(found, name)
        return "" if value is None else f"{value:,.1f} {unit}"

    return figure


def _macs(name: str) -> Callable[[Cost], str]:
    return lambda cost: amount(cost.macs[name]) if name in cost.macs else ""


def _kind(kind: str) -> Callable[[Cost], str]:
    return lambda cost: size(cost.run[kind])


def _pair(sizes: tuple[float, float] | None) -> str:
    return "" if sizes is None else f"{size(sizes[0])} + {size(sizes[1])}"


def amount(number: float) -> str:
    """A large number in three or four digits: 78.8 M."""
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:,.4g} {unit}"
    return f"{number:g}"


def size(number: float) -> str:
    """Bytes in four digits, decimal: 78.12 MB."""
    text = amount(number)
    return f"{text}B" if text[-1].isalpha() else f"{text} B"


def time(seconds: float) -> str:
    """Seconds, minutes, hours or days."""
    for unit, scale in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * scale:
            return f"{seconds / scale:,.3g} {unit}"
    return f"{seconds:.3g} s"


def energy(joules: float) -> str:
    """Joules or watt hours."""
    return f"{joules / 3600:,.4g} Wh" if joules >= 3600 else f"{joules:,.0f} J"
