"""Alignment and uniformity of features on the unit sphere.

Wang and Isola, *Understanding contrastive representation learning through alignment and uniformity on the hypersphere*,
ICML 2020, section 4.1. Of both, less is better: a contrastive loss asks for views of one image close together
(alignment), and for images spread evenly over the sphere (uniformity).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mocosfl.evaluation.features import doubled

CHUNK_NUMBERS = 2**24
"""Most distances at the same time: 128 MiB of float64."""


def alignment(first: Tensor, second: Tensor, alpha: float = 2) -> float:
    """Mean distance of the features of two views of one image.

        L_align = E ||f(x) - f(x')||^alpha

    Args:
        first: (N, D) features of one view of each image, floating point; normalised here.
        second: (N, D) features of the other view of the same images, in the same order.
        alpha: exponent of the distance.

    Returns:
        L_align: 0 where both views are always the same; 2 for alpha = 2 where they have nothing to do with each other.

    Raises:
        ValueError: the shapes are not (N, D) twice with N at least 1.
    """
    if first.ndim != 2 or not len(first) or first.shape != second.shape:
        raise ValueError(
            f"features of shapes {tuple(first.shape)} and {tuple(second.shape)}: expected (N, D) twice, N at least 1"
        )
    one, other = (F.normalize(doubled(features), dim=1) for features in (first, second))
    return float((one - other).norm(dim=1).pow(alpha).mean())


def uniformity(features: Tensor, t: float = 2) -> float:
    """Logarithm of the mean Gaussian potential of all pairs of images.

        L_uniform = log E exp(-t ||f(x) - f(y)||^2)

    The mean is over pairs of different images. An image has distance 0 to itself, which says nothing.

    Args:
        features: (N, D), one view of each image, floating point; normalised here.
        t: the larger, the more near pairs count.

    Returns:
        L_uniform: 0 where all features are the same, else less; log E exp(-2t(1 - cos)) of random directions, about -2t
        in many dimensions, where they are spread evenly.

    Raises:
        ValueError: the shape is not (N, D) with N at least 2.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features of shape {tuple(features.shape)}: expected (N, D) with N at least 2")
    x = F.normalize(doubled(features), dim=1)
    total = x.new_zeros(())
    rows = max(1, CHUNK_NUMBERS // len(x))
    for start in range(0, len(x), rows):
        part = x[start : start + rows]
        potential = torch.exp(-t * (2 - 2 * part @ x.T).clamp_(min=0))  # ||a - b||^2 of unit vectors
        # Left out exactly: an image's distance to itself is 0 but for rounding.
        potential.diagonal(start).zero_()
        total += potential.sum()
    return math.log(float(total) / (len(x) * (len(x) - 1)))
