"""One process of several, for test_distributed: trains a few steps in float64, of several runs one after the other, and
writes what came out.

torchrun --nproc-per-node=2 tests/rank.py OUT '[[{"clients.pool": 4, ...}, STEPS, STATE or null], ...]'
"""

import gc
import json
import sys
from pathlib import Path
from types import FunctionType

import numpy as np
import torch
import torch.distributed as dist

from mocosfl.baselines import held_by_clients
from mocosfl.clients import FrozenCohort, LocalCohort
from mocosfl.config import Config
from mocosfl.data.images import ImageSet
from mocosfl.data.partition import partition
from mocosfl.data.sampler import ClientSampler
from mocosfl.distributed import World, joined
from mocosfl.models import build, build_head
from mocosfl.models.heads import WIDTHS
from mocosfl.privacy.defences import ResSFL, defence_of
from mocosfl.server import Server
from mocosfl.trainer import Callback, Trainer

CPU = torch.device("cpu")
MEAN, STD = torch.tensor([0.5, 0.4, 0.6]).double(), torch.tensor([0.25, 0.2, 0.3]).double()
IMAGES = 35
BASE = {
    "model.width": 4,
    "model.head": "v1",
    "contrast.queue": 50,
    "partition.kind": "iid",
    "clients.number": 7,
    "train.epochs": 3,
    "sync.every": 2,
    "seed": 1,
}


class Log(Callback):
    """Losses, accuracies and divergences of every step; ends after so many."""

    def __init__(self, steps: int) -> None:
        self.steps, self.values = steps, []

    def after_step(self, trainer: Trainer, metrics: dict[str, torch.Tensor]) -> None:
        self.values.append({name: float(value) for name, value in metrics.items()})
        trainer.stop = trainer.world.rank == 0 and trainer.step >= self.steps  # one process asks, all stop


def train(changes: dict, steps: int, world: World, state: dict | None = None) -> tuple[list, dict]:
    """Metrics of every step and the whole state at the end."""
    config = Config().updated(BASE | changes)
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 3, 8, 8), dtype=np.uint8)
    model = build(config.model, 3, 8, config.seed)
    head = build_head(config.model.head, model.features, config.seed)
    held = partition(config.partition, config.clients.number, np.arange(IMAGES), None, None, config.seed)
    half, rest = held_by_clients(config, model.client, model.server, head)
    server = Server(*rest, config, WIDTHS[config.model.head], CPU, world)
    for module in (half, server.online, server.momentum, server.queue):
        module.double()
    sampler = ClientSampler(held, config.seed)
    defence = defence_of(config, model.latent_shape, pixels.shape[1:], CPU, world)
    if isinstance(defence, ResSFL):
        defence.decoder.double()
    kind = FrozenCohort if config.clients.frozen else LocalCohort
    cohort = kind(half, config, ImageSet(pixels), sampler, MEAN, STD, CPU, world, defence)
    log = Log(steps)
    trainer = Trainer(config, cohort, server, IMAGES, [log], world)
    if state is not None:
        trainer.load_state_dict(state)
    trainer.run()
    average = cohort.average()
    end = trainer.state_dict() | {"average": average}
    end["stopwatch"] = {}  # times differ
    return log.values, end


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, runs = sys.argv[1:]
    ends = []
    with joined(CPU) as group:
        for changes, steps, start in json.loads(runs):
            values, end = train(changes, steps, group, torch.load(start) if start else None)
            ends.append({"values": values, "state": end})
        if group.size > 1:  # one process alone has no group
            for function in (o for o in gc.get_objects() if isinstance(o, FunctionType)):
                held = any(default is dist.group.WORLD for default in function.__defaults__ or ())
                assert not held, f"{function.__module__}.{function.__qualname__} would keep the group beyond its end"
        path = Path(out)
        torch.save(ends, path if group.rank == 0 else path.with_suffix(f".{group.rank}"))
