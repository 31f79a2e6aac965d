"""The clients as the trainer sees them, and all of them simulated.

A *cohort* stands for every client of a run. The training loop does not know where they are: ``LocalCohort`` computes
them here, side by side as one network, ``FrozenCohort`` those that never change.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.profiler import record_function

from mocosfl.compute import autocast, compiled, fusible
from mocosfl.config import Config
from mocosfl.contrast import objective_of, update_momentum
from mocosfl.data.augment import augmented, normalise, on_device, policy_of
from mocosfl.data.images import ImageSet, upload
from mocosfl.data.sampler import ClientSampler
from mocosfl.distributed import World
from mocosfl.handing import Handing
from mocosfl.models.heads import WholeNetwork
from mocosfl.models.layers import has_batch_norm
from mocosfl.models.side_by_side import SideBySide, Stack
from mocosfl.privacy.defences import Defence
from mocosfl.rounding import rounded
from mocosfl.sync import averaging, divergence, fedavg
from mocosfl.turnout import Turnout, untouched
from mocosfl_device.augment import AugmentParameters
from mocosfl_device.randomness import PROTECT, bits


@dataclass(frozen=True)
class Latents:
    """What the clients send in one step: activations at the cut, of all clients, concatenated.

    Attributes:
        query: (V, n, ...) float32, from the online halves; V = 2 if both views train the clients, else 1.
        key: (V, n, ...) float32, from the momentum halves; ``key[i]`` is the other view of the images of
            ``query[i]``.
        clients: (P,) int64, the clients in the order of their pieces.
        sizes: (P,) int64, images of each client; n is their sum.
        first: (P,) int64, number of the draw that each client's first image is of; the others follow.
        shares: n of every process of the run; one number where there is one process.
        learning: whether the clients want a gradient.
    """

    query: Tensor
    key: Tensor
    clients: NDArray[np.int64]
    sizes: NDArray[np.int64]
    first: NDArray[np.int64]
    shares: tuple[int, ...]
    learning: bool = True

    def one_by_one(self) -> Iterator[Latents]:
        """Those of each client alone, in order; of one process."""
        stops = self.sizes.cumsum()
        for place, (size, stop) in enumerate(zip(self.sizes.tolist(), stops.tolist(), strict=True)):
            piece, one = slice(stop - size, stop), slice(place, place + 1)
            yield Latents(
                self.query[:, piece].clone(),
                self.key[:, piece],
                self.clients[one],
                self.sizes[one],
                self.first[one],
                (size,),
                self.learning,
            )


class Stopped(Exception):
    """The run was asked to end while a cohort waited for its clients."""


class Cohort(Protocol):
    """Every client of a run, wherever it is."""

    def activate(self, pool: NDArray[np.int64]) -> None:
        """Start a round with these clients, (P,) int64. Clients outside the pool hold what they were last handed."""

    def forward(self) -> Latents:
        """Let every active client draw images, make two views and run its halves on them.

        Raises:
            Stopped: the run was asked to end before the latents were there.
        """

    def backward(self, gradients: Tensor, lr: float) -> dict[str, Tensor]:
        """Hand each client the gradient at its query latents; each takes a step at this rate.

        Args:
            gradients: of the shape of ``Latents.query``.
            lr: learning rate.

        Returns:
            Metrics of the clients' own losses, as tensors that nobody has waited for.
        """

    def synchronise(self) -> dict[str, Tensor]:
        """Average the active clients' halves by the images each contributed since; everybody gets the average.

        Returns:
            Metrics: how far the halves had moved apart (``sync.divergence``, mean over the clients), as tensors that
            nobody has waited for. None where it is not known.
        """

    def average(self) -> dict[str, Tensor]:
        """The average client half as a state dict; changes nothing."""

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``'s result."""


class Views:
    """Draws the active clients' images, and makes two augmented views of each.

    Args:
        config: the whole configuration.
        images: the training set.
        sampler: draws each client's images.
        device: where to compute.
        world: the processes of the run: each makes the views of a part of the active clients, consecutive ones.

    Attributes:
        sizes: (P,) int64, images of each client of the pool in a step.
        seats: of the pool, those of this process.
        shares: images of every process in a step.
    """

    def __init__(
        self, config: Config, images: ImageSet, sampler: ClientSampler, device: torch.device, world: World
    ) -> None:
        self.config, self.images, self.sampler, self.device, self.world = config, images, sampler, device, world
        self.policy = policy_of(config.augment)
        self.augmented = compiled(augmented, config)
        self.sizes = config.batches
        self.seats = world.share(config.pool)
        parts = [world.share(config.pool, rank) for rank in range(world.size)]
        self.shares = tuple(int(self.sizes[part].sum()) for part in parts)

    def draw(self, pool: NDArray[np.int64]) -> Tensor:
        """Two views of each image that this process's clients draw: (2, n, C, S, S) float32 in [0, 1]."""
        shares, rank = self.shares, self.world.rank
        own = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
        with record_function("augment"):
            rows, draws = self.sampler.draw(pool, self.sizes)  # of the whole pool, so that all counters agree
            images = self.images.take(rows[own], self.device)
            parameters = AugmentParameters.draw(
                self.policy,
                images.shape[-1],
                self.config.seed,
                client=np.repeat(pool, self.sizes)[own],
                draw=draws[own],
                view=np.arange(2)[:, None],
            )
            twice = images.expand(2, *images.shape).flatten(0, 1)
            views = self.augmented(twice, on_device(parameters, self.device), self.policy)
        return views.unflatten(0, (2, -1))


class _Simulated(ABC):
    """What simulated clients need, whether they learn or not.

    Args:
        half: the client half, initialised; every client starts from it.
        config: the whole configuration.
        images: the training set.
        sampler: draws each client's images.
        mean, std: (C,) of the training images in [0, 1].
        device: where to compute.
        world: the processes of the run: each holds a part of the active clients, consecutive ones.
        defence: what clients do to their latents. Unset: nothing.
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
        world: World | None = None,
        defence: Defence | None = None,
    ) -> None:
        self.config, self.sampler, self.device = config, sampler, device
        self.world, self.defence = world or World(), defence or Defence()
        self.views = Views(config, images, sampler, device, self.world)
        self.mean, self.std = mean.to(device), std.to(device)
        self.pool = np.arange(config.pool)
        self.turnout = Turnout(config, len(sampler.partition.rows))
        self.step = 0  # steps that the clients have been asked for
        self.present = np.ones(config.pool, dtype=bool)  # in the last one
        self.secret = config.seed  # of what a defence draws; a client on another machine has one that nobody knows
        self._set_up(half)

    @abstractmethod
    def _set_up(self, half: nn.Module) -> None:
        """Make of the half what the clients compute with."""

    def _draw(self) -> tuple[Tensor, Tensor | None]:
        """Two views of the images of all active clients, and which rows are of those that are there. None: all are."""
        self.present = self.turnout.present(self.step, self.pool)
        self.step += 1
        views = self.views.draw(self.pool)
        if self.present.all():
            return views, None
        self.sampler.drawn[self.pool] -= self.views.sizes * ~self.present  # who is away has drawn nothing
        here, sizes = self.present[self.views.seats], self.views.sizes[self.views.seats]
        return views, upload(np.flatnonzero(np.repeat(here, sizes)), self.device)

    def _sent(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Latents as they are sent, (V, n, ...) each, float32: every message of a run is protected anew."""
        query, key = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (query, key))
        if not self.defence.draws:
            return query, key
        step = int(self.sampler.drawn.sum())
        for place, piece in enumerate(pair := [query, key]):
            seed = int(bits(self.secret, PROTECT, step, place, self.world.rank) >> np.uint64(1))
            pair[place] = self.defence.protect(piece.flatten(0, 1), seed).view_as(piece)
        return pair[0], pair[1]

    def _latents(self, query: Tensor, key: Tensor, learning: bool) -> Latents:
        """Latents as the server takes them, (V, n, ...) each, with whose they are."""
        here = self.present[self.views.seats]
        clients, sizes = self.pool[self.views.seats][here], self.views.sizes[self.views.seats][here]
        shares, traffic = self._shares(), self.config.traffic
        query, key = (rounded(z, traffic.latents, traffic.topk) for z in (query, key))
        return Latents(query, key, clients, sizes, self.sampler.drawn[clients] - sizes, shares, learning)

    def _shares(self) -> tuple[int, ...]:
        """Images of every process in the last step."""
        if self.present.all():
            return self.views.shares
        parts = [self.world.share(len(self.pool), rank) for rank in range(self.world.size)]
        return tuple(int((self.views.sizes * self.present)[part].sum()) for part in parts)


class LocalCohort(_Simulated):
    """All clients in this process: the simulator.

    The halves of the active clients are laid side by side as one network (``models.side_by_side``); a step has no loop
    over clients. What a client keeps while it is outside the pool (momentum copies that are not averaged, SGD momentum
    if it is kept) lies in a bank of all N; without such things memory grows with the pool alone.

    Where all clients are averaged after every step, their halves never differ when they are used: then one half stands
    for all of them, and moves by the average of their gradients, which is exact.

    Built as ``_Simulated`` is.
    """

    def _set_up(self, half: nn.Module) -> None:
        config, device = self.config, self.device
        self.sizes, self.shares = self.views.sizes, self.views.shares
        self.contributed = np.zeros(config.pool, dtype=np.int64)
        self.away = np.zeros(0, dtype=np.int64)  # clients that were not there in the last step
        self.identical = (
            config.sync.every == 1
            and config.sync.own == "none"
            and not config.clients.drop
            and config.sync.average == "fedavg"
            and config.pool == config.clients.number
            and not has_batch_norm(half)  # it would mix the clients' statistics
            and config.clients.holds == "half"  # and so would the losses of whole networks
            and self.sizes.min() == self.sizes.max()
        )
        self.seats = self.views.seats  # of the pool, those computed by this process
        self.seats_of = self.world.lengths(config.pool)
        seats = [self.shares[self.world.rank]] if self.identical else self.sizes[self.seats].tolist()
        self.online = SideBySide(half, seats, device)
        self.takes_keys = objective_of(config.contrast).keys
        target = half.target if isinstance(half, WholeNetwork) else half
        self.momentum = SideBySide(target if self.takes_keys else nn.Sequential(), seats, device, learns=False)
        self.velocity = {name: torch.zeros_like(p.detach()) for name, p in self.online.weights.items()}
        self.optimizer = self._optimizer()
        self._online, self._momentum = compiled(self.online.forward, config), compiled(self.momentum.forward, config)
        number, self.handing = config.clients.number, None
        if config.sync.own != "none":
            self.handing = Handing(config.sync, number, self._averaged(), self.online.weights)
        self.bank = {
            group: {name: t[:1].detach().repeat(number, *[1] * (t.ndim - 1)) for name, t in stack.items()}
            for group, stack in self._kept().items()
        }
        self._query: Tensor | None = None
        self._seen: Tensor | None = None  # the views that the query latents were made of

    def _optimizer(self) -> torch.optim.SGD:
        """One SGD for all clients: it works number by number. Its momentum lies in ``velocity``."""
        settings = self.config.train
        optimizer = torch.optim.SGD(
            self.online.weights.values(),
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            fused=fusible(self.device),
        )
        for name, weight in self.online.weights.items():
            optimizer.state[weight]["momentum_buffer"] = self.velocity[name]
        return optimizer

    def _kept(self) -> dict[str, Stack]:
        """What clients keep for themselves while they are outside the pool."""
        if self.config.pool == self.config.clients.number:
            return {}
        kept = {}
        if self.config.clients.keep_optimizer:
            kept["velocity"] = self.velocity
        own = self.config.sync.own != "none"
        if own:  # as it was before the last average was handed out
            kept["online"] = _numbers(self.online)
        if own or not self.config.sync.momentum:
            kept["momentum"] = _numbers(self.momentum)
        return kept

    def _everyone(self, stack: Tensor) -> Tensor:
        """The whole pool's, from every process's own."""
        return stack if self.identical else self.world.gather(stack, self.seats_of)

    def _own(self, stack: Tensor) -> Tensor:
        """This process's, of the whole pool's."""
        return stack if self.identical else stack[self.seats]

    @torch.no_grad()
    def activate(self, pool: NDArray[np.int64]) -> None:
        """Swap the pool; call it only where the halves have just been averaged."""
        leave, enter = (upload(ids, self.device) for ids in (self.pool, pool))
        kept = self._kept()
        for group, stack in kept.items():
            for name, tensor in stack.items():
                self.bank[group][name][leave] = self._everyone(tensor)
                tensor.copy_(self.bank[group][name][self._own(enter)])
        if "velocity" not in kept and not np.array_equal(pool, self.pool):
            stays = upload(np.isin(pool, self.pool), self.device)
            seat = upload(np.searchsorted(self.pool, pool).clip(max=len(pool) - 1), self.device)
            for tensor in self.velocity.values():
                taken = self._everyone(tensor)[seat] * stays.view(-1, *[1] * (tensor.ndim - 1))
                tensor.copy_(self._own(taken))
        self.pool = pool
        self.contributed[:] = 0

    def forward(self) -> Latents:
        """Draw images, make two views, run both halves; see ``Cohort.forward``."""
        if self.config.train.compile != "off":
            torch.compiler.cudagraph_mark_step_begin()  # the last step's tensors may be written over
        config = self.config
        if self.handing is not None:
            self.handing.hand_out(self.pool[self.seats])
        seen, rows = self._draw()
        self._welcome_back()
        views = normalise(seen, self.mean, self.std)  # (2, n, C, S, S)
        first, second = (views, views.flip(0)) if config.contrast.both_views else (views[:1], views[1:])
        running = [stack for stack in self.online.statistics.values() if stack.is_floating_point()]
        local = [*running, *_numbers(self.momentum).values()]
        with record_function("clients: forward"), autocast(self.device, config), untouched(local, self._empty_seats()):
            query = self._online(first)
            if self.takes_keys:
                online = [self.online.weights[name] for name in self.momentum.weights]
                update_momentum(self.momentum.weights.values(), online, config.contrast.momentum)
                with torch.no_grad():
                    key = self._momentum(second)
            else:  # nobody looks at them
                key = query.detach()
        if rows is not None:
            query, key, seen = (t.index_select(1, rows) for t in (query, key, seen))
        query, key = self._sent(query, key)
        self._query, self._seen = query, seen[: len(first)] if self.defence.has_loss else None
        self.contributed = np.where(self.present, self.contributed + self.sizes, 0)
        return self._latents(query.detach(), key, learning=True)

    def backward(self, gradients: Tensor, lr: float) -> dict[str, Tensor]:
        """Back-propagate each client's piece through its half, as if its codec had lost nothing (straight-through); one
        SGD step each."""
        if self._query is None:
            raise RuntimeError("backward needs a forward before it")
        gradients = rounded(gradients, self.config.traffic.gradients, self.config.traffic.topk)
        if self._seen is not None:
            with record_function("clients: defence"):
                flat = [t.flatten(0, 1) for t in (self._query.detach(), self._seen, gradients)]
                extra = self.defence.gradient(flat[0], flat[1], self._weights(len(self._query)), flat[2])
                gradients = gradients + extra.view_as(gradients)
        with record_function("clients: backward"):
            self._query.backward(gradients)
        self._query = self._seen = None
        with record_function("clients: update"):
            if self.identical:  # the gradients' sum over the clients becomes their average
                grads = [p.grad for p in self.online.weights.values() if p.grad is not None]
                torch._foreach_div_(grads, len(self.pool))
                self.world.add(grads)
            self.optimizer.param_groups[0]["lr"] = lr
            with untouched([*self.online.weights.values(), *self.velocity.values()], self._empty_seats()):
                self.optimizer.step()
            self.optimizer.zero_grad()
        return self.defence.metrics

    def _empty_seats(self) -> NDArray[np.int64]:
        """Of this process's seats, those whose clients are away."""
        return np.flatnonzero(~self.present[self.seats])

    @torch.no_grad()
    def _welcome_back(self) -> None:
        """Who has been away starts its SGD momentum from zero, unless ``clients.keep_optimizer``."""
        back = np.isin(self.pool, self.away) & self.present
        self.away = self.pool[~self.present]
        seats = np.flatnonzero(back[self.seats])
        if len(seats) and not self.config.clients.keep_optimizer:
            rows = upload(seats, self.device)
            for velocity in self.velocity.values():
                velocity[rows] = 0

    def _weights(self, views: int) -> Tensor:
        """Of every image of this process in the clients' loss, as ``clients.lr_scale`` says: (views * n,)."""
        sizes = self.sizes[self.seats][self.present[self.seats]]
        whole = self.config.clients.lr_scale == "batch_mean"
        of = np.full(len(sizes), self.sizes[self.present].sum()) if whole else sizes
        return upload(np.repeat(1 / of, sizes).astype(np.float32), self.device).repeat(views) / views

    @torch.no_grad()
    def synchronise(self) -> dict[str, Tensor]:
        """Average the online halves, and the momentum halves too if ``sync.momentum``; see ``Cohort.synchronise``.

        Nothing is known of divergence where one half stands for all. Where clients keep some of their own, they are
        handed the average with their next step, so that those that come from outside the pool are too.
        """
        with record_function("clients: synchronise"):
            stacks = self._averaged()
            means = dict(zip(stacks, self._means(list(stacks.values())), strict=True))
            if self.handing is not None:
                return self._keep_own(self.handing, means)
            apart = {} if self.identical else self._divergence(means, in_place=True)
            for name, stack in stacks.items():
                stack.copy_(means[name].expand_as(stack))
            self.contributed[:] = 0
        return apart

    def _averaged(self) -> Stack:
        """What is averaged: the online halves, and the momentum halves too if ``sync.momentum``."""
        halves = {"online": self.online} | ({"momentum": self.momentum} if self.config.sync.momentum else {})
        return {f"{kind}.{name}": stack for kind, half in halves.items() for name, stack in _numbers(half).items()}

    def _keep_own(self, handing: Handing, means: Stack) -> dict[str, Tensor]:
        """Note the averages, to be handed out with the next step."""
        apart = self._divergence(means, in_place=False)
        part = np.flatnonzero(self.contributed)
        far = self._everyone(handing.distances(means))[upload(part, self.device)]
        shares = handing.note(means, self.pool[part], far)
        self.contributed[:] = 0
        return apart | {"own_share": shares.mean()}

    def _divergence(self, means: Stack, in_place: bool) -> dict[str, Tensor]:
        """Of the online weights from their averages; in place, the deviations are left in the weights."""
        weights = self.online.weights
        of = {name: means[f"online.{name}"] for name in weights}
        off = {name: stack.sub_(of[name]) if in_place else stack - of[name] for name, stack in weights.items()}
        apart = divergence(off, of)
        part = self._images() > 0
        here = upload(part[self.seats], self.device)
        total = torch.stack([(clients * here).sum() for clients in apart.values()]) / part.sum()
        self.world.add([total])
        return dict(zip(apart, total, strict=True))

    def _images(self) -> NDArray[np.int64]:
        """Images that each active client has contributed since the last average; all alike if nobody has yet, (P,)."""
        return self.contributed if self.contributed.any() else np.ones_like(self.contributed)

    def _means(self, stacks: list[Tensor]) -> list[Tensor]:
        """Averages over the pool, weighted by the images contributed since the last one."""
        if self.identical:
            return [stack[0] for stack in stacks]
        images = self._images()
        if self.config.sync.average != "fedavg":  # no sum of the processes' parts
            combine, everyone = averaging(self.config.sync), upload(images.astype(np.float32), self.device)
            return [combine(self._everyone(stack), everyone) for stack in stacks]
        own = images[self.seats]
        weights = upload(own.astype(np.float32), self.device)
        if own.any():
            means = [fedavg(stack, weights) * (own.sum() / images.sum()) for stack in stacks]
        else:  # all that this process computes are away
            means = [torch.zeros_like(stack[0]) for stack in stacks]
        self.world.add(means)
        return means

    @torch.no_grad()
    def average(self) -> dict[str, Tensor]:
        """The average client half as a state dict; changes nothing."""
        return self._average(self.online)

    def _average(self, side: SideBySide) -> dict[str, Tensor]:
        half = side.weights | side.statistics
        averaged = list(_numbers(side))
        counters = {name: stack[0] for name, stack in half.items()}  # of batches: alike on all clients
        if self.handing is not None and self.handing.owed and (side is self.online or self.config.sync.momentum):
            kind = "online" if side is self.online else "momentum"  # the halves are still the clients' own
            return counters | {name: self.handing.average[f"{kind}.{name}"].clone() for name in averaged}
        means = self._means([half[name] for name in averaged])
        return counters | dict(zip(averaged, means, strict=True))

    @torch.no_grad()
    def halves(self) -> dict[str, Tensor]:
        """The average of either half, ``online.NAME`` and ``momentum.NAME``; changes nothing."""
        sides = {"online": self.online, "momentum": self.momentum}
        return {f"{kind}.{name}": t for kind, side in sides.items() for name, t in self._average(side).items()}

    @torch.no_grad()
    def take_over(self, halves: Mapping[str, Tensor], restart: bool) -> None:
        """Give every active client these halves.

        Args:
            halves: as ``halves`` returns them; those left out stay as they are.
            restart: set the optimiser's momentum to zero.
        """
        for kind, side in (("online", self.online), ("momentum", self.momentum)):
            for name, stack in (side.weights | side.statistics).items():
                if (tensor := halves.get(f"{kind}.{name}")) is not None:
                    stack.copy_(tensor.expand_as(stack))
        if restart:
            for velocity in self.velocity.values():
                velocity.zero_()

    def _stacks(self) -> dict[str, Stack]:
        return {
            "online": self.online.weights,
            "online_buffers": self.online.statistics,
            "momentum": self.momentum.weights,
            "momentum_buffers": self.momentum.statistics,
            "velocity": self.velocity,
        }

    def state_dict(self) -> dict[str, Any]:
        """The whole pool's stacks, the bank, the pool and the counters."""
        return {
            group: {name: self._everyone(tensor.detach()) for name, tensor in stack.items()}
            for group, stack in self._stacks().items()
        } | {
            "bank": self.bank,
            "handing": None if self.handing is None else self.handing.state_dict(),
            "pool": torch.from_numpy(self.pool),
            "contributed": torch.from_numpy(self.contributed),
            "away": torch.from_numpy(self.away),
            "step": self.step,
            "drawn": torch.from_numpy(self.sampler.drawn),
            "defence": self.defence.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``'s result, in place; it may come from a run with another number of processes."""
        for group, stack in self._stacks().items():
            for name, tensor in stack.items():
                tensor.copy_(self._own(state[group][name]))
        for group, stack in self.bank.items():
            for name, tensor in stack.items():
                tensor.copy_(state["bank"][group][name])
        if self.handing is not None:
            self.handing.load_state_dict(state["handing"])
        self.pool = state["pool"].numpy().copy()
        self.contributed = state["contributed"].numpy().copy()
        self.away, self.step = state["away"].numpy().copy(), state["step"]
        self.sampler.drawn = state["drawn"].numpy().copy()
        self.defence.load_state_dict(state["defence"])


def _numbers(side: SideBySide) -> Stack:
    """Weights and statistics, but not counters: those of batches are alike on all clients, and nobody's own."""
    return {name: stack for name, stack in (side.weights | side.statistics).items() if stack.is_floating_point()}


class FrozenCohort(_Simulated):
    """Simulated clients whose half never changes: one half stands for all of them.

    Online and momentum copy are the same, and no client is ever sent anything. BatchNorm in the half uses the
    statistics that it came with.

    Built as ``_Simulated`` is.
    """

    def _set_up(self, half: nn.Module) -> None:
        self.half = copy.deepcopy(half).to(self.device).requires_grad_(False).eval()
        self._half = compiled(self.half, self.config)

    def activate(self, pool: NDArray[np.int64]) -> None:
        """Swap the pool."""
        self.pool = pool

    @torch.no_grad()
    def forward(self) -> Latents:
        """Draw images, make two views, run the half on them; see ``Cohort.forward``."""
        if self.config.train.compile != "off":
            torch.compiler.cudagraph_mark_step_begin()
        views, rows = self._draw()
        if rows is not None:
            views = views.index_select(1, rows)
        views = normalise(views, self.mean, self.std)
        with record_function("clients: forward"), autocast(self.device, self.config):
            latents = self._half(views.flatten(0, 1)).unflatten(0, (2, -1))
        return self._latents(*self._sent(latents[:1], latents[1:]), learning=False)

    def backward(self, gradients: Tensor, lr: float) -> dict[str, Tensor]:
        """Never called: a frozen client is sent no gradient."""
        raise RuntimeError("frozen clients take no gradient")

    def synchronise(self) -> dict[str, Tensor]:
        """Nothing: all halves are the same."""
        return {}

    def average(self) -> dict[str, Tensor]:
        """The half as a state dict."""
        return self.half.state_dict()

    def halves(self) -> dict[str, Tensor]:
        """The half, ``online.NAME``."""
        return {f"online.{name}": tensor for name, tensor in self.average().items()}

    def take_over(self, halves: Mapping[str, Tensor], restart: bool) -> None:
        """Replace the half by another, as ``halves`` returns it. There is no optimiser to restart."""
        self.half.load_state_dict({name.removeprefix("online."): tensor for name, tensor in halves.items()})

    def state_dict(self) -> dict[str, Any]:
        """The half, the pool and the counters."""
        return {
            "half": self.half.state_dict(),
            "pool": torch.from_numpy(self.pool),
            "step": self.step,
            "drawn": torch.from_numpy(self.sampler.drawn),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``'s result."""
        self.half.load_state_dict(state["half"])
        self.pool, self.step = state["pool"].numpy().copy(), state["step"]
        self.sampler.drawn = state["drawn"].numpy().copy()
