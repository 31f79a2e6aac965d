"""Decoded images of one split, in memory or on disk, and the statistics of their channels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

CHUNK = 4 * 2**20
"""Pixels counted at a time by ``channel_statistics``."""


@dataclass(eq=False)
class ImageSet:
    """Images of one split, decoded.

    Attributes:
        images: (n, C, H, W) uint8; a memmap where the set is larger than memory.
        labels: (len(self),) int64 class numbers, None where the source has none.
        classes: names of the classes in the order of their numbers, None without labels.
        rows: (len(self),) int64, the rows of ``images`` that make up this set, None for all. With it, two
            sets share one file without a copy.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] | None = None
    rows: NDArray[np.int64] | None = None
    _pixels: torch.Tensor | None = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.images if self.rows is None else self.rows)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def streamed(self) -> bool:
        """Whether the pixels stay on disk."""
        return isinstance(self.images, np.memmap)

    def to(self, device: torch.device | str) -> Self:
        """Keep the pixels on a device as one uint8 tensor, for ``take``. A streamed set stays on disk.

        Args:
            device: where to keep them.

        Returns:
            This set, changed in place.
        """
        if not self.streamed:
            # torch wants writable memory; np.require copies only where it is not.
            held = self.images if self.rows is None else self.images[self.rows]
            self._pixels = torch.from_numpy(np.require(held, requirements=["C", "W"])).to(device)
        return self

    def take(self, rows: NDArray[np.int64], device: torch.device | str) -> torch.Tensor:
        """Pixels of some images, without waiting for the device.

        Args:
            rows: (k,) int64 row numbers in [0, len(self)), in any order, repeats allowed.
            device: where the pixels are wanted.

        Returns:
            (k, C, H, W) uint8 on ``device``.
        """
        device = torch.device(device)
        rows = np.asarray(rows, dtype=np.int64)
        if self._pixels is not None and _same_device(self._pixels.device, device):
            return self._pixels[upload(rows, device)]
        return upload(self.gather(rows), device)

    def gather(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """A copy of some images on the host.

        Args:
            rows: (k,) int64 row numbers in [0, len(self)).

        Returns:
            (k, C, H, W) uint8.
        """
        return self.images[rows if self.rows is None else self.rows[rows]]


def _same_device(held: torch.device, wanted: torch.device) -> bool:
    # "cuda" means the current device, while a tensor's device always has its number.
    if held.type != wanted.type or wanted.index is not None:
        return held == wanted
    return held.type != "cuda" or held.index == torch.cuda.current_device()


def upload(array: NDArray, device: torch.device) -> torch.Tensor:
    """Copy an array of the host to a device, without waiting for it."""
    tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    if device.type == "cuda":  # only pinned memory is copied without the host waiting
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def channel_statistics(images: ImageSet, rows: NDArray[np.int64]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, exactly, over the given images and no others.

    The pixels are counted by value, so that the sums are sums of integers and their order does not matter.

    Args:
        images: the set; read in chunks, in the order of its rows.
        rows: (k,) int64 row numbers in [0, len(images)), k at least 1.

    Returns:
        C means and C standard deviations, for pixels scaled to [0, 1]. A standard deviation is at least one
        grey level (1/255), so that a constant channel can be divided by it.

    Raises:
        ValueError: no rows are given.
    """
    if len(rows) == 0:
        raise ValueError("statistics of no images: rows is empty")
    _, height, width = images.shape
    counts = _counts(images, rows)
    values = np.arange(256) / 255
    pixels = len(rows) * height * width
    mean = counts @ values / pixels
    variance = (counts * (values - mean[:, None]) ** 2).sum(axis=1) / pixels
    std = np.maximum(np.sqrt(variance), 1 / 255)
    return tuple(mean.tolist()), tuple(std.tolist())


def channel_sums(images: ImageSet, rows: NDArray[np.int64]) -> tuple[list[int], list[int]]:
    """Sum of each channel's pixels, 0 to 255, and of their squares, over the given images.

    Args:
        images, rows: as for ``channel_statistics``.
    """
    counts, values = _counts(images, rows), np.arange(256)
    return (counts @ values).tolist(), (counts @ values**2).tolist()


def _counts(images: ImageSet, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each channel has each value: (C, 256)."""
    channels, height, width = images.shape
    step = max(1, CHUNK // (channels * height * width))
    counts = np.zeros((channels, 256), dtype=np.int64)
    ordered = np.sort(rows)
    for start in range(0, len(ordered), step):
        chunk = images.gather(ordered[start : start + step])
        for channel in range(channels):
            counts[channel] += np.bincount(chunk[:, channel].ravel(), minlength=256)
    return counts
