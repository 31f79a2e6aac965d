"""How latents and gradients travel: in full, or in fewer bytes.

A codec turns float32 numbers into bytes and back. What it loses depends on the numbers alone, so that a simulation can
round likewise.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


class Codec(ABC):
    """Numbers of images to bytes and back."""

    @abstractmethod
    def encode(self, x: Array) -> bytes:
        """Numbers, (V, B, ...) float32, as bytes: ``size(x.shape)`` of them."""

    @abstractmethod
    def decode(self, data: bytes, shape: Sequence[int]) -> Array:
        """What ``encode`` has kept of an array of this shape.

        Raises:
            ValueError: these are not ``size(shape)`` bytes, or do not describe such an array.
        """

    @abstractmethod
    def size(self, shape: Sequence[int]) -> int:
        """Bytes of an array of this shape."""

    def check(self, data: bytes, shape: Sequence[int]) -> None:
        """Raises ``ValueError`` if bytes are too many or too few for a shape."""
        if len(data) != self.size(shape):
            raise ValueError(f"{len(data)} bytes instead of {self.size(shape)}")


class Full(Codec):
    """float32: nothing is lost."""

    def encode(self, x: Array) -> bytes:
        return x.astype("<f4", copy=False).tobytes()

    def decode(self, data: bytes, shape: Sequence[int]) -> Array:
        self.check(data, shape)
        return np.frombuffer(data, "<f4").reshape(shape)

    def size(self, shape: Sequence[int]) -> int:
        return 4 * math.prod(shape)


class BFloat16(Codec):
    """The nearest bfloat16: 8 bits of precision, float32's range."""

    def encode(self, x: Array) -> bytes:
        return _to_bf16(x).tobytes()

    def decode(self, data: bytes, shape: Sequence[int]) -> Array:
        self.check(data, shape)
        return _from_bf16(np.frombuffer(data, "<u2")).reshape(shape)

    def size(self, shape: Sequence[int]) -> int:
        return 2 * math.prod(shape)


class Affine(Codec):
    """Whole numbers of 8 or 4 bits, between the least and the greatest number of each image's channel.

    The least number and the step travel as bfloat16, because gradients are too small for float16.

    Args:
        bits: 8 or 4.
    """

    def __init__(self, bits: int) -> None:
        self.bits, self.levels = bits, np.float32(2**bits - 1)

    def encode(self, x: Array) -> bytes:
        rows = x.reshape(_channels(x.shape), -1)
        with np.errstate(invalid="ignore", over="ignore"):
            low = _to_bf16(rows.min(axis=1))
            step = _to_bf16((rows.max(axis=1) - _from_bf16(low)) / self.levels)
        low_, step_ = _from_bf16(low)[:, None], _from_bf16(step)[:, None]
        with np.errstate(invalid="ignore"):  # what is not finite shows in the least number or the step
            codes = np.rint((rows - low_) / np.where(step_ > 0, step_, np.float32(1)))
            codes = codes.clip(0, self.levels).astype(np.uint8).ravel()
        if self.bits == 4:
            codes = np.append(codes, np.zeros(len(codes) % 2, np.uint8))
            codes = codes[::2] | codes[1::2] << 4
        return low.tobytes() + step.tobytes() + codes.tobytes()

    def decode(self, data: bytes, shape: Sequence[int]) -> Array:
        self.check(data, shape)
        channels = _channels(shape)
        low, step = (_from_bf16(np.frombuffer(data, "<u2", channels, at * 2 * channels))[:, None] for at in (0, 1))
        codes = np.frombuffer(data, np.uint8, offset=4 * channels)
        if self.bits == 4:
            codes = np.stack([codes & 15, codes >> 4], axis=1).ravel()[: math.prod(shape)]
        with np.errstate(invalid="ignore", over="ignore"):  # whoever sent what is not finite is told so later
            return (low + codes.reshape(channels, -1).astype(np.float32) * step).reshape(shape)

    def size(self, shape: Sequence[int]) -> int:
        return 4 * _channels(shape) + math.ceil(math.prod(shape) * self.bits / 8)


class TopK(Codec):
    """The numbers of largest magnitude of each image, as bfloat16; the others are zero.

    Args:
        share: of the numbers that are kept, of each image.
    """

    def __init__(self, share: float) -> None:
        self.share = share

    def _kept(self, shape: Sequence[int]) -> tuple[int, int]:
        """Numbers of an image, and how many of them are kept."""
        numbers = math.prod(shape[2:])
        return numbers, max(1, round(self.share * numbers))

    def encode(self, x: Array) -> bytes:
        numbers, kept = self._kept(x.shape)
        rows = x.reshape(-1, numbers)
        magnitude = np.where(np.isnan(rows), np.float32(np.inf), np.abs(rows))  # not to be hidden
        order = np.argsort(-magnitude, axis=1, kind="stable")  # of equal ones the first
        places = np.sort(order[:, :kept], axis=1)
        mask = np.zeros(rows.shape, bool)
        np.put_along_axis(mask, places, True, axis=1)
        values = np.take_along_axis(rows, places, axis=1)
        return np.packbits(mask, axis=1).tobytes() + _to_bf16(values).tobytes()

    def decode(self, data: bytes, shape: Sequence[int]) -> Array:
        self.check(data, shape)
        numbers, kept = self._kept(shape)
        images = math.prod(shape[:2])
        packed = math.ceil(numbers / 8)
        mask = np.frombuffer(data, np.uint8, images * packed).reshape(images, packed)
        places = np.unpackbits(mask, axis=1, count=numbers).astype(bool)
        if not (places.sum(axis=1) == kept).all():
            raise ValueError(f"an image with another number of places than {kept}")
        x = np.zeros((images, numbers), np.float32)
        x[places] = _from_bf16(np.frombuffer(data, "<u2", offset=images * packed))
        return x.reshape(shape)

    def size(self, shape: Sequence[int]) -> int:
        numbers, kept = self._kept(shape)
        return math.prod(shape[:2]) * (math.ceil(numbers / 8) + 2 * kept)


NAMES = ("fp32", "bf16", "int8", "int4", "topk")
"""Of all codecs."""


def codec_of(name: str, share: float = 0.1) -> Codec:
    """A codec by its name.

    Args:
        name: one of ``NAMES``.
        share: of the numbers that ``topk`` keeps.

    Raises:
        ValueError: there is no such codec.
    """
    match name:
        case "fp32":
            return Full()
        case "bf16":
            return BFloat16()
        case "int8" | "int4":
            return Affine(int(name[3:]))
        case "topk":
            return TopK(share)
    raise ValueError(f"unknown codec {name[:40]!r}; accepted are {', '.join(NAMES)}")


def _channels(shape: Sequence[int]) -> int:
    """Channels of all images; an image without height and width is one channel."""
    return math.prod(shape[: 3 if len(shape) > 3 else 2])


def _to_bf16(x: Array) -> NDArray[np.uint16]:
    """The nearest bfloat16's bits; ties to even."""
    raw = np.ascontiguousarray(x, "<f4").view("<u4")
    raw = np.where(np.isnan(x), np.uint32(0x7FC00000), raw)  # rounding would make something else of it
    return ((raw + np.uint32(0x7FFF) + ((raw >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype("<u2")


def _from_bf16(raw: NDArray[np.uint16]) -> Array:
    return (raw.astype("<u4") << np.uint32(16)).view("<f4")
