"""MoCo's augmentations: what happens to each view, and views in numpy.

Parameters are drawn here for every client, a pure function of seed, client, draw and view, and applied here for clients
without PyTorch (``augmented``); ``mocosfl.data.augment`` applies them on a compute device. Geometry and blur are linear
in the pixels and separable, so each is one small matrix on either side of the image: no gathers, no loop over images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mocosfl_device.randomness import AUGMENT, uniform

CROP_TRIES = 10
ASPECT = (3 / 4, 4 / 3)
GREY_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma, as Pillow and torchvision convert to grey


@dataclass(frozen=True)
class Policy:
    """What an augmentation does, every value settled.

    Attributes:
        crop_scale: range of the share of the area that a crop keeps.
        brightness, contrast, saturation, hue: strengths of the colour jitter.
        jitter_p, grey_p, blur_p, flip_p: probability of each step.
        blur_sigma: range of the blur's standard deviation, in pixels.
        grey_first: turn grey before the colour jitter instead of after it.
    """

    crop_scale: tuple[float, float]
    brightness: float
    contrast: float
    saturation: float
    hue: float
    jitter_p: float
    grey_p: float
    blur_p: float
    blur_sigma: tuple[float, float]
    flip_p: float
    grey_first: bool

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """The policy's published values (He et al., 2020; Chen et al., 2020), with the settings that are set.

        Args:
            settings: ``policy``, v1 or v2, and any of the attributes; None where the policy's value holds.
        """
        given = {name: value for name, value in settings.items() if name != "policy" and value is not None}
        return cls(**(_PUBLISHED[settings["policy"]] | given))


_PUBLISHED: dict[str, dict] = {
    "v1": {
        "crop_scale": (0.2, 1.0),
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.4,
        "hue": 0.4,
        "jitter_p": 1.0,
        "grey_p": 0.2,
        "blur_p": 0.0,
        "blur_sigma": (0.1, 2.0),
        "flip_p": 0.5,
        "grey_first": True,
    },
    "v2": {
        "crop_scale": (0.08, 1.0),
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.4,
        "hue": 0.1,
        "jitter_p": 0.8,
        "grey_p": 0.2,
        "blur_p": 0.5,
        "blur_sigma": (0.1, 2.0),
        "flip_p": 0.5,
        "grey_first": False,
    },
}


@dataclass(frozen=True)
class AugmentParameters:
    """What happens to each of n views.

    Attributes:
        box: (n, 4) float32, crop as top, left, height, width in whole pixels.
        flip: (n,) float32, 1 to flip, else 0.
        factors: (n, 3) float32, of brightness, contrast and saturation; 1 changes nothing.
        hue: (n,) float32, turn of the hue as a share of the circle; 0 changes nothing.
        order: (n, 3) int64, a permutation: which of the three factors comes first, second, third.
        hue_place: (n,) int64 in 0..3, how many of the three come before the hue.
        grey: (n,) float32, 1 to turn grey, else 0.
        sigma: (n,) float32, standard deviation of the blur in pixels; 0 for none.
    """

    box: NDArray[np.float32]
    flip: NDArray[np.float32]
    factors: NDArray[np.float32]
    hue: NDArray[np.float32]
    order: NDArray[np.int64]
    hue_place: NDArray[np.int64]
    grey: NDArray[np.float32]
    sigma: NDArray[np.float32]

    @classmethod
    def draw(cls, policy: Policy, size: int, seed: int, client: ArrayLike, draw: ArrayLike, view: ArrayLike) -> Self:
        """Draw the parameters of n views.

        Args:
            policy: what the augmentation does.
            size: height and width of the images in pixels.
            seed: the run's seed.
            client, draw, view: integers that name each view; they broadcast together to n.
        """
        client, draw, view = (a.ravel() for a in np.broadcast_arrays(client, draw, view))
        count = 2 * CROP_TRIES + 16
        u = uniform(seed, AUGMENT, client[:, None], draw[:, None], view[:, None], np.arange(count))  # (n, count)
        crop, u = u[:, : 2 * CROP_TRIES], u[:, 2 * CROP_TRIES :]
        jitter = u[:, 0] < policy.jitter_p
        strengths = np.array([policy.brightness, policy.contrast, policy.saturation], dtype=np.float32)
        low = np.maximum(0, 1 - strengths)
        factors = np.where(jitter[:, None], low + u[:, 1:4] * (1 + strengths - low), 1)
        sigma = policy.blur_sigma[0] + u[:, 4] * (policy.blur_sigma[1] - policy.blur_sigma[0])
        return cls(
            box=_draw_box(policy, size, crop, u[:, 5], u[:, 6]),
            flip=(u[:, 7] < policy.flip_p).astype(np.float32),
            factors=factors.astype(np.float32),
            hue=np.where(jitter, (2 * u[:, 8] - 1) * policy.hue, 0).astype(np.float32),
            order=np.argsort(u[:, 9:12], axis=1, kind="stable"),
            hue_place=(u[:, 12] * 4).astype(np.int64),
            grey=(u[:, 13] < policy.grey_p).astype(np.float32),
            sigma=np.where(u[:, 14] < policy.blur_p, sigma, 0).astype(np.float32),
        )


def _draw_box(
    policy: Policy,
    size: int,
    crop: NDArray[np.float32],
    u_top: NDArray[np.float32],
    u_left: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Random resized crop: the first of ten tries that fits, else the whole image."""
    crop = crop.astype(np.float64)  # numpy 1 and 2 promote float32 differently: both shall draw the same box
    area = (policy.crop_scale[0] + crop[:, ::2] * (policy.crop_scale[1] - policy.crop_scale[0])) * size**2
    ratio = np.exp(np.log(ASPECT[0]) + crop[:, 1::2] * np.log(ASPECT[1] / ASPECT[0]))
    height, width = np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))  # (n, tries)
    fits = (height >= 1) & (width >= 1) & (height <= size) & (width <= size)
    first = fits.argmax(axis=1)[:, None]
    height, width = (np.take_along_axis(a, first, axis=1)[:, 0] for a in (height, width))
    height, width = (np.where(fits.any(axis=1), a, size) for a in (height, width))
    top, left = np.floor(u_top * (size - height + 1)), np.floor(u_left * (size - width + 1))
    return np.stack([top, left, height, width], axis=1).astype(np.float32)


def augmented(images: NDArray[np.uint8], parameters: AugmentParameters, policy: Policy) -> NDArray[np.float32]:
    """Crop and flip, colour, grey and blur, one image after the other, as ``mocosfl.data.augment`` does for many.

    Args:
        images: (n, C, S, S), C = 1 or 3.
        parameters: of n views.
        policy: for the order of grey and colour.

    Returns:
        (n, C, S, S) in [0, 1].
    """
    out = np.empty(images.shape, np.float32)
    for number, image in enumerate(images):
        out[number] = _view(image.astype(np.float32) / 255, parameters, number, policy)
    return out


def _view(x: NDArray[np.float32], p: AugmentParameters, i: int, policy: Policy) -> NDArray[np.float32]:
    """One view, (C, S, S), with the i-th parameters."""
    size, colour = x.shape[-1], len(x) == 3
    top, left, height, width = p.box[i]
    columns = _resize_matrix(left, width, size)
    if p.flip[i]:
        columns = columns[::-1]
    x = _both_sides(_resize_matrix(top, height, size), x, columns)
    grey = colour and p.grey[i] > 0
    if grey and policy.grey_first:
        x = np.broadcast_to(_luma(x), x.shape)
    for place in range(4):
        if colour and place == p.hue_place[i] and p.hue[i] != 0:
            x = _turn_hue(x, p.hue[i])
        if place < 3 and (factor := p.factors[i, kind := p.order[i, place]]) != 1:
            origin = (np.float32(0), _luma(x).mean(), _luma(x))[kind]
            x = (origin + factor * (x - origin)).clip(0, 1)
    if grey and not policy.grey_first:
        x = np.broadcast_to(_luma(x), x.shape)
    if p.sigma[i] > 0:
        blur = _blur_matrix(p.sigma[i], size, policy.blur_sigma[1])
        x = _both_sides(blur, x, blur)
    return x


def _both_sides(rows: NDArray[np.float32], x: NDArray[np.float32], columns: NDArray[np.float32]) -> NDArray[np.float32]:
    """rows @ x @ columns^T for every channel."""
    product: NDArray[np.float32] = np.matmul(np.matmul(rows, x), columns.T)
    return product


def _resize_matrix(start: np.float32, length: np.float32, size: int) -> NDArray[np.float32]:
    """Bilinear resize of ``length`` pixels from ``start`` to ``size``, (size, size); reads no pixel outside of them."""
    out = np.arange(size, dtype=np.float32)
    at = start + ((out + np.float32(0.5)) * (length / np.float32(size)) - np.float32(0.5)).clip(0, length - 1)
    return (1 - np.abs(at[:, None] - out)).clip(0)


def _blur_matrix(sigma: np.float32, size: int, largest: float) -> NDArray[np.float32]:
    """Gaussian of ``sigma`` pixels, cut at 3 of the largest sigma, edge pixels repeated, (size, size)."""
    reach = max(1, int(np.ceil(3 * largest)))
    taps = np.arange(-reach, reach + 1)
    weights = np.exp(-np.square(taps, dtype=np.float32) / (2 * max(sigma, np.float32(1e-3)) ** 2))
    matrix, pixel = np.zeros((size, size), np.float32), np.arange(size)
    for tap, weight in zip(taps, weights / weights.sum(), strict=True):
        matrix[pixel, (pixel + tap).clip(0, size - 1)] += weight  # a row each: no place twice
    return matrix


def _luma(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """(C, S, S) to (1, S, S)."""
    if len(x) == 1:
        return x
    return np.einsum("c,chw->hw", np.array(GREY_WEIGHTS, np.float32), x)[None]


def _turn_hue(x: NDArray[np.float32], turn: np.float32) -> NDArray[np.float32]:
    """Turn the hue by a share of the circle, value and saturation (HSV) kept, (3, S, S)."""
    r, g, b = x
    value = x.max(axis=0)
    chroma = value - x.min(axis=0)
    is_r, is_g = value == r, value == g
    distance = np.where(is_r, g - b, np.where(is_g, b - r, r - g)) / np.where(chroma > 0, chroma, np.float32(1))
    corner = np.where(is_r, np.float32(0), np.where(is_g, np.float32(2), np.float32(4)))
    sixth = distance + corner + 6 * turn  # hue in sixths of the circle
    k = (np.array([5, 3, 1], np.float32)[:, None, None] + sixth) % 6
    return value - chroma * np.minimum(k, 4 - k).clip(0, 1)
