"""A client half in numpy: forward and backward.

The server describes the half as a list of layers (``mocosfl.models.description``), so nothing here knows of an
architecture. Arrays are float32 images, (n, C, H, W). Between the stem and the bottleneck lie more numbers than all
else that a small client holds. Groups of a norm do not see each other, so that stretch is computed a few channels at a
time, and again on the way back instead of being kept (``Sliced``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Weights = dict[str, Array]
"""Parameters by name, as PyTorch names and lays them out."""

SLICE = 8
"""Channels that ``Sliced`` computes at a time, or one group of the norm if that is larger."""


STRIP = 16_384
"""Numbers of the rows of an image that a convolution with stride 1 reads at a time."""


class Layer(Protocol):
    """A piece of a network. ``backward`` belongs to the ``forward`` before it, and may be called once."""

    def forward(self, x: Array, weights: Mapping[str, Array], learns: bool) -> Array:
        """Compute; keep what ``backward`` needs if ``learns``."""

    def backward(self, gradient: Array, weights: Mapping[str, Array], into: Mapping[str, Array], wanted: bool) -> Array:
        """Add the weights' gradients to ``into``; return that of the input if it is ``wanted``, else anything."""


class Convolution:
    """A convolution with zeros around the image, its filters standardised on request.

    It is the sum over the kernel's places of a matrix product each: unfolding the image would take as many times its
    memory as the kernel has places. With stride 1 it takes a strip of rows at a time, with the zeros around it: then
    what a place of the kernel reads is one piece of memory for all rows, and nothing is copied for a place.

    Args:
        name: of the weight, and with ``bias`` of the bias, in the weights.
        kernel, stride, padding: pixels.
        bias: whether there is one.
        standardised: whether filters are brought to mean 0 and variance 1 (Qiao et al., 2019).
    """

    def __init__(self, name: str, kernel: int, stride: int, padding: int, bias: bool, standardised: bool) -> None:
        self.name, self.kernel, self.stride, self.padding = name, kernel, stride, padding
        self.bias, self.standardised = bias, standardised
        self._x: Array | None = None

    def _filters(self, weights: Mapping[str, Array]) -> tuple[Array, Array | None]:
        """Filters as they are used, and one over their deviation, (O, 1, 1, 1)."""
        w = weights[f"{self.name}.weight"]
        if not self.standardised:
            return w, None
        w = w - w.mean(axis=(1, 2, 3), keepdims=True)
        variance = np.einsum("ocij,ocij->o", w, w) / np.float32(w[0].size - 1)
        scale = (1 / np.sqrt(variance + np.float32(1e-10)))[:, None, None, None]
        w *= scale
        return w, scale

    def _places(self, height: int, width: int) -> Iterator[tuple[int, int, tuple[slice, slice], tuple[slice, slice]]]:
        """Every place of the kernel, the outputs that it reaches, and the inputs that it reads for them."""
        for i in range(self.kernel):
            for j in range(self.kernel):
                (out_i, in_i), (out_j, in_j) = (
                    _reach(
                        place - self.padding, self.stride, size, _outputs(size, self.kernel, self.stride, self.padding)
                    )
                    for place, size in ((i, height), (j, width))
                )
                if out_i.start < out_i.stop and out_j.start < out_j.stop:  # else it sees zeros alone
                    yield i, j, (out_i, out_j), (in_i, in_j)

    def _strips(self, channels: int, height: int, width: int) -> Iterator[tuple[int, int]]:
        """First row and number of rows of each strip of the outputs, at stride 1."""
        outputs = _outputs(height, self.kernel, 1, self.padding)
        rows = max(1, STRIP // (channels * (width + 2 * self.padding)))
        for top in range(0, outputs, rows):
            yield top, min(rows, outputs - top)

    def _strip(self, image: Array, top: int, rows: int) -> Array:
        """What the outputs of a strip read, with zeros around it: (C, numbers), row after row, and some zeros more."""
        channels, height, width = image.shape
        wide, high = width + 2 * self.padding, rows + self.kernel - 1
        strip = np.zeros((channels, high * wide + self.kernel - 1), np.float32)
        first, last = max(0, top - self.padding), min(height, top - self.padding + high)
        within = strip[:, : high * wide].reshape(channels, high, wide)
        start = first - (top - self.padding)
        within[:, start : start + last - first, self.padding : self.padding + width] = image[:, first:last]
        return strip

    def forward(self, x: Array, weights: Mapping[str, Array], learns: bool) -> Array:
        filters, _ = self._filters(weights)
        n, channels, height, width = x.shape
        size = [_outputs(side, self.kernel, self.stride, self.padding) for side in (height, width)]
        y = np.zeros((n, len(filters), *size), np.float32)
        if self.stride == 1:
            wide = width + 2 * self.padding
            taps = np.ascontiguousarray(filters.transpose(2, 3, 0, 1))  # (k, k, O, C)
            del filters
            for image, out in zip(x, y, strict=True):
                for top, rows in self._strips(channels, height, width):
                    strip, length = self._strip(image, top, rows), rows * wide
                    # Of every row the last outputs read beyond its end, and are dropped.
                    total = taps[0, 0] @ strip[:, :length]
                    for i, j in list(np.ndindex(*taps.shape[:2]))[1:]:
                        total += taps[i, j] @ strip[:, i * wide + j :][:, :length]
                    out[:, top : top + rows] = total.reshape(-1, rows, wide)[:, :, : size[1]]
        else:
            for i, j, (a, b), (c, d) in self._places(height, width):
                piece = x[:, :, c, d]
                product = filters[:, :, i, j] @ piece.reshape(*piece.shape[:2], -1)
                y[:, :, a, b] += product.reshape(n, -1, *piece.shape[2:])
        if self.bias:
            y += weights[f"{self.name}.bias"][:, None, None]
        self._x = x if learns else None
        return y

    def backward(self, gradient: Array, weights: Mapping[str, Array], into: Mapping[str, Array], wanted: bool) -> Array:
        assert self._x is not None
        x, self._x = self._x, None
        filters, scale = self._filters(weights)
        if self.bias:
            into[f"{self.name}.bias"][...] += gradient.sum(axis=(0, 2, 3))
        if self.stride == 1:
            of_filters, of_x = self._back(x, gradient, filters, wanted)
        else:
            of_filters, of_x = np.zeros_like(filters), np.zeros_like(x if wanted else x[:0])
            for i, j, (a, b), (c, d) in self._places(*x.shape[2:]):
                piece, g = x[:, :, c, d], gradient[:, :, a, b]
                flat, g_flat = piece.reshape(*piece.shape[:2], -1), g.reshape(*g.shape[:2], -1)
                of_filters[:, :, i, j] = (g_flat @ flat.transpose(0, 2, 1)).sum(axis=0)
                if wanted:
                    of_x[:, :, c, d] += (filters[:, :, i, j].T @ g_flat).reshape(piece.shape)
        if scale is not None:  # through the standardisation
            count = filters[0].size
            along = (of_filters * filters).sum(axis=(1, 2, 3), keepdims=True) / (count - 1)
            of_filters = (of_filters - of_filters.mean(axis=(1, 2, 3), keepdims=True) - filters * along) * scale
        into[f"{self.name}.weight"][...] += of_filters
        return of_x

    def _back(self, x: Array, gradient: Array, filters: Array, wanted: bool) -> tuple[Array, Array]:
        """The way back at stride 1: gradients of the filters, and of the input if that is ``wanted``."""
        n, channels, height, width = x.shape
        wide, high = width + 2 * self.padding, height + 2 * self.padding
        taps = np.ascontiguousarray(filters.transpose(2, 3, 1, 0))  # (k, k, C, O)
        of_taps = np.zeros(taps.shape, np.float32)
        around = np.zeros((n if wanted else 0, channels, high * wide + self.kernel - 1), np.float32)
        for number, image in enumerate(x):
            for top, rows in self._strips(channels, height, width):
                strip, length = self._strip(image, top, rows), rows * wide
                g = np.zeros((gradient.shape[1], rows, wide), np.float32)
                g[:, :, : gradient.shape[3]] = gradient[number, :, top : top + rows]
                g = g.reshape(-1, length)
                for i, j in np.ndindex(*taps.shape[:2]):
                    at = i * wide + j
                    of_taps[i, j] += strip[:, at : at + length] @ g.T
                    if wanted:
                        around[number, :, top * wide + at :][:, :length] += taps[i, j] @ g
        inside = around[:, :, : high * wide].reshape(-1, channels, high, wide)
        rows_, columns = (slice(self.padding, self.padding + side) for side in (height, width))
        return of_taps.transpose(3, 2, 0, 1), inside[:, :, rows_, columns]


class GroupNorm:
    """GroupNorm (Wu and He, 2018).

    Args:
        name: of weight and bias in the weights.
        channels: of a group.
        eps: added to the variance.
        in_place: whether what comes in may be written over.
    """

    def __init__(self, name: str, channels: int, eps: float, in_place: bool = False) -> None:
        self.name, self.channels, self.eps, self.in_place = name, channels, eps, in_place
        self._kept: tuple[Array, Array] | None = None

    def forward(self, x: Array, weights: Mapping[str, Array], learns: bool) -> Array:
        groups = x.reshape(len(x), -1, self.channels * x.shape[2] * x.shape[3])
        y = np.subtract(groups, groups.mean(axis=2, keepdims=True), out=groups if self.in_place else None)
        squares = np.einsum("ngk,ngk->ng", y, y)[:, :, None] / np.float32(y.shape[2])
        scale = 1 / np.sqrt(squares + np.float32(self.eps))
        y *= scale
        self._kept = (y, scale) if learns else None
        weight, bias = (weights[f"{self.name}.{part}"][:, None, None] for part in ("weight", "bias"))
        normed = y.reshape(x.shape)
        out: Array = np.multiply(normed, weight, out=None if learns else normed)
        out += bias
        return out

    def backward(self, gradient: Array, weights: Mapping[str, Array], into: Mapping[str, Array], wanted: bool) -> Array:
        assert self._kept is not None
        (y, scale), self._kept = self._kept, None
        into[f"{self.name}.bias"][...] += gradient.sum(axis=(0, 2, 3))
        into[f"{self.name}.weight"][...] += np.einsum("nchw,nchw->c", gradient, y.reshape(gradient.shape))
        g: Array = (gradient * weights[f"{self.name}.weight"][:, None, None]).reshape(y.shape)
        along = np.einsum("ngk,ngk->ng", g, y)[:, :, None] / np.float32(y.shape[2])
        g -= g.mean(axis=2, keepdims=True)
        y *= along  # in place, as nothing else needs it
        g -= y
        g *= scale
        return g.reshape(gradient.shape)


class ReLU:
    """max(x, 0), in place."""

    def __init__(self) -> None:
        self._on: NDArray[np.bool_] | None = None

    def forward(self, x: Array, weights: Mapping[str, Array], learns: bool) -> Array:
        np.maximum(x, 0, out=x)
        self._on = x > 0 if learns else None
        return x

    def backward(self, gradient: Array, weights: Mapping[str, Array], into: Mapping[str, Array], wanted: bool) -> Array:
        assert self._on is not None
        on, self._on = self._on, None
        return gradient * on


class Chain:
    """Layers one after the other."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = list(layers)

    def forward(self, x: Array, weights: Mapping[str, Array], learns: bool) -> Array:
        for layer in self.layers:
            x = layer.forward(x, weights, learns)
        return x

    def backward(self, gradient: Array, weights: Mapping[str, Array], into: Mapping[str, Array], wanted: bool) -> Array:
        for place, layer in reversed(list(enumerate(self.layers))):
            gradient = layer.backward(gradient, weights, into, wanted or place > 0)
        return gradient


class Residual:
    """Layers beside a shortcut, summed (He et al., 2016). An empty shortcut is the identity."""

    def __init__(self, body: Chain, shortcut: Chain) -> None:
        self.body, self.shortcut = body, shortcut

    def forward(self, x: Array, weights: Mapping[str, Array], learns: bool) -> Array:
        y = self.body.forward(x, weights, learns)
        y += self.shortcut.forward(x, weights, learns)
        return y

    def backward(self, gradient: Array, weights: Mapping[str, Array], into: Mapping[str, Array], wanted: bool) -> Array:
        of_x = self.body.backward(gradient, weights, into, wanted)
        beside = self.shortcut.backward(gradient, weights, into, wanted)
        return of_x + beside if wanted else of_x


class Sliced:
    """Convolution, GroupNorm, ReLU and a plain convolution, a few channels at a time.

    Each slice of the channels in the middle is a small network of its own, over views of the weights, and the outputs
    of all slices add up to the whole.

    Args:
        first, norm, last: the layers; ``last`` does not standardise its filters.
    """

    def __init__(self, first: Convolution, norm: GroupNorm, last: Convolution) -> None:
        self.first, self.norm, self.last = first, norm, last
        plain = Convolution(last.name, last.kernel, last.stride, last.padding, bias=False, standardised=False)
        self.slice = Chain([first, norm, ReLU(), plain])
        self._x: Array | None = None

    def _slices(self, *weights: Mapping[str, Array]) -> Iterator[list[Weights]]:
        """Views of the slices' weights, of each of the arguments."""
        channels = len(weights[0][f"{self.first.name}.weight"])
        inner = (self.first.name, self.norm.name)
        step = self.norm.channels * max(1, SLICE // self.norm.channels)
        for start in range(0, channels, step):
            part = slice(start, start + step)
            yield [
                {name: w[part] for name, w in given.items() if name.rpartition(".")[0] in inner}
                | {f"{self.last.name}.weight": given[f"{self.last.name}.weight"][:, part]}
                for given in weights
            ]

    def forward(self, x: Array, weights: Mapping[str, Array], learns: bool) -> Array:
        y: Array | None = None
        for (part,) in self._slices(weights):
            of_part = self.slice.forward(x, part, learns=False)
            y = of_part if y is None else np.add(y, of_part, out=y)
        assert y is not None
        self._x = x if learns else None
        if self.last.bias:
            y += weights[f"{self.last.name}.bias"][:, None, None]
        return y

    def backward(self, gradient: Array, weights: Mapping[str, Array], into: Mapping[str, Array], wanted: bool) -> Array:
        assert self._x is not None
        x, self._x = self._x, None
        of_x = np.zeros_like(x if wanted else x[:0])
        for part, into_part in self._slices(weights, into):
            self.slice.forward(x, part, learns=True)
            of_part = self.slice.backward(gradient, part, into_part, wanted)
            if wanted:
                of_x += of_part
        if self.last.bias:
            into[f"{self.last.name}.bias"][...] += gradient.sum(axis=(0, 2, 3))
        return of_x


def _outputs(size: int, kernel: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - kernel) // stride + 1


def _reach(offset: int, stride: int, size: int, outputs: int) -> tuple[slice, slice]:
    """Outputs whose input ``stride * output + offset`` lies in the image, and those inputs."""
    first = max(0, math.ceil(-offset / stride))
    last = min(outputs, (size - 1 - offset) // stride + 1)
    start = stride * first + offset
    return slice(first, last), slice(start, stride * (last - 1) + offset + 1, stride)


def built(description: Sequence[Mapping[str, Any]]) -> Chain:
    """The network that a description means.

    Args:
        description: of layers, each with ``kind``, as ``mocosfl.models.description.describe`` makes it.

    Raises:
        ValueError: a layer is of an unknown kind.
    """
    layers: list[Layer] = []
    for item in description:
        facts = dict(item)
        kind = facts.pop("kind", None)
        if kind == "conv":
            layers.append(Convolution(**facts))
        elif kind == "group_norm":
            layers.append(GroupNorm(**facts, in_place=bool(layers) and isinstance(layers[-1], Convolution)))
        elif kind == "relu":
            layers.append(ReLU())
        elif kind == "residual":
            layers.append(Residual(built(facts["body"]), built(facts["shortcut"])))
        else:
            raise ValueError(f"a layer of unknown kind {str(kind)[:40]!r}")
        match layers[-4:]:
            case [Convolution() as first, GroupNorm() as norm, ReLU(), Convolution(standardised=False) as last]:
                layers[-4:] = [Sliced(first, norm, last)]
    return Chain(layers)
