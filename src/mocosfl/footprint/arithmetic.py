"""Multiply-adds, counted by ``torch.utils.flop_counter`` on tensors without memory.

One multiply-add is two floating-point operations. Counted are convolutions and matrix products. Not counted are norms,
weight standardisation, ReLU, augmentation, the moving average and the optimiser: for ResNet-18 of width 64 at 32 pixels
norms and ReLU are 0.2 % of the numbers that convolutions multiply.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mocosfl.contrast import Batch, objective_of
from mocosfl.footprint.held import held
from mocosfl.footprint.plan import Plan
from mocosfl.models import build, build_head
from mocosfl.models.heads import WholeNetwork

IMAGES = 2
"""BatchNorm needs more than one."""


def counted(compute: Callable[[], Any]) -> int:
    """Multiply-adds of a computation."""
    with FlopCounterMode(display=False) as counter:
        compute()
    return counter.get_total_flops() // 2


def weightless(network: nn.Module) -> nn.Module:
    """A copy of a network on the meta device."""
    return copy.deepcopy(network).to("meta").train()


def passes(network: nn.Module, inputs: Tensor, learns_input: bool) -> tuple[float, float]:
    """Multiply-adds of an image, forward and backward.

    Args:
        network: on the meta device.
        inputs: (n, ...) on the meta device.
        learns_input: whether the gradient at the input is wanted too.
    """
    forward = counted(lambda: network(inputs))
    both = counted(lambda: network(inputs.clone().requires_grad_(learns_input)).sum().backward())
    return forward / len(inputs), (both - forward) / len(inputs)


def of_client(plan: Plan, rich: bool = False) -> dict[str, float]:
    """Multiply-adds of a client for an image: ``forward``, ``backward`` and ``momentum``, the key's forward pass.

    Those of a frozen client are forward passes of one and the same half. A client that holds the whole network also
    has a ``contrast``, its loss with its way back; its ``momentum`` is that of the target network.
    """
    config = plan.config
    views = torch.empty(IMAGES, config.data.channels, plan.size, plan.size, device="meta")
    network = weightless(held(plan))
    forward, backward = passes(network, views, learns_input=False)
    ways = 2 if config.contrast.both_views else 1
    macs = {
        "forward": ways * forward,
        "backward": 0.0 if config.clients.frozen else ways * backward,
        "momentum": ways * forward,
    }
    if not isinstance(network, WholeNetwork):
        return macs
    target = counted(lambda: network.target(views)) / IMAGES if objective_of(config.contrast).keys else 0.0
    width = network(views).shape[1]
    return macs | {"momentum": ways * target, "contrast": _contrast(plan, ways, plan.batch(rich), width)}


def _contrast(plan: Plan, ways: int, images: int, width: int) -> float:
    """Multiply-adds for an image of a client's own loss over a step's images, with its way back."""
    contrast = plan.config.contrast
    objective = objective_of(contrast)
    queries, keys, queue = (
        torch.zeros(*shape, width, device="meta")
        for shape in (
            (ways, images),
            (ways if objective.keys else 0, images),
            (contrast.queue // plan.config.clients.number,),
        )
    )
    clients = torch.zeros(images, dtype=torch.int64, device="meta")
    batch = Batch(queries.requires_grad_(), keys, queue if objective.queue else None, clients)
    return counted(lambda: objective(batch)[0].sum().backward()) / images


def of_server(plan: Plan) -> dict[str, float]:
    """Multiply-adds of the server for an image: ``forward``, ``backward``, ``momentum`` and ``contrast``.

    The contrast is of queries and keys of the queue, with its way back.
    """
    config = plan.config
    model = build(config.model, config.data.channels, plan.size, config.seed)
    head = build_head(config.model.head, model.features, config.seed)
    online = weightless(nn.Sequential(model.server, head))
    latents = torch.empty(IMAGES, *model.latent_shape, device="meta")
    ways = 2 if config.contrast.symmetric else 1
    forward, backward = passes(online, latents, learns_input=False)
    if not config.clients.frozen:
        # The latents are one tensor for both ways, so the way back to the input is computed for both.
        _, backward = passes(online, latents, learns_input=True)
    rings = 1 if config.contrast.feature_sharing else config.clients.number
    width = online(latents).shape[1]
    return {
        "forward": ways * forward,
        "backward": ways * backward,
        "momentum": ways * forward,
        "contrast": 2.0 * ways * width * (config.contrast.queue // rings),
    }
