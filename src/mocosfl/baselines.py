"""Federated self-supervised learning without a server half: the methods that MocoSFL is compared with.

A client of theirs holds the whole network (``clients.holds=network``) and learns from its own images alone; the server
averages weights. The same loop, cohort, augmentation, evaluation and log serve them: to the trainer they are clients
whose half is everything, and a server that is left with the loss of each client. What tells one method from another is
in the settings:

=========  ===================  =========================================================================
method     contrast.objective   what a client gets at an average
=========  ===================  =========================================================================
FL-MoCo    moco                 the average of online and momentum networks
FL-SimCLR  simclr               the average
FL-BYOL    byol                 the average of online and target networks
FedU       byol                 the average of the online network, but its own predictor where they have diverged
FedEMA     byol                 a mean of its own online network and the average, weighted by how far they are apart
=========  ===================  =========================================================================

FedU: Zhuang et al., ICCV 2021; FedEMA: Zhuang, Wen, Zhang, ICLR 2022. Both leave target networks with the clients.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from mocosfl.config import (
    ClientSettings,
    Config,
    ContrastSettings,
    DataSettings,
    EvaluationSettings,
    ModelSettings,
    PartitionSettings,
    SyncSettings,
    TrainSettings,
)
from mocosfl.contrast import objective_of
from mocosfl.models.heads import WIDTHS, WholeNetwork, build_predictor

METHODS = ("flmoco", "flsimclr", "flbyol", "fedu", "fedema")
"""Names of the methods in recipes."""

LOCAL_EPOCHS = 5
"""Passes over a client's images between two averages."""


def method_settings(method: str) -> dict[str, Any]:
    """The settings that make a method of a configuration, for ``Config.updated``.

    Args:
        method: one of ``METHODS``.
    """
    objective = {"flmoco": "moco", "flsimclr": "simclr"}.get(method, "byol")
    own = {"fedu": "predictor", "fedema": "ema"}.get(method, "none")
    return {
        "clients.holds": "network",
        "clients.lr_scale": "per_client_mean",
        "contrast.objective": objective,
        "contrast.symmetric": True,
        "contrast.both_views": True,
        "contrast.feature_sharing": False,
        "sync.momentum": own == "none",
        "sync.own": own,
    }


def held_by_clients(
    config: Config, client: nn.Module, server: nn.Module, head: nn.Module
) -> tuple[nn.Module, tuple[nn.Module, nn.Module]]:
    """What every client holds, and what is left for the server: halves as they are, or everything and nothing.

    Args:
        config: the whole configuration.
        client, server, head: the client half, the server half and the projection head.

    Raises:
        SettingError: the file that ``contrast.objective`` names cannot be used.
    """
    if config.clients.holds == "half":
        return client, (server, head)
    predictor = None
    if objective_of(config.contrast).predictor:
        predictor = build_predictor(WIDTHS[config.model.head], config.contrast.predictor, config.seed)
    return WholeNetwork(client, server, head, predictor), (nn.Identity(), nn.Identity())


def baseline(method: str, source: str, number: int, kind: str = "noniid") -> Config:
    """A method with 5 local epochs, batch 128, SGD at 0.032 and BatchNorm (after FedEMA; docs/baselines.md).

    Batches are smaller where clients have fewer images. Epochs are those of MocoSFL's recipes, so that as many images
    are seen.

    Args:
        method: one of ``METHODS``.
        source: cifar10 or cifar100.
        number: N, clients, all of them active.
        kind: iid, or noniid for 2 classes a client (20 of CIFAR-100).
    """
    images = 49_000 // number  # of a client, without those that are held out
    batch = min(128, images)
    config = Config(
        recipe=f"{method}-{source}-{number}" + ("" if kind == "noniid" else f"-{kind}"),
        data=DataSettings(source=source, size=32, held_out=0.02),
        partition=PartitionSettings(
            kind="iid" if kind == "iid" else "classes", classes_per_client=2 if source == "cifar10" else 20
        ),
        model=ModelSettings(client_norm="batch", server_norm="batch", head="large"),
        contrast=ContrastSettings(queue=4096 * number),
        clients=ClientSettings(number=number, batch=batch),
        sync=SyncSettings(every=LOCAL_EPOCHS * max(1, round(images / batch))),
        train=TrainSettings(epochs=200, lr=0.032, log_every=50, checkpoint_every=500),
        evaluation=EvaluationSettings(every=5),
    )
    settings = method_settings(method)
    if settings["contrast.objective"] == "byol":
        settings["contrast.predictor"] = 4096
    return config.updated(settings)


def central(source: str) -> Config:
    """MoCo on the pooled images, as one client and its server: what none of the methods should beat."""
    return Config(
        recipe=f"central-{source}",
        data=DataSettings(source=source, size=32, held_out=0.02),
        partition=PartitionSettings(kind="iid"),
        clients=ClientSettings(number=1, batch=100),
        sync=SyncSettings(every=0),
        train=TrainSettings(epochs=200, log_every=50, checkpoint_every=2000),
        evaluation=EvaluationSettings(every=5),
    )
