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
from mocosfl.contrast import Batch, KeyQueue, objective_of, score, update_momentum
from mocosfl.data.images import upload
from mocosfl.distributed import World
from mocosfl.models.heads import build_predictor
from mocosfl.models.layers import share_statistics
from mocosfl_device.randomness import stream


class Server:
    """Contrasts the latents of all clients and updates the server half (MocoSFL, algorithm 1, server side).

    Args:
        half: the server half, initialised: latents to features. Where clients hold the whole network, nothing
            (``nn.Identity``): then clients send queries and keys, and the server's part is each client's own loss.
        head: the projection head, initialised: features to the space of the contrast; likewise.
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
        contrast = config.contrast
        self.objective = objective_of(contrast)
        config.check_objective(self.objective.queue, self.objective.predictor)
        self.head = head
        layers = [half, head]
        if self.objective.predictor and config.clients.holds == "half":
            layers.append(build_predictor(dim, contrast.predictor, config.seed))
        self.online = nn.Sequential(*layers).to(device).train()
        if self.world.size > 1:
            share_statistics(self.online, self.world)
        if channels_last_pays(device, config):
            self.online.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        target = self.online[:2] if self.objective.keys else self.online[:0]  # keys pass no predictor
        self.momentum = copy.deepcopy(target).requires_grad_(False)
        online = dict(self.online.named_parameters())
        self._averaged = [online[name] for name, _ in self.momentum.named_parameters()]
        rings = 1 if contrast.feature_sharing else config.clients.number
        size = contrast.queue // rings if self.objective.queue else 0
        self.queue = KeyQueue(size, dim, rings, stream(config.seed, "queue")).to(device)
        self.optimizer = None if not online else self._optimizer()  # clients may hold all that learns
        self._online, self._momentum = compiled(self.online, config), compiled(self.momentum, config)
        self._losses = compiled(self._losses_of, config)

    def _optimizer(self) -> torch.optim.SGD:
        settings = self.config.train
        return torch.optim.SGD(
            self.online.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            fused=fusible(self.device),
        )

    def step(self, latents: Latents, lr: float) -> tuple[Tensor | None, dict[str, Tensor]]:
        """One step on the concatenated latents of all clients; without ``contrast.concatenate`` one for each client.

        Args:
            latents: of the active clients; with several processes, of this process's share of them.
            lr: learning rate of the server half.

        Returns:
            The gradient at the query latents, of their shape, in the scale of ``clients.lr_scale``, or None where no
            client learns; and the metrics ``loss``, ``contrast_accuracy`` (share of queries whose image was recognised
            among all that it was compared with) and ``spread`` (variance of the normalised queries, from 0, all alike,
            to 1) as tensors that nobody has waited for.
        """
        if self.config.contrast.concatenate:
            gradient, figures = self._step(latents, lr)
        else:
            shares = (latents.sizes / latents.sizes.sum()).tolist()
            done = [(share, *self._step(piece, lr)) for share, piece in zip(shares, latents.one_by_one(), strict=True)]
            figures = [sum(share * of_piece[i] for share, _, of_piece in done) for i in range(3)]
            # each is of the client's own mean loss
            own = self.config.clients.lr_scale == "per_client_mean"
            parts = [part if own else part * share for share, part, _ in done if part is not None]
            gradient = torch.cat(parts, dim=1) if parts else None
        loss, accuracy, direction = figures
        return gradient, {"loss": loss, "contrast_accuracy": accuracy, "spread": 1 - direction.square().sum()}

    def _step(self, latents: Latents, lr: float) -> tuple[Tensor | None, list[Tensor]]:
        """One step on one batch: the gradient, and loss, accuracy and mean normalised query, (D,)."""
        contrast, world, total = self.config.contrast, self.world, sum(latents.shares)
        query = latents.query.requires_grad_(latents.learning)  # (V, n, ...)
        into_online, into_momentum = query, latents.key
        if contrast.symmetric and not contrast.both_views:  # the other way round: no client learns from that one
            into_online = torch.cat([query, latents.key])
            into_momentum = torch.cat([latents.key, query.detach()])
        if not self.objective.keys:
            into_momentum = into_momentum[:0]

        with record_function("server: moving average"):
            update_momentum(self.momentum.parameters(), self._averaged, contrast.momentum)
        with record_function("server: forward"), autocast(self.device, self.config):
            q = self._online(into_online.flatten(0, 1))
            with torch.no_grad():
                k = self._momentum(into_momentum.flatten(0, 1)) if len(into_momentum) else q[:0]

        with record_function("server: loss"):
            full = torch.promote_types(q.dtype, torch.float32)
            ways = (len(into_online), len(into_momentum))
            q, k = (
                x.to(full).unflatten(0, (w, query.shape[1])) for x, w in zip((q, k), ways, strict=True)
            )  # (W, n, D)
            q, k = self._of_everybody(q, latents.shares), world.gather(k, latents.shares, dim=1)  # (W, N, D)
            rings, clients = self._whose(latents)
            losses, hits, direction = self._losses(q, k, self._negatives(rings), clients)
            loss = losses.sum() / total  # over the concatenated batch of all processes
        with record_function("server: backward"):
            self.online.zero_grad()
            loss.backward()
        if gradients_of_all := [p.grad for p in self.online.parameters() if p.grad is not None]:
            world.add(gradients_of_all)
        if self.optimizer is not None:
            with record_function("server: optimizer"):
                self.optimizer.param_groups[0]["lr"] = lr
                self.optimizer.step()

        if self.objective.queue:
            with record_function("server: queue"):
                pieces = 1 if rings is None else len(rings)
                keys = F.normalize(k, dim=2).unflatten(1, (pieces, -1))
                self.queue.push(keys.transpose(0, 1).flatten(1, 2), rings)

        figures = [loss.detach(), hits.to(loss.dtype).mean(), direction]
        if (gradients := query.grad) is None:
            return None, figures
        if self.config.clients.lr_scale == "per_client_mean":
            times = np.repeat(total / latents.sizes, latents.sizes)  # (n,)
            double = gradients.dtype == torch.float64
            scale = upload(times.astype(np.float64 if double else np.float32), self.device)
            gradients = gradients * scale.view(-1, *[1] * (gradients.ndim - 2))
        return gradients, figures

    def _losses_of(
        self, q: Tensor, k: Tensor, negatives: Tensor | None, clients: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses and hits of the objective, (W, N), and the mean of the normalised queries, (D,)."""
        losses, hits = score(self.objective, Batch(q, k, negatives, clients), self.config.contrast.objective)
        return losses, hits, F.normalize(q.detach(), dim=2).mean(dim=(0, 1))

    def _of_everybody(self, q: Tensor, shares: tuple[int, ...]) -> Tensor:
        """(W, n, D) to the queries of all processes, (W, N, D), of which this one's keep their graph.

        Every process computes the loss of all queries and differentiates it by its own. So the sum of the processes'
        gradients is the gradient, also of losses that compare queries with one another.
        """
        if self.world.size == 1:
            return q
        first = sum(shares[: self.world.rank])
        whole = self.world.gather(q, shares, dim=1)
        return torch.cat([whole[:, :first], q, whole[:, first + q.shape[1] :]], dim=1)

    def _whose(self, latents: Latents) -> tuple[Tensor | None, Tensor | None]:
        """Without feature sharing: the clients of all processes, (P,), and the client of every image, (N,)."""
        if self.config.contrast.feature_sharing:
            return None, None
        clients, sizes, shares = latents.clients, latents.sizes, latents.shares
        of_images = self.world.gather(upload(np.repeat(clients, sizes), self.device), shares)
        if not self.objective.queue:
            return None, of_images
        rings = self.world.gather(upload(clients, self.device), [n // self.config.clients.batch for n in shares])
        return rings, of_images

    def _negatives(self, rings: Tensor | None) -> Tensor | None:
        if not self.objective.queue:
            return None
        return self.queue.keys[0] if rings is None else self.queue.keys[rings]

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {
            "online": self.online.state_dict(),
            "momentum": self.momentum.state_dict(),
            "queue": self.queue.state_dict(),
            "optimizer": {} if self.optimizer is None else self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``'s result."""
        self.online.load_state_dict(state["online"])
        self.momentum.load_state_dict(state["momentum"])
        self.queue.load_state_dict(state["queue"])
        if self.optimizer is None:
            return
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, kept in self.optimizer.state.items():  # fused SGD takes its strides to be the parameter's
            if (buffer := kept.get("momentum_buffer")) is not None:
                kept["momentum_buffer"] = torch.empty_like(parameter).copy_(buffer).detach()
