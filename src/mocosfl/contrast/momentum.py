"""Moving averages: the momentum copies of client and server halves."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def update_momentum(momentum: Iterable[Tensor], online: Iterable[Tensor], tau: float) -> None:
    """Move each momentum copy towards its online copy, in place: m = τ·m + (1 − τ)·θ (MoCo, eq. 2).

    Args:
        momentum: tensors to move.
        online: tensors of the same shapes, in the same order.
        tau: share that a momentum copy keeps of itself, 0 to 1.
    """
    if pairs := list(momentum):
        torch._foreach_lerp_(pairs, list(online), 1 - tau)
