"""Projection heads: from features to the space of the contrast."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import nn

from mocosfl.models.layers import seeded
from mocosfl_device.randomness import stream

WIDTHS = {"v1": 128, "small": 512, "v2": 1024, "large": 2048}


def build_head(kind: Literal["v1", "small", "v2", "large"], features: int, seed: int) -> nn.Sequential:
    """Build and initialise a projection head that maps (n, ``features``) to (n, D).

    Args:
        kind: ``v1`` is linear to 128, ``small`` linear to 512, ``v2`` linear to 1,024, ReLU, linear to 1,024,
            ``large`` linear to 4,096, BatchNorm, ReLU, linear to 2,048.
        features: width of the features.
        seed: of the initial weights; the global generator is left as it was.
    """
    width = WIDTHS[kind]
    with seeded(stream(seed, "head")):
        if kind == "v2":
            return nn.Sequential(nn.Linear(features, 1024), nn.ReLU(inplace=True), nn.Linear(1024, width))
        if kind == "large":
            return nn.Sequential(
                nn.Linear(features, 4096), nn.BatchNorm1d(4096), nn.ReLU(inplace=True), nn.Linear(4096, width)
            )
        return nn.Sequential(nn.Linear(features, width))


def build_predictor(width: int, hidden: int, seed: int) -> nn.Sequential:
    """Build and initialise a predictor, (n, D) to (n, D): linear, BatchNorm, ReLU, linear (BYOL, MoCo v3).

    Args:
        width: D.
        hidden: width between the two.
        seed: of the initial weights; the global generator is left as it was.
    """
    with seeded(stream(seed, "predictor")):
        return nn.Sequential(
            nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, width)
        )


class WholeNetwork(nn.Sequential):
    """All that a client computes which holds the whole network: both halves, head, and predictor if there is one.

    Its parts are the modules that it is given, not copies.

    Args:
        client: the client half, (n, C, S, S) to latents.
        server: the server half, to features.
        head: the projection head, to (n, D).
        predictor: (n, D) to (n, D), or None.
    """

    def __init__(self, client: nn.Module, server: nn.Module, head: nn.Module, predictor: nn.Module | None) -> None:
        parts = {"client": client, "server": server, "head": head}
        super().__init__(OrderedDict(parts if predictor is None else parts | {"predictor": predictor}))

    @property
    def target(self) -> nn.Sequential:
        """What the momentum copy computes: no predictor."""
        parts = {name: part for name, part in self.named_children() if name != "predictor"}
        return nn.Sequential(OrderedDict(parts))
