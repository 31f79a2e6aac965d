"""MoCo's augmentations, batched: every image and view has parameters of its own.

Parameters are drawn on the host (``AugmentParameters.draw``, numpy, a pure function of seed, client, draw and view) and
applied on the compute device (``augment``, torch). Geometry and blur are linear in the pixels and separable, so each
is one small matrix on either side of the image: no gathers, no loop over images.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mocosfl.config import AugmentSettings
from mocosfl.data.images import upload
from mocosfl.randomness import AUGMENT, uniform

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
    def of(cls, settings: AugmentSettings) -> Self:
        """The policy's published values (He et al., 2020; Chen et al., 2020), with the settings that are set."""
        values = dict(_PUBLISHED[settings.policy])
        given = settings.model_dump(exclude={"policy"})
        return cls(**(values | {name: value for name, value in given.items() if value is not None}))


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

    def to(self, device: torch.device) -> dict[str, Tensor]:
        """The same as tensors on a device, copied without waiting."""
        return {field.name: upload(getattr(self, field.name), device) for field in fields(self)}


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


def augment(images: Tensor, parameters: AugmentParameters, policy: Policy) -> Tensor:
    """Apply one set of parameters to each image: crop and flip, colour, grey, blur.

    The published order flips last; a flip commutes with colour and blur, so it costs nothing beside the crop.

    Args:
        images: (n, C, S, S) uint8, C = 1 or 3; or float32 in [0, 1].
        parameters: of n views.
        policy: for the order of grey and colour.

    Returns:
        (n, C, S, S) float32 in [0, 1].
    """
    return augmented(images, parameters.to(images.device), policy)


def augmented(images: Tensor, p: dict[str, Tensor], policy: Policy) -> Tensor:
    """``augment`` with parameters that are on the device already: tensors alone, so that it can be compiled."""
    size, colour = images.shape[-1], images.shape[1] == 3
    x = images.float() / 255 if images.dtype == torch.uint8 else images
    rows = _resize_matrix(p["box"][:, 0], p["box"][:, 2], size)
    columns = _resize_matrix(p["box"][:, 1], p["box"][:, 3], size)
    columns = torch.where(p["flip"][:, None, None] > 0, columns.flip(1), columns)
    x = _both_sides(rows, x, columns)
    if policy.grey_first and colour:
        x = _grey(x, p["grey"])
    x = _jitter(x, p)
    if not policy.grey_first and colour:
        x = _grey(x, p["grey"])
    if policy.blur_p > 0:
        blur = _blur_matrix(p["sigma"], size, policy.blur_sigma[1])
        x = _both_sides(blur, x, blur)
    return x


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Subtract the channels' mean and divide by their standard deviation.

    Args:
        images: (n, C, H, W) float32 in [0, 1].
        mean, std: (C,) float32.
    """
    return (images - mean[:, None, None]) / std[:, None, None]


def _both_sides(rows: Tensor, x: Tensor, columns: Tensor) -> Tensor:
    """rows @ x @ columns^T for every channel: (n, S, S), (n, C, S, S), (n, S, S) to (n, C, S, S)."""
    n, c, s, _ = x.shape
    right = torch.bmm(x.reshape(n, c * s, s), columns.mT)
    return (
        torch.bmm(rows, right.reshape(n, c, s, s).transpose(1, 2).reshape(n, s, c * s))
        .reshape(n, s, c, s)
        .transpose(1, 2)
    )


def _resize_matrix(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Bilinear resize of ``length`` pixels from ``start`` to ``size``: (n,), (n,) to (n, size, size).

    A crop is never larger than the image, so there is nothing to antialias. Reads are kept inside the crop, as
    when the crop is cut out first.
    """
    out = torch.arange(size, device=start.device)
    at = (out + 0.5) * (length / size)[:, None] - 0.5  # (n, size), in pixels of the crop
    at = start[:, None] + torch.minimum(at.clamp(min=0), length[:, None] - 1)
    return (1 - (at[:, :, None] - out).abs()).clamp(min=0)


def _blur_matrix(sigma: Tensor, size: int, largest: float) -> Tensor:
    """Gaussian of ``sigma`` pixels, cut at 3 of the largest sigma, edge pixels repeated: (n,) to (n, size, size)."""
    reach = max(1, int(np.ceil(3 * largest)))
    taps = torch.arange(-reach, reach + 1, device=sigma.device)
    weights = torch.exp(-(taps**2) / (2 * sigma.clamp(min=1e-3)[:, None] ** 2))  # (n, taps); sigma 0 is the identity
    weights = weights / weights.sum(dim=1, keepdim=True)
    pixel = torch.arange(size, device=sigma.device)
    reads = (pixel[:, None] + taps).clamp(0, size - 1)  # (size, taps)
    selects = (reads[:, :, None] == pixel).to(sigma.dtype)  # (size, taps, size)
    return torch.einsum("nt,itj->nij", weights, selects)


def _luma(x: Tensor) -> Tensor:
    """(n, C, H, W) to (n, 1, H, W)."""
    if x.shape[1] == 1:
        return x
    r, g, b = x.unbind(1)
    return (GREY_WEIGHTS[0] * r + GREY_WEIGHTS[1] * g + GREY_WEIGHTS[2] * b).unsqueeze(1)


def _grey(x: Tensor, on: Tensor) -> Tensor:
    return torch.lerp(x, _luma(x).expand_as(x), on[:, None, None, None])


def _jitter(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Brightness, contrast, saturation and hue, in each view's own order, clamped after each."""
    colour = x.shape[1] == 3
    one = torch.ones((), device=x.device)
    ordered = p["factors"].gather(1, p["order"])  # (n, 3)
    for after_hue in (False, True) if colour else (False,):
        if after_hue:
            x = _turn_hue(x, p["hue"])
        for place in range(3):
            factor = ordered[:, place]
            if colour:  # a grey image has no hue: all three come in the first pass
                factor = torch.where((p["hue_place"] <= place) == after_hue, factor, one)
            x = _blend(x, factor[:, None, None, None], p["order"][:, place, None, None, None])
    return x


def _blend(x: Tensor, factor: Tensor, kind: Tensor) -> Tensor:
    """Scale the distance to black (kind 0), to the mean luma (1) or to the pixel's own luma (2)."""
    luma = _luma(x)
    mean = luma.mean(dim=(1, 2, 3), keepdim=True)
    origin = torch.where(kind == 2, luma, mean * (kind == 1))
    return torch.lerp(origin.expand_as(x), x, factor).clamp(0, 1)


def _turn_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue by a share of the circle, value and saturation (HSV) kept: (n, 3, H, W), (n,)."""
    r, g, b = x.unbind(1)
    value = x.amax(dim=1)
    chroma = value - x.amin(dim=1)
    is_r, is_g = value == r, value == g
    distance = torch.where(is_r, g - b, torch.where(is_g, b - r, r - g)) / torch.where(chroma > 0, chroma, 1)
    corner = torch.where(is_r, 0.0, torch.where(is_g, 2.0, 4.0))
    sixth = distance + corner + 6 * turn[:, None, None]  # hue in sixths of the circle
    offsets = 5 - 2 * torch.arange(3, device=x.device)[:, None, None]
    k = offsets + sixth.unsqueeze(1)  # (n, 3, H, W)
    k = k - 6 * torch.floor(k / 6)  # torch.remainder takes several times as long
    return value.unsqueeze(1) - chroma.unsqueeze(1) * torch.minimum(k, 4 - k).clamp(0, 1)
