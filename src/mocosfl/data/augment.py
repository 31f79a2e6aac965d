"""MoCo's augmentations on the compute device, batched: every image and view has parameters of its own, which
``mocosfl_device.augment`` draws on the host."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from mocosfl.config import AugmentSettings
from mocosfl.data.images import upload
from mocosfl_device.augment import GREY_WEIGHTS, AugmentParameters, Policy


def policy_of(settings: AugmentSettings) -> Policy:
    """The policy that the settings describe."""
    return Policy.of(settings.model_dump())


def on_device(parameters: AugmentParameters, device: torch.device) -> dict[str, Tensor]:
    """Parameters as tensors on a device, copied without waiting."""
    return {field.name: upload(getattr(parameters, field.name), device) for field in fields(parameters)}


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
    return augmented(images, on_device(parameters, images.device), policy)


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
