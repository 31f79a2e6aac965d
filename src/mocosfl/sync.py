"""Averaging the client halves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from mocosfl.config import SyncSettings

Averaging = Callable[[Tensor, Tensor], Tensor]
"""From one parameter of P clients, (P, ...), and the clients' weights, (P,), to one for all."""


def averaging(settings: SyncSettings) -> Averaging:
    """The way of averaging that ``sync.average`` names."""
    if settings.average == "median":
        return coordinate_median
    if settings.average == "trimmed_mean":
        return partial(trimmed_mean, share=settings.trim)
    return fedavg


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


def coordinate_median(stack: Tensor, weights: Tensor) -> Tensor:
    """Median of each number over the clients (Yin et al., ICML 2018): fewer than half of them cannot move it at will.

    Args:
        stack: (P, ...), as for ``fedavg``. Of an even number, the two in the middle are averaged.
        weights: (P,); clients with none take no part, the others count alike.

    Raises:
        ValueError: a weight is missing, or no weight is above zero.
    """
    kept = _taking_part(stack, weights)
    if not stack.is_floating_point():
        return kept.amax(dim=0)
    ordered, middle = kept.sort(dim=0).values, len(kept) // 2
    return ordered[middle] if len(kept) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def trimmed_mean(stack: Tensor, weights: Tensor, share: float) -> Tensor:
    """Mean of each number without the smallest and the largest ones (Yin et al., ICML 2018).

    Args:
        stack: (P, ...), as for ``fedavg``.
        weights: (P,); clients with none take no part, the others count alike.
        share: of the clients, left out at either end, rounded up; below one half.

    Raises:
        ValueError: a weight is missing, or no weight is above zero.
    """
    kept = _taking_part(stack, weights)
    if not stack.is_floating_point():
        return kept.amax(dim=0)
    out = min(math.ceil(share * len(kept)), (len(kept) - 1) // 2)
    return kept.sort(dim=0).values[out : len(kept) - out].mean(dim=0)


def divergence(deviations: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How far each client's half is from the average, relative to the average's length, ‖w_c − w̄‖ / ‖w̄‖.

    Args:
        deviations: w_c − w̄ of each parameter, (P, ...), by name.
        means: w̄, (...).

    Returns:
        (P,) tensors: ``divergence`` of the whole half and ``divergence/BLOCK`` of each block of it, which is the first
        part of its parameters' names.
    """
    off: dict[str, Tensor] = {}
    length: dict[str, Tensor] = {}
    for name, deviation in deviations.items():
        # a norm needs no memory for squares, which a sum of them would
        square = torch.linalg.vector_norm(deviation.flatten(1), dim=1).square()
        whole = torch.linalg.vector_norm(means[name]).square()
        for part in ("divergence", f"divergence/{name.partition('.')[0]}"):
            off[part] = off[part] + square if part in off else square
            length[part] = length[part] + whole if part in length else whole
    return {part: (off[part] / length[part].clamp_min(torch.finfo(off[part].dtype).tiny)).sqrt() for part in off}


def _taking_part(stack: Tensor, weights: Tensor) -> Tensor:
    if weights.shape != stack.shape[:1]:
        raise ValueError(f"{stack.shape[0]} clients need as many weights, not {tuple(weights.shape)}")
    if not (weights > 0).any():
        raise ValueError("no client takes part: no weight is above zero")
    return stack[weights > 0]
