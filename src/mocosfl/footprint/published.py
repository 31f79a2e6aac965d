"""What the paper says a client spends (Li et al., ICLR 2023, table 1 and figure 7), and how it counted.

1,000 clients of 50 images of CIFAR-10, 200 epochs, batch 1, ResNet-18, one synchronisation an epoch; FL-SSL has 5
clients of 10,000 images, batch 128, 500 local epochs, one synchronisation in 5. The authors' release says how
(``overhead_calculator.py``):

- operations are multiply-adds of convolutions and matrices, and five for each number that a norm reads; where clients
  learn, an image takes three forward passes, where they are frozen one;
- latents count once an image on the way up, and their gradients once on the way down; keys do not count;
- weights count one way, and those of FL-SSL without BYOL's predictor;
- memory is what PyTorch had allocated on a GPU after a forward pass of one view, with the online network alone;
- G is 2**30 operations, T 1,000 of those, and MB 2**20 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from mocosfl.footprint.arithmetic import counted, weightless
from mocosfl.footprint.fl_byol import EPOCHS, EPOCHS_A_ROUND, FLBYOL
from mocosfl.footprint.plan import Plan
from mocosfl.models import build
from mocosfl.recipes import published

NORM = 5
"""Operations of a norm for each number."""


@dataclass(frozen=True)
class Published:
    """A client's run in the paper's units.

    Attributes:
        weights, latents: MB of 2**20 bytes.
        operations: in 2**30; None where the paper gives none.
        memory: MB.
        watts: on a Raspberry Pi 4B.
        watt_hours: from its battery: 9,100 mAh at 5 V.
    """

    weights: float
    latents: float
    operations: float | None = None
    memory: float | None = None
    watts: float | None = None
    watt_hours: float | None = None


PAPER = {
    "FL-SSL": Published(8269.2, 0.0, 7949e3, 921.0),
    "MocoSFL-1": Published(1.4, 5000.0),
    "MocoSFL-3": Published(57.9, 5000.0),
    "MocoSFL-1+TAResSFL": Published(0.0, 39.1),
    "MocoSFL-3+TAResSFL": Published(0.0, 39.1, 734.0, 0.8, 2.26, 45.5),
}
"""By the paper's name of the scheme."""


def plan_of(scheme: str) -> Plan:
    """The plan of one of the paper's schemes but FL-SSL."""
    cut = int(scheme[len("MocoSFL-")])
    config = published("cifar10", 1000, "noniid", cut).updated({"data.held_out": 0.0, "recipe": scheme})
    if scheme.endswith("TAResSFL"):
        config = config.updated({"model.bottleneck": "C4S2", "clients.frozen": True})
    return Plan.of(config)


def scheme_of(plan: Plan) -> str | None:
    """The paper's scheme that a plan is of, if it is of one in all that these figures depend on."""
    config = plan.config
    if config.contrast.both_views or config.recalls or config.traffic.latents != "fp32":
        return None
    for scheme in list(PAPER)[1:]:
        other = plan_of(scheme)
        theirs = other.config
        same = (
            config.model == theirs.model,
            (plan.images, plan.size, plan.steps) == (other.images, other.size, other.steps),
            config.clients.number == theirs.clients.number,
            (config.clients.batch, config.clients.rich_share) == (1, 0),
            config.clients.frozen == theirs.clients.frozen,
            config.clients.frozen or plan.averages == other.averages,
        )
        if all(same):
            return scheme
    return None


def as_published(plan: Plan) -> Published:
    """What the paper's way of counting gives for a plan."""
    config = plan.config
    model = build(config.model, config.data.channels, plan.size, config.seed)
    passes = 1 if config.clients.frozen else 3
    seen = config.train.epochs * plan.each
    latent = torch.Size(model.latent_shape).numel()
    rounds = plan.averages * config.pool / config.clients.number
    weights = rounds * sum(p.numel() for p in model.client.parameters())
    return Published(
        4 * weights / 2**20,
        4 * (1 if config.clients.frozen else 2) * seen * latent / 2**20,
        passes * seen * _operations(model.client, plan) / 2**30,
    )


def fl_as_published(baseline: FLBYOL, plan: Plan) -> Published:
    """The same for FL-BYOL."""
    numbers = sum(p.numel() for p in baseline.online.parameters())
    numbers += sum(b.numel() for b in baseline.online[-1].buffers())  # its backbone has GroupNorm, which has none
    weights = EPOCHS // EPOCHS_A_ROUND * numbers
    operations = 3 * EPOCHS * baseline.images * _operations(baseline.online, plan)
    return Published(4 * weights / 2**20, 0.0, operations / 2**30)


def _operations(network: nn.Module, plan: Plan) -> float:
    """Of a forward pass, for an image."""
    network = weightless(network)
    images = torch.empty(2, plan.config.data.channels, plan.size, plan.size, device="meta")
    normed = []
    for layer in network.modules():
        if isinstance(layer, nn.GroupNorm | nn.modules.batchnorm._BatchNorm):
            layer.register_forward_hook(lambda _, __, output: normed.append(output.numel()))
    macs = counted(lambda: network(images))
    return (macs + NORM * sum(normed)) / len(images)
