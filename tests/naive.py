"""Slow, obviously right versions of the parts that are vectorised."""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from torch import Tensor, nn

from mocosfl.clients import Latents
from mocosfl.config import Config
from mocosfl.data.augment import augment, normalise, policy_of
from mocosfl.data.images import ImageSet
from mocosfl.data.sampler import ClientSampler
from mocosfl.models.heads import WholeNetwork
from mocosfl_device.augment import AugmentParameters
from mocosfl_device.randomness import DROP, uniform


class Client:
    """One client: modules and an optimiser of its own."""

    def __init__(self, half: nn.Module, config: Config) -> None:
        self.config = config
        self.online = copy.deepcopy(half)
        target = half.target if isinstance(half, WholeNetwork) else half
        self.momentum = copy.deepcopy(target).requires_grad_(False)
        self.contributed = 0
        self.scale = None  # of FedEMA, or whether the client had a part in an average at all
        self.forget()

    def forget(self) -> None:
        train = self.config.train
        self.optimizer = torch.optim.SGD(
            self.online.parameters(), lr=1.0, momentum=train.momentum, weight_decay=train.weight_decay
        )

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """(2, B, C, S, S) to (V, B, ...) twice."""
        both = self.config.contrast.both_views
        tau = self.config.contrast.momentum
        self.query = self.online(views.flatten(0, 1) if both else views[0])
        online = dict(self.online.named_parameters())
        for name, m in self.momentum.named_parameters():
            o = online[name]
            m.mul_(tau).add_(o.detach(), alpha=1 - tau)
        key = self.momentum(views.flip(0).flatten(0, 1) if both else views[1])
        self.contributed += views.shape[1]
        count = 2 if both else 1
        return self.query.detach().unflatten(0, (count, -1)), key.unflatten(0, (count, -1))

    def backward(self, gradient: Tensor, lr: float) -> None:
        self.optimizer.zero_grad()
        self.query.backward(gradient.flatten(0, 1))
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()


class NaiveCohort:
    """A Python loop over separate clients, each with modules, an optimiser and augmentation calls of its own."""

    def __init__(
        self, half: nn.Module, config: Config, images: ImageSet, sampler: ClientSampler, mean: Tensor, std: Tensor
    ) -> None:
        self.config, self.images, self.sampler, self.mean, self.std = config, images, sampler, mean, std
        self.clients = [Client(half, config) for _ in range(config.clients.number)]
        self.pool = np.arange(config.pool)
        self.step, self.away = 0, set()
        self.owed = None  # the averages that active clients are to be handed, where they keep some of their own

    def activate(self, pool: np.ndarray) -> None:
        for client in set(range(len(self.clients))) - set(pool.tolist()):
            if not self.config.clients.keep_optimizer:
                self.clients[client].forget()
        self.pool = pool

    def forward(self) -> Latents:
        self._hand_out_beside_own()
        policy, queries, keys = policy_of(self.config.augment), [], []
        self.present = self._present()
        for client in self.away & set(self.present):
            if not self.config.clients.keep_optimizer:
                self.clients[client].forget()
        self.away = {int(client) for client in self.pool} - set(self.present)
        for client in self.away:
            self.clients[client].contributed = 0
        pool = np.array(self.present)
        first = self.sampler.drawn[pool]
        for client in self.present:
            rows, draws = self.sampler.draw(np.array([client]), self._batch(client))
            views = []
            for view in (0, 1):
                images = self.images.take(rows, "cpu")
                parameters = AugmentParameters.draw(
                    policy, images.shape[-1], self.config.seed, client=client, draw=draws, view=view
                )
                views.append(normalise(augment(images, parameters, policy), self.mean, self.std))
            query, key = self.clients[client].forward(torch.stack(views))
            queries.append(query)
            keys.append(key)
        sizes = np.array([self._batch(client) for client in self.present])
        return Latents(torch.cat(queries, 1), torch.cat(keys, 1), pool, sizes, first, (int(sizes.sum()),))

    def _present(self) -> list[int]:
        """Clients of the pool that have not dropped out since the last average."""
        config, step = self.config, self.step
        self.step += 1
        if not config.clients.drop:
            return self.pool.tolist()
        step_images = sum(self._batch(client) for client in self.pool)
        steps = max(1, round(config.train.epochs * len(self.sampler.partition.rows) / step_images))
        sampled = config.pool < config.clients.number
        due = [s for s in range(steps) if (sampled and s % config.clients.round == 0) or s == 0]
        if config.sync.every:  # steps before which an average is handed out
            due = [s for s in range(steps) if (s % config.clients.round if sampled else s) % config.sync.every == 0]
        begin = max(s for s in due if s <= step)
        length = min([s for s in due if s > step], default=steps) - begin
        leaves = {}
        for client in self.pool.tolist():
            drops = uniform(config.seed, DROP, begin, client, 0) < config.clients.drop
            leaves[client] = int(uniform(config.seed, DROP, begin, client, 1) * length) if drops else length
        last = max(leaves.values())
        stays = min(client for client in leaves if leaves[client] == last)
        return [client for client in leaves if begin + leaves[client] > step or (last < length and client == stays)]

    def _batch(self, client: int) -> int:
        rich = client >= self.config.clients.number - self.config.rich
        return self.config.clients.batch * (self.config.clients.rich_batch_factor if rich else 1)

    def backward(self, gradients: Tensor, lr: float) -> dict[str, Tensor]:
        for client, piece in zip(
            self.present, gradients.split([self._batch(c) for c in self.present], dim=1), strict=True
        ):
            self.clients[client].backward(piece, lr)
        return {}

    def synchronise(self) -> dict[str, Tensor]:
        apart = self._divergence()
        if self.config.sync.own != "none":
            return apart | self._keep_own()
        self._hand_out("online")
        if self.config.sync.momentum:
            self._hand_out("momentum")
        for client in self.clients:
            client.contributed = 0
        return apart

    def _keep_own(self) -> dict[str, Tensor]:
        """FedEMA or FedU: note the averages and, for clients with a first part in one, how far they are from it."""
        halves = ("online", "momentum") if self.config.sync.momentum else ("online",)
        self.owed = {half: self.average(half) for half in halves}
        shares = []
        for client in self.pool:
            client = self.clients[client]
            if client.contributed:
                if client.scale is None and self._distance(client):  # a client alone has nothing to measure by
                    client.scale = self.config.sync.tau / self._distance(client)
                shares.append(self._share(client))
            client.contributed = 0
        return {"own_share": torch.tensor(shares, dtype=torch.float32).mean()}

    def _distance(self, client: Client) -> float:
        """FedEMA: the L2 norm of all numbers' differences. FedU: its mean over the weights that are no vectors."""
        encoder = {name: p for name, p in client.online.named_parameters() if not name.startswith("predictor.")}
        off = {name: float((p.detach() - self.owed["online"][name]).norm()) for name, p in encoder.items()}
        if self.config.sync.own == "ema":
            return math.sqrt(sum(norm**2 for norm in off.values()))
        return float(np.mean([norm for name, norm in off.items() if encoder[name].ndim > 1]))

    def _share(self, client: Client) -> float:
        if client.scale is None:
            return 0.0
        if self.config.sync.own == "predictor":
            return float(self._distance(client) > self.config.sync.threshold)
        return min(client.scale * self._distance(client), 1)

    def _hand_out_beside_own(self) -> None:
        if self.owed is None:
            return
        for client in self.pool:
            client = self.clients[client]
            mu = self._share(client)
            for half, average in self.owed.items():
                state = getattr(client, half).state_dict()
                for name, own in state.items():
                    if own.is_floating_point():
                        kept = mu if self.config.sync.own == "ema" or name.startswith("predictor.") else 0
                        state[name] = kept * own + (1 - kept) * average[name]
                getattr(client, half).load_state_dict(state)
        self.owed = None

    def _divergence(self) -> dict[str, Tensor]:
        """Mean over the clients of ‖w_c − w̄‖ / ‖w̄‖, of the half and of every block."""
        average = self.average()
        halves = [dict(self.clients[client].online.named_parameters()) for client in self.present]
        found = {}
        for block in ["", *dict.fromkeys(name.partition(".")[0] for name in halves[0])]:
            names = [name for name in halves[0] if block in ("", name.partition(".")[0])]
            mean = torch.cat([average[name].flatten() for name in names])
            ratios = [
                (torch.cat([half[name].detach().flatten() for name in names]) - mean).norm() / mean.norm()
                for half in halves
            ]
            found[f"divergence/{block}".rstrip("/")] = torch.stack(ratios).mean()
        modules = {
            n: m
            for n, m in self.clients[0].online.named_modules()
            if next(m.parameters(recurse=False), None) is not None
        }
        for layer in modules:  # eq. 4 of the paper, of one synchronisation
            names = [name for name in halves[0] if name.rpartition(".")[0] == layer]
            norms = [sum((half[n].detach() - average[n]).square().sum() for n in names).sqrt() for half in halves]
            found[f"divergence_l2/{layer}"] = torch.stack(norms).mean()
        found["divergence_l2"] = sum(found[f"divergence_l2/{layer}"] for layer in modules)
        return found

    def _hand_out(self, which: str) -> None:
        average = self.average(which)
        for client in self.clients:
            getattr(client, which).load_state_dict(average)

    def average(self, which: str = "online") -> dict[str, Tensor]:
        if self.owed is not None and not any(client.contributed for client in self.clients):
            return self.owed[which]
        active = [self.clients[c] for c in self.pool]
        total = sum(c.contributed for c in active)
        states = [getattr(c, which).state_dict() for c in active]
        average = {}
        for name in states[0]:
            tensors = [state[name] for state in states]
            if tensors[0].is_floating_point() and self.config.sync.average != "fedavg":
                kept = torch.stack([t for client, t in zip(active, tensors, strict=True) if client.contributed])
                ordered = kept.sort(dim=0).values
                share = self.config.sync.trim if self.config.sync.average == "trimmed_mean" else 0.5
                out = min(math.ceil(share * len(kept)), (len(kept) - 1) // 2)
                average[name] = ordered[out : len(kept) - out].mean(dim=0)
            elif tensors[0].is_floating_point():
                pairs = zip(active, tensors, strict=True)
                average[name] = sum(tensor * (client.contributed / total) for client, tensor in pairs)
            else:
                average[name] = max(tensors)
        return average

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass
