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
