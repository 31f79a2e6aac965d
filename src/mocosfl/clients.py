"""The clients as the trainer sees them, and all of them simulated in one process.

A *cohort* stands for every client of a run. The training loop does not know where they are: ``LocalCohort`` computes
them here, as one batched computation over stacked weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, vmap

from mocosfl.config import Config
from mocosfl.contrast import update_momentum
from mocosfl.data.augment import AugmentParameters, Policy, augment, normalise
from mocosfl.data.images import ImageSet, upload
from mocosfl.data.sampler import ClientSampler
from mocosfl.sync import fedavg

Stack = dict[str, Tensor]
"""Parameters or buffers by name, each with a leading dimension for the clients."""


@dataclass(frozen=True)
class Latents:
    """What the clients send in one step: activations at the cut, of all clients, concatenated.

    Attributes:
        query: (V, n, ...) float32, from the online halves; V = 2 if both views train the clients, else 1.
        key: (V, n, ...) float32, from the momentum halves; ``key[i]`` is the other view of the images of
            ``query[i]``.
        clients: (P,) int64, the clients in the order of their pieces.
        size: images of one client; n = P * size.
    """

    query: Tensor
    key: Tensor
    clients: NDArray[np.int64]
    size: int


class Cohort(Protocol):
    """Every client of a run, wherever it is."""

    def activate(self, pool: NDArray[np.int64]) -> None:
        """Start a round with these clients, (P,) int64. Clients outside the pool hold what they were last handed."""

    def forward(self) -> Latents:
        """Let every active client draw images, make two views and run its halves on them."""

    def backward(self, gradients: Tensor, lr: float) -> None:
        """Hand each client the gradient at its query latents; each takes a step at this rate.

        Args:
            gradients: of the shape of ``Latents.query``.
            lr: learning rate.
        """

    def synchronise(self) -> None:
        """Average the active clients' halves by the images each contributed since; everybody gets the average."""

    def average(self) -> dict[str, Tensor]:
        """The average client half as a state dict; changes nothing."""

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``'s result."""


class LocalCohort:
    """All clients in this process: the simulator.

    Weights of the active clients are stacked, one tensor a parameter with the clients first, and run as one batched
    computation; a step has no loop over clients. What a client keeps while it is outside the pool (momentum copies
    that are not averaged, SGD momentum if it is kept) lies in a bank of all N; without such things memory grows with
    the pool alone.

    Args:
        half: the client half, initialised; every client starts from it.
        config: the whole configuration.
        images: the training set.
        sampler: draws each client's images.
        mean, std: (C,) of the training images in [0, 1].
        device: where to compute.
    """

    def __init__(
        self,
        half: nn.Module,
        config: Config,
        images: ImageSet,
        sampler: ClientSampler,
        mean: Tensor,
        std: Tensor,
        device: torch.device,
    ) -> None:
        self.config, self.images, self.sampler, self.device = config, images, sampler, device
        self.mean, self.std = mean.to(device), std.to(device)
        self.policy = Policy.of(config.augment)
        self.half = half.to(device).train()
        self.pool = np.arange(config.pool)
        self.contributed = np.zeros(config.pool, dtype=np.int64)
        self.online = {name: self._stacked(p).requires_grad_() for name, p in self.half.named_parameters()}
        self.momentum = {name: self._stacked(p) for name, p in self.half.named_parameters()}
        self.online_buffers = {name: self._stacked(b) for name, b in self.half.named_buffers()}
        self.momentum_buffers = {name: self._stacked(b) for name, b in self.half.named_buffers()}
        self.velocity = {name: torch.zeros_like(p) for name, p in self.momentum.items()}
        self.bank = {
            group: {name: t[:1].repeat(config.clients.number, *[1] * (t.ndim - 1)) for name, t in stack.items()}
            for group, stack in self._kept().items()
        }
        self._query: Tensor | None = None

    def _stacked(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.device).repeat(self.config.pool, *[1] * tensor.ndim)

    def _kept(self) -> dict[str, Stack]:
        """What clients keep for themselves while they are outside the pool."""
        if self.config.pool == self.config.clients.number:
            return {}
        kept = {}
        if self.config.clients.keep_optimizer:
            kept["velocity"] = self.velocity
        if not self.config.sync.momentum:
            kept["momentum"] = self.momentum | self.momentum_buffers
        return kept

    @torch.no_grad()
    def activate(self, pool: NDArray[np.int64]) -> None:
        """Swap the pool; call it only where the halves have just been averaged."""
        leave, enter = (upload(ids, self.device) for ids in (self.pool, pool))
        kept = self._kept()
        for group, stack in kept.items():
            for name, tensor in stack.items():
                self.bank[group][name][leave] = tensor
                tensor.copy_(self.bank[group][name][enter])
        if "velocity" not in kept and not np.array_equal(pool, self.pool):
            stays = upload(np.isin(pool, self.pool), self.device)
            seat = upload(np.searchsorted(self.pool, pool).clip(max=len(pool) - 1), self.device)
            for tensor in self.velocity.values():
                tensor.copy_(tensor[seat] * stays.view(-1, *[1] * (tensor.ndim - 1)))
        self.pool = pool
        self.contributed[:] = 0

    def _run(self, parameters: Stack, buffers: Stack, views: Tensor) -> Tensor:
        """Every client's half on its own images: (P, n, C, S, S) to (P, n, ...)."""

        def one(parameters: Stack, buffers: Stack, views: Tensor) -> Tensor:
            return functional_call(self.half, (parameters, buffers), (views,))

        return vmap(one)(parameters, buffers, views)

    def forward(self) -> Latents:
        """Draw images, make two views, run both halves; see ``Cohort.forward``."""
        config, pool = self.config, self.pool
        rows, draws = self.sampler.draw(pool, config.clients.batch)  # (P, B)
        images = self.images.take(rows.ravel(), self.device)
        parameters = AugmentParameters.draw(
            self.policy,
            images.shape[-1],
            config.seed,
            client=pool[:, None, None],
            draw=draws[:, None],
            view=np.arange(2)[:, None],
        )  # client after client, first views before second views
        twice = images.view(len(pool), 1, -1, *images.shape[1:]).expand(-1, 2, -1, -1, -1, -1)
        views = normalise(augment(twice.flatten(0, 2), parameters, self.policy), self.mean, self.std)
        views = views.view(len(pool), 2, -1, *images.shape[1:])  # (P, 2, B, C, S, S)

        both = config.contrast.both_views
        first = views.flatten(1, 2) if both else views[:, 0]
        second = views.flip(1).flatten(1, 2) if both else views[:, 1]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
            query = self._run(self.online, self.online_buffers, first)
            update_momentum(self.momentum.values(), self.online.values(), config.contrast.momentum)
            with torch.no_grad():
                key = self._run(self.momentum, self.momentum_buffers, second)
        full = torch.promote_types(query.dtype, torch.float32)
        self._query = query.to(full)
        self.contributed += config.clients.batch
        return Latents(self._by_view(self._query.detach()), self._by_view(key.to(full)), pool, config.clients.batch)

    def _by_view(self, latents: Tensor) -> Tensor:
        """(P, V * B, ...) to (V, P * B, ...)."""
        views = 2 if self.config.contrast.both_views else 1
        return latents.unflatten(1, (views, -1)).transpose(0, 1).flatten(1, 2)

    def backward(self, gradients: Tensor, lr: float) -> None:
        """Back-propagate each client's piece through its half; one SGD step each."""
        if self._query is None:
            raise RuntimeError("backward needs a forward before it")
        pieces = gradients.unflatten(1, (len(self.pool), -1)).transpose(0, 1).flatten(1, 2)  # as _query
        parameters = list(self.online.values())
        grads = list(torch.autograd.grad(self._query, parameters, pieces))
        self._query = None
        with torch.no_grad():
            settings, velocity = self.config.train, list(self.velocity.values())
            torch._foreach_add_(grads, parameters, alpha=settings.weight_decay)
            torch._foreach_mul_(velocity, settings.momentum)
            torch._foreach_add_(velocity, grads)
            torch._foreach_add_(parameters, velocity, alpha=-lr)

    @torch.no_grad()
    def synchronise(self) -> None:
        """FedAvg of the online halves, and of the momentum halves too if ``sync.momentum``."""
        groups = [self.online, self.online_buffers]
        if self.config.sync.momentum:
            groups += [self.momentum, self.momentum_buffers]
        weights = self._weights()
        for stack in groups:
            for tensor in stack.values():
                tensor.copy_(fedavg(tensor, weights).expand_as(tensor))
        self.contributed[:] = 0

    def _weights(self) -> Tensor:
        """(P,) images contributed since the last average; equal where nobody has contributed yet."""
        images = self.contributed if self.contributed.any() else np.ones_like(self.contributed)
        return upload(images.astype(np.float32), self.device)

    @torch.no_grad()
    def average(self) -> dict[str, Tensor]:
        """The average client half as a state dict; changes nothing."""
        weights = self._weights()
        return {name: fedavg(t.detach(), weights) for name, t in (self.online | self.online_buffers).items()}

    def state_dict(self) -> dict[str, Any]:
        """All stacks, the bank, the pool and the counters."""
        return {
            "online": {name: t.detach() for name, t in self.online.items()},
            "online_buffers": self.online_buffers,
            "momentum": self.momentum,
            "momentum_buffers": self.momentum_buffers,
            "velocity": self.velocity,
            "bank": self.bank,
            "pool": torch.from_numpy(self.pool),
            "contributed": torch.from_numpy(self.contributed),
            "drawn": torch.from_numpy(self.sampler.drawn),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``'s result, in place."""
        for group in ("online", "online_buffers", "momentum", "momentum_buffers", "velocity"):
            for name, tensor in getattr(self, group).items():
                tensor.copy_(state[group][name])
        for group, stack in self.bank.items():
            for name, tensor in stack.items():
                tensor.copy_(state["bank"][group][name])
        self.pool = state["pool"].numpy().copy()
        self.contributed = state["contributed"].numpy().copy()
        self.sampler.drawn = state["drawn"].numpy().copy()
