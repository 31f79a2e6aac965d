"""A backbone as a sequence of pieces, between which it can be cut."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import nn

Stem = Literal["32", "64", "224"]


@dataclass(frozen=True)
class Piece:
    """One step of a backbone between two places where it can be cut.

    Attributes:
        name: such as ``stem`` or ``stage1.0``.
        module: maps (n, C, H, W) to (n, ``channels``, H', W'), or tokens to tokens.
        convolutions: convolutions on its main path; of a vision transformer the patch embedding and each block count
            one.
        channels: channels of its output, or the width of its tokens.
    """

    name: str
    module: nn.Module
    convolutions: int
    channels: int


def _pooled() -> dict[str, nn.Module]:
    return {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}


@dataclass(frozen=True)
class Backbone:
    """A whole backbone.

    Attributes:
        pieces: in the order in which they compute.
        features: width of the features.
        ending: layers from the last piece's output to features (n, ``features``), by name. Unset: the mean over all
            pixels.
        unit: what cuts are counted in; None where they are named.
    """

    pieces: list[Piece]
    features: int
    ending: dict[str, nn.Module] = field(default_factory=_pooled)
    unit: str | None = "convolutions"


def stem_for(size: int) -> Stem:
    """The published stem for images of this many pixels a side."""
    return "32" if size <= 48 else "64" if size <= 128 else "224"
