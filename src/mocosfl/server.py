"""The server: its half of the backbone, the momentum copy, the queue, and one training step."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from mocosfl.clients import Latents
from mocosfl.compute import autocast, channels_last_pays, compiled, fusible
from mocosfl.config import Config
from mocosfl.contrast import KeyQueue, infonce, update_momentum
from mocosfl.data.images import upload
from mocosfl.distributed import World
from mocosfl.models.layers import share_statistics
from mocosfl_device.randomness import stream


class Server:
    """Contrasts the latents of all clients and updates the server half (MocoSFL, algorithm 1, server side).

    Args:
        half: the server half, initialised: latents to features.
        head: the projection head, initialised: features to the space of the contrast.
        config: the whole configuration.
        dim: D, the head's output width.
        device: where to compute.
        world: the processes of the run; each holds a replica of the server, and all replicas stay alike.
    """

    def __init__(
        self,
        half: nn.Module,
        head: nn.Module,
        config: Config,
        dim: int,
        device: torch.device,
        world: World | None = None,
    ) -> None:
        self.config, self.device, self.world = config, device, world or World()
        self.head = head
        self.online = nn.Sequential(half, head).to(device).train()
        if self.world.size > 1:
            share_statistics(self.online, self.world)
        if channels_last_pays(device, config):
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
            fused=fusible(device),
        )
        self._online, self._momentum = compiled(self.online, config), compiled(self.momentum, config)
        self._loss = compiled(_loss, config)

    def step(self, latents: Latents, lr: float) -> tuple[Tensor | None, dict[str, Tensor]]:
        """One step on the concatenated latents of all clients.

        Args:
            latents: of the active clients; with several processes, of this process's share of them.
            lr: learning rate of the server half.

        Returns:
            The gradient at the query latents, of their shape, in the scale of ``clients.lr_scale``, or None where no
            client learns; and the metrics ``loss``, ``contrast_accuracy`` (share of positives that beat the whole
            queue) and ``spread`` (variance of the normalised queries, from 0, all alike, to 1) as tensors that nobody
            has waited for.
        """
        contrast, world, total = self.config.contrast, self.world, sum(latents.shares)
        query = latents.query.requires_grad_(latents.learning)  # (V, n, ...)
        into_online, into_momentum = query, latents.key
        if contrast.symmetric and not contrast.both_views:  # the other way round: no client learns from that one
            into_online = torch.cat([query, latents.key])
            into_momentum = torch.cat([latents.key, query.detach()])

        with record_function("server: moving average"):
            update_momentum(self.momentum.parameters(), self.online.parameters(), contrast.momentum)
        with record_function("server: forward"), autocast(self.device, self.config):
            q = self._online(into_online.flatten(0, 1))
            with torch.no_grad():
                k = self._momentum(into_momentum.flatten(0, 1))

        rings = None if contrast.feature_sharing else upload(latents.clients, self.device)
        with record_function("server: loss"):
            full = torch.promote_types(q.dtype, torch.float32)
            q, k = (x.to(full).unflatten(0, (len(into_online), -1)) for x in (q, k))  # (ways, n, D)
            negatives = self.queue.keys[0] if rings is None else self.queue.keys[rings]
            losses, hits, q_sum, k = self._loss(q, k, negatives, contrast.temperature)
            loss = losses.sum() / total  # over the concatenated batch of all processes
        with record_function("server: backward"):
            self.optimizer.zero_grad()
            loss.backward()
        metrics = torch.stack([loss.detach(), hits.sum().to(loss.dtype) / (len(q) * total)])
        world.add([*(p.grad for p in self.online.parameters() if p.grad is not None), metrics, q_sum])
        with record_function("server: optimizer"):
            self.optimizer.param_groups[0]["lr"] = lr
            self.optimizer.step()

        with record_function("server: queue"):
            k = world.gather(k, latents.shares, dim=1)
            if rings is not None:
                rings = world.gather(rings, [n // self.config.clients.batch for n in latents.shares])
            pieces = 1 if rings is None else len(rings)
            self.queue.push(k.unflatten(1, (pieces, -1)).transpose(0, 1).flatten(1, 2), rings)

        spread = 1 - (q_sum / (len(q) * total)).square().sum()
        values = {"loss": metrics[0], "contrast_accuracy": metrics[1], "spread": spread}
        if (gradients := query.grad) is None:
            return None, values
        if self.config.clients.lr_scale == "per_client_mean":
            times = np.repeat(total / latents.sizes, latents.sizes)  # (n,)
            double = gradients.dtype == torch.float64
            scale = upload(times.astype(np.float64 if double else np.float32), self.device)
            gradients = gradients * scale.view(-1, *[1] * (gradients.ndim - 2))
        return gradients, values

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
        for parameter, kept in self.optimizer.state.items():  # fused SGD takes its strides to be the parameter's
            if (buffer := kept.get("momentum_buffer")) is not None:
                kept["momentum_buffer"] = torch.empty_like(parameter).copy_(buffer).detach()


def _loss(q: Tensor, k: Tensor, negatives: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """InfoNCE of every way.

    (ways, n, D) twice to losses and hits, (ways, n), the sum of normalised queries, (D,), and normalised keys,
    (ways, n, D).
    """
    q, k = F.normalize(q, dim=2), F.normalize(k, dim=2)
    losses, hits = zip(*(infonce(*pair, negatives, temperature) for pair in zip(q, k, strict=True)), strict=True)
    return torch.stack(losses), torch.stack(hits), q.detach().sum(dim=(0, 1)), k
