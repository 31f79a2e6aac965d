"""Backbones, the cut through them, and projection heads."""

from mocosfl.models.heads import WholeNetwork, build_head, build_predictor
from mocosfl.models.split import Bottleneck, SplitModel, build, split

__all__ = ["Bottleneck", "SplitModel", "WholeNetwork", "build", "build_head", "build_predictor", "split"]
