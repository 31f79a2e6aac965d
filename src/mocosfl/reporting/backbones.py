"""Backbones and their cuts, as tables for the terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table

from mocosfl.footprint.backbones import BYTES, Cuts


def table(cuts: Cuts) -> Table:
    """One row a cut: what is on either side, and what passes between them."""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=f"{cuts.settings.title}, images of {cuts.channels}x{cuts.size}x{cuts.size}, {cuts.features:,} features",
    )
    named = any(cut.cut != cut.after for cut in cuts.cuts)
    table.add_column("cut", justify="right" if named else "left")
    if named:
        table.add_column("after")
    for title in (
        "client\nparameters",
        "server\nparameters",
        "client\nFLOPs",
        "server\nFLOPs",
        "latent",
        "numbers",
        "KB",
    ):
        table.add_column(title, justify="right")
    for cut in cuts.cuts:
        table.add_row(
            str(cut.cut),
            *([cut.after] if named else []),
            f"{cut.client_parameters:,}",
            f"{cut.server_parameters:,}",
            _flops(cut.client_macs),
            _flops(cut.server_macs),
            "x".join(map(str, cut.latent_shape)),
            f"{cut.numbers:,}",
            f"{kilobytes:,.1f}" if (kilobytes := BYTES * cut.numbers / 1000) >= 1 else f"{kilobytes:.3g}",
        )
    return table


def overview(found: list[Cuts]) -> Table:
    """One row a backbone."""
    first = found[0]
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        title=f"width {first.settings.width}, images of {first.channels}x{first.size}x{first.size}",
    )
    table.add_column("backbone", no_wrap=True)
    for title in ("parameters", "FLOPs", "features", "cuts", "latents at the first cut", "at the last"):
        table.add_column(title, justify="right")
    for cuts in found:
        ends = ("x".join(map(str, cut.latent_shape)) for cut in (cuts.cuts[0], cuts.cuts[-1]))
        table.add_row(
            cuts.settings.backbone,
            f"{cuts.parameters:,}",
            _flops(cuts.macs),
            f"{cuts.features:,}",
            str(len(cuts.cuts)),
            *ends,
        )
    return table


def _flops(macs: int) -> str:
    """A multiply-add is two operations."""
    value = 2.0 * macs
    for unit, step in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= step:
            return f"{value / step:.3g} {unit}"
    return f"{value:g}"
