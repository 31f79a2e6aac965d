"""How much of an image there is in a reconstruction of it."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

WINDOW, SIGMA = 11, 1.5
"""Side of SSIM's Gaussian window in pixels, and its standard deviation (Wang et al., 2004)."""
STABILISERS = 0.01**2, 0.03**2
"""C1 and C2 of SSIM, for values in [0, 1]."""


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity (Wang, Bovik, Sheikh and Simoncelli, 2004), of each channel, averaged.

    The windows lie wholly inside the images; smaller images have smaller windows. Differentiable in both arguments.

    Args:
        images, others: (n, C, H, W) floating point in [0, 1], of one shape.

    Returns:
        (n,), in [-1, 1]; 1 where both are equal.

    Raises:
        ValueError: the shapes differ.
    """
    _check(images, others)
    kinds = images.device, torch.promote_types(images.dtype, torch.float32)
    rows, columns = (_windows(side, *kinds) for side in images.shape[2:])
    x, y = images.to(kinds[1]), others.to(kinds[1])
    with torch.autocast(images.device.type, enabled=False):
        means = rows @ torch.stack([x, y, x * x, y * y, x * y]) @ columns.mT
    mean_x, mean_y, xx, yy, xy = means
    c1, c2 = STABILISERS
    both, squares = mean_x * mean_y, mean_x.square() + mean_y.square()
    similarity = (2 * both + c1) * (2 * (xy - both) + c2) / ((squares + c1) * (xx + yy - squares + c2))
    return similarity.mean(dim=(1, 2, 3))


@functools.cache
def _windows(side: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Gaussian windows at every place along one side: (places, side)."""
    width = min(WINDOW, side - 1 + side % 2)
    taps = torch.exp(-((torch.arange(width).double() - width // 2) ** 2) / (2 * SIGMA**2))
    windows = torch.zeros(side - width + 1, side, dtype=torch.float64)
    for place, row in enumerate(windows):
        row[place : place + width] = taps / taps.sum()
    return windows.to(device, dtype)


def mse(images: Tensor, others: Tensor) -> Tensor:
    """Mean squared error: (n, C, H, W) twice, in [0, 1], to (n,)."""
    _check(images, others)
    return (images - others).square().mean(dim=(1, 2, 3))


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, for a peak of 1: (n, C, H, W) twice to (n,); infinite where both are equal."""
    return -10 * torch.log10(mse(images, others))


def identified(reconstructions: Tensor, gallery: Tensor, truth: Tensor) -> Tensor:
    """Whether the image of a gallery that is nearest to a reconstruction (by MSE) is the right one.

    Colours and brightness that a reconstruction has got wrong throughout shall not protect it: it is compared as it is,
    and with mean and contrast of every channel taken out, and is identified if either way finds it.

    Args:
        reconstructions: (n, C, H, W).
        gallery: (m, C, H, W); each image once.
        truth: (n,) int64, the place of the right one in the gallery.

    Returns:
        (n,) bool.
    """
    found = torch.zeros(len(truth), dtype=torch.bool, device=truth.device)
    for view in (lambda x: x.flatten(1), _standardised):
        ours, theirs = (view(images.cpu()).double() for images in (reconstructions, gallery))
        distances = torch.cdist(ours, theirs)
        found |= distances.argmin(dim=1).to(truth.device) == truth
    return found


def _standardised(images: Tensor) -> Tensor:
    channels = images.flatten(2)
    std, mean = torch.std_mean(channels, dim=2, keepdim=True, correction=0)
    return ((channels - mean) / (std + 1e-3) / math.sqrt(channels[0].numel())).flatten(1)


def _check(images: Tensor, others: Tensor) -> None:
    if images.shape != others.shape or images.ndim != 4:
        raise ValueError(
            f"images {tuple(images.shape)} and reconstructions {tuple(others.shape)}: expected one shape (n, C, H, W)"
        )


@torch.no_grad()
def lpips(images: Tensor, others: Tensor) -> Tensor | None:
    """Learned perceptual distance (Zhang et al., 2018, AlexNet): (n, C, H, W) twice, in [0, 1], to (n,).

    None where the package ``lpips`` or its weights cannot be had, and for images that are too small for the network.
    """
    network = None if min(images.shape[2:]) < 32 else _perceptual(images.device)
    if network is None:
        return None
    x, y = (2 * t.expand(-1, 3, -1, -1) - 1 for t in (images, others))
    return network(x, y).flatten()


@functools.cache
def _perceptual(device: torch.device) -> nn.Module | None:
    try:
        from lpips import LPIPS  # type: ignore[import-not-found,unused-ignore]  # needs torchvision, and fetches the weights

        network: nn.Module = LPIPS(net="alex", verbose=False).to(device)
    except (ImportError, OSError, RuntimeError):
        return None
    return network.eval().requires_grad_(False)
