"""What clients elsewhere claim, and what can be believed of it, however it has come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mocosfl_device.wire import Violation

MOST_IMAGES = 10**9
"""Images that a client may say it holds."""
LEAP = 100.0
"""So many times the largest weight of the last average (or 1, if that is larger) may a client's weights be."""


@dataclass(frozen=True)
class Holding:
    """What a client tells of its images when it joins.

    Attributes:
        images: how many.
        sums, squares: of each channel, the sum of all pixels, 0 to 255, and of their squares.
    """

    images: int
    sums: Sequence[int]
    squares: Sequence[int]

    def check(self, channels: int, size: int) -> None:
        """Raises ``Violation`` where no images of so many channels and pixels a side are like that."""
        if not 0 < self.images <= MOST_IMAGES:
            raise Violation(f"{self.images} images; accepted are 1 to {MOST_IMAGES}")
        if not len(self.sums) == len(self.squares) == channels:
            raise Violation(f"statistics of {len(self.sums)} channels; the images have {channels}")
        pixels = self.images * size**2
        for total, squares in zip(self.sums, self.squares, strict=True):
            if squares > 255 * total or total**2 > squares * pixels:
                raise Violation("statistics that no images have")


def pooled(holdings: Sequence[Holding], size: int) -> tuple[int, NDArray[np.float64], NDArray[np.float64]]:
    """Images of all clients, and mean and standard deviation of each channel over all of them, in [0, 1]."""
    images = sum(holding.images for holding in holdings)
    sums, squares = (
        [sum(channel) for channel in zip(*(getattr(h, name) for h in holdings), strict=True)]  # exact integers
        for name in ("sums", "squares")
    )
    pixels = images * size**2
    mean = np.array([s / pixels for s in sums]) / 255
    variance = np.array([q / pixels - (s / pixels) ** 2 for s, q in zip(sums, squares, strict=True)]) / 255**2
    return images, mean, np.maximum(np.sqrt(np.maximum(variance, 0)), 1 / 255)


def check_weights(arrays: Mapping[str, NDArray], handed_out: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raises ``Violation`` for weights that no training leads to from those that were handed out.

    Args:
        arrays: of one client, ``HALF.NAME``.
        handed_out: by half and name.
    """
    for name, array in arrays.items():
        half, _, weight = name.partition(".")
        before = handed_out[half][weight]
        if not before.is_floating_point():
            continue
        most = LEAP * max(1.0, float(before.abs().max()))
        if (largest := float(np.abs(array).max(initial=0))) > most:
            raise Violation(f"weights {name}: {largest:.3g} is far from those handed out, at most {most:g} is allowed")
        if weight.endswith("running_var") and array.min(initial=0) < 0:
            raise Violation(f"weights {name}: a variance is negative")
