"""Projection heads: from features to the space of the contrast."""

from __future__ import annotations

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
