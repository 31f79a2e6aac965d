"""Averaging the client halves."""

from __future__ import annotations

import torch
from torch import Tensor


def fedavg(stack: Tensor, weights: Tensor) -> Tensor:
    """Average one parameter over clients (McMahan et al., 2017).

    Args:
        stack: (P, ...), the parameter of each client that takes part. Integers (counters) are not averaged: the
            largest is taken.
        weights: (P,) float, for example the images each contributed; any positive scale.

    Returns:
        The weighted mean, of shape ``stack.shape[1:]``.

    Raises:
        ValueError: a weight is missing, or no weight is above zero.
    """
    if weights.shape != stack.shape[:1]:
        raise ValueError(f"{stack.shape[0]} clients need as many weights, not {tuple(weights.shape)}")
    if not stack.is_floating_point():
        return stack.amax(dim=0)
    weights = weights.to(stack.dtype)
    return torch.tensordot(weights / weights.sum(), stack, dims=1)
