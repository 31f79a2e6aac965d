"""Averaging the client halves, and what clients keep of their own when they are handed the average."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from mocosfl.config import SyncSettings

PREDICTOR = "predictor."
"""What the names of a predictor's parameters begin with, where clients have one; all others are the encoder's."""

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
    """How far each client's half is from the average: in the paper's measure, and relative to the average's length.

    Args:
        deviations: w_c − w̄ of each parameter, (P, ...), by name.
        means: w̄, (...).

    Returns:
        (P,) tensors. ``divergence`` of the whole half and ``divergence/BLOCK`` of each block of it, which is the first
        part of its parameters' names: ‖w_c − w̄‖ / ‖w̄‖. ``divergence_l2/LAYER`` of each layer, which is all but the
        last part of their names: ‖w_c − w̄‖; and ``divergence_l2``, the sum over the layers. The mean of that over
        clients and synchronisations is eq. 4 of Li et al. (MocoSFL, ICLR 2023).
    """
    off: dict[str, Tensor] = {}
    length: dict[str, Tensor] = {}
    layers: dict[str, Tensor] = {}
    for name, deviation in deviations.items():
        # a norm needs no memory for squares, which a sum of them would
        square = torch.linalg.vector_norm(deviation.flatten(1), dim=1).square()
        whole = torch.linalg.vector_norm(means[name]).square()
        for part in ("divergence", f"divergence/{name.partition('.')[0]}"):
            off[part] = off[part] + square if part in off else square
            length[part] = length[part] + whole if part in length else whole
        layer = f"divergence_l2/{name.rpartition('.')[0] or name}"
        layers[layer] = layers[layer] + square if layer in layers else square
    found = {part: (off[part] / length[part].clamp_min(torch.finfo(off[part].dtype).tiny)).sqrt() for part in off}
    distances = {layer: square.sqrt() for layer, square in layers.items()}
    return found | {"divergence_l2": torch.stack(list(distances.values())).sum(dim=0)} | distances


def distance(settings: SyncSettings, own: Mapping[str, Tensor], average: Mapping[str, Tensor]) -> Tensor:
    """How far each client's encoder is from the average, in the measure of the rule that ``sync.own`` names.

    ema: ‖w_c − w̄‖ over all parameters, as FedEMA's paper defines it. predictor: the mean over the weight matrices and
    filters of the distance of each, the measure of its authors' release, to which the published threshold belongs.

    Args:
        settings: of the synchronisation.
        own: parameters by name, (P, ...).
        average: the same, (...).

    Returns:
        (P,).
    """
    filters = settings.own == "predictor"
    norms = [
        torch.linalg.vector_norm((stack - average[name]).flatten(1), dim=1)
        for name, stack in own.items()
        if not name.startswith(PREDICTOR) and (average[name].ndim > 1 or not filters)
    ]
    stacked = torch.stack(norms)
    return stacked.mean(dim=0) if filters else torch.linalg.vector_norm(stacked, dim=0)


def scale(settings: SyncSettings, first: Tensor) -> Tensor:
    """What a client's distance is multiplied with from its first average on.

    FedEMA's autoscaler (Zhuang, Wen, Zhang, ICLR 2022): tau / ‖w_c − w̄‖ at that average, so that the client then keeps
    tau of its own. FedU's threshold (Zhuang et al., ICCV 2021): its inverse.

    Args:
        settings: of the synchronisation.
        first: (P,) distances at each client's first average.

    Returns:
        (P,); 0 where there was no distance to take the scale from.
    """
    if settings.own == "predictor":
        return torch.full_like(first, 1 / settings.threshold)
    return torch.where(first > 0, settings.tau / first, 0)


def own_shares(settings: SyncSettings, scales: Tensor, distances: Tensor) -> Tensor:
    """The share of its own that each client keeps, mu; the rest is the average's.

    ema: min(scale * distance, 1). predictor: 1 where the distance is above the threshold, else 0; of the predictor
    alone.

    Args:
        settings: of the synchronisation.
        scales: (P,) as of ``scale``; 0 for clients that have had no part in an average yet: they keep nothing.
        distances: (P,) as of ``distance``.

    Returns:
        (P,).
    """
    scaled = scales * distances
    return (scaled > 1).to(scaled.dtype) if settings.own == "predictor" else scaled.clamp(max=1)


def mixed(own: Tensor, average: Tensor, shares: Tensor) -> Tensor:
    """mu * own + (1 - mu) * average of one parameter: (P, ...), (...) and (P,) to (P, ...)."""
    return torch.lerp(average.expand_as(own), own, shares.view(-1, *[1] * average.ndim))


def _taking_part(stack: Tensor, weights: Tensor) -> Tensor:
    if weights.shape != stack.shape[:1]:
        raise ValueError(f"{stack.shape[0]} clients need as many weights, not {tuple(weights.shape)}")
    if not (weights > 0).any():
        raise ValueError("no client takes part: no weight is above zero")
    return stack[weights > 0]
