"""Backbones and their cuts, as tables for the terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table

from mocosfl.footprint.backbones import BYTES, Cuts


def table(cuts: Cuts) -> Table:
    """One row a cut: what is on either side, and what passes between them. Fits 60 columns."""
    table = _table(
        f"{cuts.settings.title}, images of {cuts.channels}x{cuts.size}x{cuts.size}, {cuts.features:,} features"
    )
    named = any(cut.cut != cut.after for cut in cuts.cuts)
    table.add_column("cut", justify="right" if named else "left", overflow="fold", no_wrap=named)
    if named:
        table.add_column("after", no_wrap=True)
    for title in ("client\nparams", "server\nparams", "client\nFLOPs", "server\nFLOPs", "latent", "bytes"):
        table.add_column(title, justify="right", no_wrap=True)
    for cut in cuts.cuts:
        table.add_row(
            str(cut.cut),
            *([cut.after] if named else []),
            short(cut.client_parameters),
            short(cut.server_parameters),
            short(2 * cut.client_macs),
            short(2 * cut.server_macs),
            "x".join(map(str, cut.latent_shape)),
            short(BYTES * cut.numbers),
        )
    return table


def overview(found: list[Cuts]) -> Table:
    """One row a backbone. Fits 60 columns."""
    first = found[0]
    table = _table(f"width {first.settings.width}, images of {first.channels}x{first.size}x{first.size}")
    table.add_column("backbone", no_wrap=True)
    for title in ("params", "FLOPs", "feat.", "cuts", "latent at\nfirst cut", "latent at\nlast cut"):
        table.add_column(title, justify="right", no_wrap=True)
    for cuts in found:
        ends = ("x".join(map(str, cut.latent_shape)) for cut in (cuts.cuts[0], cuts.cuts[-1]))
        table.add_row(
            cuts.settings.backbone,
            short(cuts.parameters),
            short(2 * cuts.macs),
            f"{cuts.features:,}",
            str(len(cuts.cuts)),
            *ends,
        )
    return table


def _table(title: str) -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, title=title)


def short(number: int) -> str:
    """A number in three digits: 11.2 M."""
    rounded = float(f"{number:.3g}")  # first: of 999,999 it makes 1 M
    for unit, step in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if rounded >= step:
            return f"{rounded / step:.3g} {unit}"
    return f"{rounded:g}"
