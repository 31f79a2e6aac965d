"""The server: its half of the backbone, the momentum copy, the queue, and one training step."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocosfl.clients import Latents
from mocosfl.config import Config
from mocosfl.contrast import KeyQueue, infonce, update_momentum
from mocosfl.data.images import upload
from mocosfl.randomness import stream


class Server:
    """Contrasts the latents of all clients and updates the server half (MocoSFL, algorithm 1, server side).

    Args:
        half: the server half, initialised: latents to features.
        head: the projection head, initialised: features to the space of the contrast.
        config: the whole configuration.
        dim: D, the head's output width.
        device: where to compute.
    """

    def __init__(self, half: nn.Module, head: nn.Module, config: Config, dim: int, device: torch.device) -> None:
        self.config, self.device = config, device
        self.online = nn.Sequential(half, head).to(device).train()
        if device.type == "cpu":  # a step takes two thirds of the time there
            self.online.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.momentum = copy.deepcopy(self.online).requires_grad_(False)
        contrast, number = config.contrast, config.clients.number
        rings = 1 if contrast.feature_sharing else number
        self.queue = KeyQueue(contrast.queue // rings, dim, rings, stream(config.seed, "queue")).to(device)
        self.optimizer = torch.optim.SGD(
            self.online.parameters(),
            lr=config.train.lr,
            momentum=config.train.momentum,
            weight_decay=config.train.weight_decay,
        )

    def step(self, latents: Latents, lr: float) -> tuple[Tensor, dict[str, Tensor]]:
        """One step on the concatenated latents of all clients.

        Args:
            latents: of the active clients.
            lr: learning rate of the server half.

        Returns:
            The gradient at the query latents, of their shape, in the scale of ``clients.lr_scale``; and the
            metrics ``loss`` and ``contrast_accuracy`` (share of positives that beat the whole queue) as tensors
            that nobody has waited for.
        """
        contrast = self.config.contrast
        query = latents.query.requires_grad_()  # (V, n, ...)
        into_online, into_momentum = query, latents.key
        if contrast.symmetric and not contrast.both_views:  # the other way round: no client learns from that one
            into_online = torch.cat([query, latents.key])
            into_momentum = torch.cat([latents.key, query.detach()])

        update_momentum(self.momentum.parameters(), self.online.parameters(), contrast.momentum)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16"):
            q = self.online(into_online.flatten(0, 1))
            with torch.no_grad():
                k = self.momentum(into_momentum.flatten(0, 1))
        full = torch.promote_types(q.dtype, torch.float32)
        q, k = (F.normalize(x.to(full), dim=1).unflatten(0, (len(into_online), -1)) for x in (q, k))  # (ways, n, D)

        rings = None
        if not contrast.feature_sharing:
            rings = upload(latents.clients, self.device)
        negatives = self.queue.keys[0] if rings is None else self.queue.keys[rings]
        ways = [infonce(*pair, negatives, contrast.temperature) for pair in zip(q, k, strict=True)]
        losses, hits = (torch.stack(both) for both in zip(*ways, strict=True))  # (ways, n)
        loss = losses.sum(dim=0).mean()  # over the concatenated batch

        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        pieces = 1 if rings is None else len(rings)
        self.queue.push(k.unflatten(1, (pieces, -1)).transpose(0, 1).flatten(1, 2), rings)

        gradients = query.grad
        assert gradients is not None
        if self.config.clients.lr_scale == "per_client_mean":
            gradients = gradients * (query.shape[1] / latents.size)
        return gradients, {"loss": loss.detach(), "contrast_accuracy": hits.float().mean()}

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {
            "online": self.online.state_dict(),
            "momentum": self.momentum.state_dict(),
            "queue": self.queue.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``'s result."""
        self.online.load_state_dict(state["online"])
        self.momentum.load_state_dict(state["momentum"])
        self.queue.load_state_dict(state["queue"])
        self.optimizer.load_state_dict(state["optimizer"])
