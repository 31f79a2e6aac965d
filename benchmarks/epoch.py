"""What federation costs: MocoSFL beside MoCo in one place.

MocoSFL is the trainer's loop, without logging, evaluation and checkpoints. MoCo is the same network in one piece, with
one optimiser, on the same images: batch, augmentation, head, queue, loss, precision, memory layout and torch.compile
are those of the recipe. With a symmetric loss it sends both views through the whole network, while of the clients only
one half each sees a view; that is what MoCo does. Blocks of both are measured in turn.

The target is a ratio of at most 1.15.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mocosfl
from benchmarks import common
from benchmarks.common import Loop, seconds
from mocosfl.compute import autocast, compiled
from mocosfl.config import Config
from mocosfl.contrast import infonce, update_momentum
from mocosfl.data.augment import augmented, normalise, on_device, policy_of
from mocosfl.data.federation import Federation
from mocosfl.data.partition import Partition
from mocosfl.data.sampler import ClientSampler
from mocosfl.experiment import build
from mocosfl_device.augment import AugmentParameters

TARGET = 1.15


class MoCo:
    """MoCo v2 on all images in one place (He et al., 2020; Chen et al., 2020).

    Args:
        config: of the recipe; what concerns clients is ignored.
        federation: its images.
        device: where to compute.
    """

    def __init__(self, config: Config, federation: Federation, device: torch.device) -> None:
        self.config, self.device, self.images = config, device, federation.splits.train
        everything = Partition(federation.train_rows, np.array([0, len(federation.train_rows)]))
        self.sampler = ClientSampler(everything, config.seed)
        parts = build(config.updated({"train.compile": "off"}), federation, device)
        self.mean, self.std = parts.encoder.mean, parts.encoder.std
        client, server = copy.deepcopy(parts.encoder.client), copy.deepcopy(parts.server.online)
        if _channels_last(server):
            client.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.online = nn.Sequential(client, server).to(device).train()
        self.momentum = copy.deepcopy(self.online).requires_grad_(False)
        self.queue = copy.deepcopy(parts.server.queue)
        self.optimizer = torch.optim.SGD(self.online.parameters(), **parts.server.optimizer.defaults)
        self.policy = policy_of(config.augment)
        self._online, self._momentum = compiled(self.online, config), compiled(self.momentum, config)
        self._augmented, self._loss = compiled(augmented, config), compiled(_loss, config)

    def step(self) -> None:
        """One step on as many images as all clients see together."""
        config = self.config
        rows, draws = (a.ravel() for a in self.sampler.draw(np.zeros(1, dtype=np.int64), config.step_images))
        images = self.images.take(rows, self.device)
        parameters = AugmentParameters.draw(
            self.policy, images.shape[-1], config.seed, client=0, draw=draws, view=np.arange(2)[:, None]
        )
        views = self._augmented(images.repeat(2, 1, 1, 1), on_device(parameters, self.device), self.policy)
        first, second = normalise(views, self.mean, self.std).unflatten(0, (2, -1))  # (n, C, S, S) each
        into_online, into_momentum = first, second
        if config.contrast.symmetric:
            into_online, into_momentum = torch.cat([first, second]), torch.cat([second, first])

        update_momentum(self.momentum.parameters(), self.online.parameters(), config.contrast.momentum)
        with autocast(self.device, config):
            q = self._online(into_online)
            with torch.no_grad():
                k = self._momentum(into_momentum)
        q, k = (x.float().unflatten(0, (-1, len(images))) for x in (q, k))  # (ways, n, D)
        loss, k = self._loss(q, k, self.queue.keys[0], config.contrast.temperature)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.queue.push(k.flatten(0, 1)[None])

    def run(self, steps: int) -> None:
        """So many steps."""
        for _ in range(steps):
            self.step()


def _loss(q: Tensor, k: Tensor, negatives: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """InfoNCE summed over the ways, (ways, n, D) each, and normalised keys."""
    q, k = F.normalize(q, dim=2), F.normalize(k, dim=2)
    losses = [infonce(*pair, negatives, temperature)[0] for pair in zip(q, k, strict=True)]
    return torch.stack(losses).sum(dim=0).mean(), k


def _channels_last(network: nn.Module) -> bool:
    """Whether its convolutions' weights lie so in memory."""
    filters = [p for p in network.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
    return any(p.is_contiguous(memory_format=torch.channels_last) for p in filters)


def measure(name: str, args: Any, device: torch.device) -> dict[str, Any]:
    """Both, on the images of one recipe."""
    config = mocosfl.recipe(name).updated(common.changes(args.set))
    federation, images = common.federation_of(config, None if name == "digits" else args.source)
    steps = args.steps or common.whole_intervals(config, 20)
    with common.kernels_of_training(device):
        loops: dict[str, Loop | MoCo] = {
            "MocoSFL": Loop(config, federation, device),
            "MoCo": MoCo(config, federation, device),
        }
        measures = {
            loop: partial(lambda run: seconds(lambda: run(steps), device) / steps, it.run) for loop, it in loops.items()
        }
        times = common.in_turn(measures, args.repeats)
    an_epoch = len(federation.train_rows) / config.step_images
    return {
        "recipe": name,
        "images": images,
        "images_a_step": config.step_images,
        "images_an_epoch": len(federation.train_rows),
        "precision": config.train.precision,
        "compile": config.train.compile,
        "steps_of_a_repeat": steps,
        "cases": {
            loop: {
                "ms_a_step": time.times(1e3).facts(),
                "seconds_an_epoch": time.times(an_epoch).facts(),
                "images_per_second": time.rate(config.step_images).facts(),
            }
            for loop, time in times.items()
        },
        "ratio": (times["MocoSFL"] / times["MoCo"]).facts(),
        "target": TARGET,
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--recipes", nargs="+", help="unset: digits, cifar10-small, and cifar10-noniid-1000 on a GPU")
    parser.add_argument("--source", help="where CIFAR is; unset: random pixels in its place")
    parser.add_argument("--steps", type=int, help="steps of a repeat; unset: 20 or more, whole sync intervals")
    args = parser.parse_args()
    device = common.begin(args)
    gpu_only = ["cifar10-noniid-1000"] if device.type == "cuda" else []
    results = [measure(name, args, device) for name in args.recipes or ["digits", "cifar10-small", *gpu_only]]

    def text(figures: dict[str, float]) -> str:
        return f"{figures['median']:.4g} ({figures['min']:.4g} to {figures['max']:.4g})"

    rows = [
        [f"{result['recipe']}, {loop}", *map(text, case.values()), text(result["ratio"]) if loop == "MocoSFL" else ""]
        for result in results
        for loop, case in result["cases"].items()
    ]
    columns = ("recipe", "ms a step", "s an epoch", "images/s", f"of MoCo (target {TARGET})")
    common.show(f"median (least to greatest) of {args.repeats}", columns, rows)
    for result in results:
        common.console.print(f"{result['recipe']}: {result['images']}")
    common.write("epoch", args, device, {"changes": common.changes(args.set), "results": results})


if __name__ == "__main__":
    main()
