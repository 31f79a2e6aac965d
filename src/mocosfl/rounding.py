"""What is left of latents and gradients after a codec (``mocosfl_device.codecs``), on the compute device.

The same numbers to the bit, so that simulated clients send what real ones would.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rounded(x: Tensor, codec: str, share: float) -> Tensor:
    """Numbers as they arrive.

    Args:
        x: (V, n, ...) float32.
        codec: a name of ``mocosfl_device.codecs.NAMES``.
        share: of the numbers that ``topk`` keeps.

    Returns:
        Of the same shape and dtype; ``x`` itself for fp32.

    Raises:
        ValueError: there is no such codec.
    """
    match codec:
        case "fp32":
            return x
        case "bf16":
            return x.bfloat16().to(x.dtype)
        case "int8" | "int4":
            return _affine(x, 2 ** int(codec[3:]) - 1)
        case "topk":
            flat = x.flatten(2)
            order = flat.abs().argsort(dim=2, descending=True, stable=True)  # of equal ones the first, as codecs does
            places = order[..., : max(1, round(share * flat.shape[2]))]
            kept = torch.zeros_like(flat).scatter(2, places, flat.gather(2, places))
            return kept.bfloat16().to(x.dtype).view_as(x)
    raise ValueError(f"unknown codec {codec!r}")


def _affine(x: Tensor, levels: int) -> Tensor:
    """Whole numbers of steps between the least and the greatest number of each image's channel."""
    rows = x.flatten(3 if x.ndim > 3 else 2)
    low = rows.amin(dim=-1, keepdim=True).bfloat16().to(x.dtype)
    step = ((rows.amax(dim=-1, keepdim=True) - low) / levels).bfloat16().to(x.dtype)
    codes = ((rows - low) / torch.where(step > 0, step, 1)).round().clamp(0, levels)
    return (low + codes * step).view_as(x)
