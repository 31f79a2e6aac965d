"""Backbones, the cut through them, and projection heads."""

from mocosfl.models.heads import build_head
from mocosfl.models.split import Bottleneck, SplitModel, build, split

__all__ = ["Bottleneck", "SplitModel", "build", "build_head", "split"]
