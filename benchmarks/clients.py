"""The client side of a step: does its cost depend on the number of clients, and what does it cost beside alternatives?

All cases see about 100 images a step, out of the same set. A step is augmentation, both forwards, backward with a
constant gradient, the update and the moving average; a fiftieth of the time of averaging (and of drawing a new pool,
where pools are drawn) is added to it. Cases are measured in turn in one process; peak memory in a fresh process each.

The cases: N clients of which at most 100 are active; clients with unequal batches; averaging after every step; a
Python loop over clients as the authors' release is organised, beside the same computed by ``LocalCohort``; and one
half that all clients share, which is the least that anything could cost.
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import mocosfl
from benchmarks import common
from benchmarks.common import Timing, seconds
from mocosfl.config import Config
from mocosfl.contrast import update_momentum
from mocosfl.data.augment import augment, normalise, policy_of
from mocosfl.data.images import ImageSet
from mocosfl.data.sampler import ClientSampler, pool_of_round
from mocosfl.experiment import build
from mocosfl.models.layers import WSConv2d
from mocosfl_device.augment import ASPECT, CROP_TRIES, AugmentParameters, Policy

IMAGES = 100
"""Images of one step."""

EVERY = 50
"""Steps between two averages; also those of a round."""

LR = 1e-3


class ClientSide(Protocol):
    """One way of computing all clients."""

    def step(self) -> int:
        """Compute one step; returns the number of images seen."""

    def between(self) -> None:
        """What happens every ``EVERY`` steps."""


# Ours


class Ours:
    """``LocalCohort`` without a server: the gradient at the cut is a constant."""

    def __init__(self, config: Config, images: ImageSet, device: torch.device) -> None:
        self.config, self.rounds = config, 0
        self.cohort = build(config, common.spread(config, images), device).cohort
        self.gradient: Tensor | None = None
        self._next_pool()

    def _next_pool(self) -> None:
        config = self.config
        if config.pool < config.clients.number:
            self.cohort.activate(pool_of_round(config.seed, self.rounds, config.clients.number, config.pool))
            self.rounds += 1

    def step(self) -> int:
        query = self.cohort.forward().query  # (1, n, ...)
        if self.gradient is None:
            self.gradient = 1e-3 * torch.randn_like(query)
        self.cohort.backward(self.gradient, LR)
        if self.config.sync.every == 1:
            self.cohort.synchronise()
        return query.shape[1]

    def between(self) -> None:
        self.cohort.synchronise()
        self._next_pool()


# One half for everybody


class OneHalf:
    """An ordinary network with one set of weights on the images of all clients.

    Args:
        memory_format: of its weights.
    """

    def __init__(
        self, config: Config, images: ImageSet, device: torch.device, memory_format: torch.memory_format
    ) -> None:
        self.config, self.device = config, device
        federation = common.spread(config, images)
        parts = build(config, federation, device)
        self.images, self.mean, self.std = federation.splits.train, parts.encoder.mean, parts.encoder.std
        self.online = copy.deepcopy(parts.encoder.client).to(device).train()
        self.online.to(memory_format=memory_format)  # type: ignore[call-overload]
        self.momentum = copy.deepcopy(self.online).requires_grad_(False)
        self.optimizer = _sgd(self.online, config, fused=True)
        self.sampler, self.policy = ClientSampler(federation.partition, config.seed), policy_of(config.augment)
        self.gradient: Tensor | None = None

    def step(self) -> int:
        config = self.config
        pool = np.arange(config.pool)
        rows, draws = (a.ravel() for a in self.sampler.draw(pool, config.clients.batch))
        images = self.images.take(rows, self.device)
        client = np.repeat(pool, config.clients.batch)
        parameters = AugmentParameters.draw(
            self.policy, images.shape[-1], config.seed, client=client, draw=draws, view=np.arange(2)[:, None]
        )
        views = normalise(augment(images.repeat(2, 1, 1, 1), parameters, self.policy), self.mean, self.std)
        first, second = views.chunk(2)  # (n, C, S, S) each
        with _autocast(self.device, config):
            query = self.online(first)
            update_momentum(self.momentum.parameters(), self.online.parameters(), config.contrast.momentum)
            with torch.no_grad():
                self.momentum(second).float()
        query = query.float()
        if self.gradient is None:
            self.gradient = 1e-3 * torch.randn_like(query)
        query.backward(self.gradient)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return len(query)

    def between(self) -> None:
        """Nothing: there is nothing to average."""


# A loop over clients


class PillowViews(Dataset):
    """One client's images. An item is two views of one image, augmented by Pillow as torchvision does it.

    Args:
        pixels: (n, 3, S, S) uint8, of all clients.
        rows: of this client.
        policy: what the augmentation does.
        mean, std: (3,) to normalise with.
    """

    def __init__(self, pixels: np.ndarray, rows: np.ndarray, policy: Policy, mean: Tensor, std: Tensor) -> None:
        self.pixels, self.rows, self.policy = pixels, rows, policy
        self.mean, self.std = mean.view(3, 1, 1), std.view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = Image.fromarray(np.ascontiguousarray(self.pixels[self.rows[index]].transpose(1, 2, 0)))
        return self._view(image), self._view(image)

    def _view(self, image: Image.Image) -> Tensor:
        """(3, S, S) float32, normalised."""
        policy = self.policy
        image = _crop(image, policy.crop_scale)
        if random.random() < policy.jitter_p:
            image = _jitter(image, policy)
        if random.random() < policy.grey_p:
            image = image.convert("L").convert("RGB")
        if random.random() < policy.blur_p:
            image = image.filter(ImageFilter.GaussianBlur(random.uniform(*policy.blur_sigma)))
        if random.random() < policy.flip_p:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return (pixels.float() / 255 - self.mean) / self.std


def _crop(image: Image.Image, scale: tuple[float, float]) -> Image.Image:
    """Random resized crop: the first of ten tries that fits, else the whole image."""
    size = image.width
    for _ in range(CROP_TRIES):
        area = random.uniform(*scale) * size**2
        ratio = np.exp(random.uniform(*np.log(ASPECT)))
        width, height = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < width <= size and 0 < height <= size:
            left, top = random.randint(0, size - width), random.randint(0, size - height)
            image = image.crop((left, top, left + width, top + height))
            break
    return image.resize((size, size), Image.Resampling.BILINEAR)


def _jitter(image: Image.Image, policy: Policy) -> Image.Image:
    """Brightness, contrast, saturation and hue in random order."""
    for step in random.sample(("Brightness", "Contrast", "Color", "hue"), 4):
        if step == "hue":
            hue, saturation, value = image.convert("HSV").split()
            turn = round(random.uniform(-policy.hue, policy.hue) * 255)
            hue = Image.fromarray((np.array(hue).astype(np.int16) + turn).astype(np.uint8))  # goes round at 256
            image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
        else:
            strength = {"Brightness": policy.brightness, "Contrast": policy.contrast, "Color": policy.saturation}[step]
            factor = random.uniform(max(0, 1 - strength), 1 + strength)
            image = getattr(ImageEnhance, step)(image).enhance(factor)
    return image


class PlainWSConv2d(nn.Conv2d):
    """Weight standardisation in the operations of its definition: subtract the mean, divide by the deviation."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        deviation = weight.flatten(1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        return self._conv_forward(x, weight / deviation, self.bias)


def _use_plain_layers(half: nn.Module) -> None:
    """Plain weight standardisation, and ReLUs that write a new tensor, in place."""
    for module in half.modules():
        if isinstance(module, WSConv2d):
            module.__class__ = PlainWSConv2d  # type: ignore[assignment]
        elif isinstance(module, nn.ReLU):
            module.inplace = False


class Naive:
    """A module, a momentum copy, an optimiser and a loader for each client, and Python loops over them.

    As the authors' release is organised: every optimiser is zeroed in every step, active client or not, and everybody
    loads the average. The active clients stay the same, so the loop is spared drawing pools; images are decoded
    already; and the random choices are Python's, which is faster than torch's.

    Args:
        plain: with the plain layers below in place of the package's, which are written for speed.
    """

    def __init__(self, config: Config, images: ImageSet, device: torch.device, plain: bool = False) -> None:
        self.config, self.device = config, device
        federation = common.spread(config, images)
        encoder = build(config, federation, device).encoder
        if plain:
            _use_plain_layers(encoder.client)
        policy, held = policy_of(config.augment), federation.partition
        mean, std = encoder.mean.cpu(), encoder.std.cpu()
        self.online = [copy.deepcopy(encoder.client).to(device).train() for _ in range(config.clients.number)]
        self.momentum = [copy.deepcopy(half).requires_grad_(False) for half in self.online]
        self.optimizers = [_sgd(half, config) for half in self.online]
        self.loaders = [
            DataLoader(
                PillowViews(images.images, held.client(client), policy, mean, std),
                batch_size=config.clients.batch,
                shuffle=True,
                drop_last=True,
            )
            for client in range(config.clients.number)
        ]
        self.iterators: dict[int, Iterator] = {}
        self.pool = pool_of_round(config.seed, 0, config.clients.number, config.pool).tolist()
        self.gradient: Tensor | None = None

    def _draw(self, client: int) -> list[Tensor]:
        """Both views of the next batch, (B, 3, S, S) each."""
        try:
            views = next(self.iterators[client])
        except (KeyError, StopIteration):
            self.iterators[client] = iter(self.loaders[client])
            views = next(self.iterators[client])
        return [view.to(self.device) for view in views]

    def step(self) -> int:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        queries, keys = [], []
        tau = self.config.contrast.momentum
        for client in self.pool:
            first, second = self._draw(client)
            with _autocast(self.device, self.config):
                queries.append(self.online[client](first).float())
                with torch.no_grad():
                    pairs = zip(self.momentum[client].parameters(), self.online[client].parameters(), strict=True)
                    for momentum, online in pairs:
                        momentum.mul_(tau).add_(online, alpha=1 - tau)
                    keys.append(self.momentum[client](second).float())
        query = torch.cat(queries).detach()  # what is sent
        torch.cat(keys)
        if self.gradient is None:
            self.gradient = 1e-3 * torch.randn_like(query)
        pieces = self.gradient.split(self.config.clients.batch)
        for client, sent, piece in zip(self.pool, queries, pieces, strict=True):
            sent.backward(piece)
            self.optimizers[client].step()
        return len(query)

    @torch.no_grad()
    def between(self) -> None:
        """Average the active clients' weights; every client loads the average."""
        active = [self.online[client].state_dict() for client in self.pool]
        average = {name: sum(state[name] for state in active) / len(active) for name in active[0]}
        for half in self.online:
            half.load_state_dict(average)


def _sgd(half: nn.Module, config: Config, **options: Any) -> torch.optim.SGD:
    settings = config.train
    return torch.optim.SGD(
        half.parameters(), lr=LR, momentum=settings.momentum, weight_decay=settings.weight_decay, **options
    )


def _autocast(device: torch.device, config: Config) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16")


# Cases

KINDS: dict[str, Any] = {
    "ours": Ours,
    "naive": Naive,
    "naive, plain": partial(Naive, plain=True),
    "one half": partial(OneHalf, memory_format=torch.contiguous_format),
    "one half, channels last": partial(OneHalf, memory_format=torch.channels_last),
}

UNEQUAL = "50 clients, 5 of them with batch 11"
EACH_STEP = "100 clients, averaged after every step"
ONE_HALF = ("one half for all", "one half for all, channels last")


def many(number: int) -> str:
    """Name of the case of N clients."""
    return f"{number:,} clients"


def published(cut: int) -> tuple[str, str, str]:
    """Names of the loops over clients, with plain layers and with ours, and of ours with the same settings."""
    name = f"{1000 if cut == 1 else 100:,} clients as published"
    return f"{name}, loop", f"{name}, loop with our layers", name


def cases(cut: int, numbers: list[int]) -> dict[str, dict[str, Any]]:
    """What is measured at one cut, by name: its kind and its settings."""

    def case(kind: str, number: int, **more: Any) -> dict[str, Any]:
        pool = min(number, IMAGES)
        size = {"clients.number": number, "clients.pool": pool, "clients.batch": IMAGES // pool, "model.cut": cut}
        return {"kind": kind, "settings": size | {name.replace("__", "."): value for name, value in more.items()}}

    unequal = {"clients__batch": 1, "clients__rich_share": 0.1, "clients__rich_batch_factor": 11}
    as_published = {"clients__keep_optimizer": True, "sync__momentum": False}
    loop, tuned, ours = published(cut)
    size = 1000 if cut == 1 else 100
    return {
        **{many(number): case("ours", number) for number in numbers},
        UNEQUAL: case("ours", 50, **unequal),
        EACH_STEP: case("ours", 100, sync__every=1),
        ours: case("ours", size, **as_published),
        tuned: case("naive", size, **as_published),
        loop: case("naive, plain", size, **as_published),
        ONE_HALF[0]: case("one half", 100),
        ONE_HALF[1]: case("one half, channels last", 100),
    }


def configuration(settings: dict[str, Any], changes: dict[str, Any]) -> Config:
    """Settings of a case: of each client one class, so that one image is enough for it."""
    base = {
        "partition.classes_per_client": 1,
        "data.held_out": 0,
        "clients.keep_optimizer": False,
        "clients.round": EVERY,
        "sync.momentum": True,
        "sync.every": EVERY,
    }
    return mocosfl.recipe("cifar10-noniid-1000").updated(base | settings | changes)


def measure(side: ClientSide, steps: int, device: torch.device) -> float:
    """Seconds of one step."""

    def block() -> None:
        for _ in range(steps):
            side.step()

    return seconds(block, device) / steps + seconds(side.between, device) / EVERY


def child(case: dict[str, Any]) -> dict[str, Any]:
    """Peak memory of one case, in a process of its own."""
    device = common.begin(argparse.Namespace(**case["machine"]))
    empty = common.peak_mib(device, lambda: torch.zeros(1, device=device))
    images = common.random_images(case["images"], case["size"])
    with common.kernels_of_training(device):
        side = KINDS[case["kind"]](configuration(case["settings"], case["changes"]), images, device)

        def work() -> None:
            for _ in range(3):
                side.step()
            side.between()

        return {"empty_mib": empty, "peak_mib": common.peak_mib(device, work)}


def start_up(settings: dict[str, Any], changes: dict[str, Any], images: ImageSet, device: torch.device) -> float:
    """Seconds from decoded images to the first step: partition, statistics of the images, models."""
    config = configuration(settings, changes)
    return seconds(lambda: build(config, common.spread(config, images), device), device)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--cuts", type=int, nargs="+", default=[1, 3], help="cuts of the backbone")
    parser.add_argument("--numbers", type=int, nargs="+", default=[10, 100, 1000, 10_000, 100_000], help="N, clients")
    parser.add_argument("--width", type=int, default=64, help="channels of the stem")
    parser.add_argument("--size", type=int, default=32, help="pixels a side of the random images")
    parser.add_argument("--steps", type=int, default=10, help="steps of one repeat")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peaks of memory")
    args = parser.parse_args()
    if bad := [n for n in args.numbers if IMAGES % min(n, IMAGES)]:
        parser.error(f"--numbers {bad[0]}: {IMAGES} images cannot be divided among as many clients")
    args.numbers = sorted({*args.numbers, 100})
    device = common.begin(args)
    changes = {"model.width": args.width, **common.changes(args.set)}
    count = max(1000, *args.numbers)
    images = common.random_images(count, args.size)

    with common.kernels_of_training(device):
        results = {f"cut {cut}": measure_cut(cut, args, changes, images, device) for cut in args.cuts}
    settings = configuration({}, changes)
    common.write(
        "clients",
        args,
        device,
        {
            "images": f"{count} random images of {args.size}x{args.size}",
            "width": settings.model.width,
            "precision": settings.train.precision,
            "changes": changes,
            "steps_of_a_repeat": args.steps,
            "time": f"milliseconds a step, with 1/{EVERY} of what happens every {EVERY} steps",
            "memory": "MiB at the peak of four steps in a fresh process, less those of an empty one; images included",
            "results": results,
        },
    )


def measure_cut(
    cut: int, args: argparse.Namespace, changes: dict[str, Any], images: ImageSet, device: torch.device
) -> dict[str, Any]:
    """Time, memory and start-up of all cases at one cut; prints them."""
    wanted = cases(cut, args.numbers)
    sides: dict[str, ClientSide] = {
        name: KINDS[case["kind"]](configuration(case["settings"], changes), images, device)
        for name, case in wanted.items()
    }
    seen = {name: side.step() for name, side in sides.items()}
    measures = {name: partial(measure, side, args.steps, device) for name, side in sides.items()}
    times = common.in_turn(measures, args.repeats)
    del sides, measures
    starts = common.in_turn(
        {
            many(number): partial(start_up, wanted[many(number)]["settings"], changes, images, device)
            for number in args.numbers
        },
        args.repeats,
    )
    facts = {
        "machine": {"device": args.device, "threads": args.threads},
        "images": len(images),
        "size": args.size,
        "changes": changes,
    }
    memory = {}
    if not args.no_memory:
        memory = {name: common.in_child("benchmarks.clients", case | facts) for name, case in wanted.items()}

    best = min(ONE_HALF, key=lambda name: times[name].median)
    loop, tuned, ours = published(cut)
    ratios: dict[str, Timing] = {
        **{f"{many(n)} / {many(100)}": times[many(n)] / times[many(100)] for n in args.numbers if n != 100},
        f"{UNEQUAL} / {many(100)}": times[UNEQUAL] / times[many(100)],
        f"{loop} / {ours}": times[loop] / times[ours],
        f"{tuned} / {ours}": times[tuned] / times[ours],
        f"{many(100)} / {best}": times[many(100)] / times[best],
        f"{EACH_STEP} / {best}": times[EACH_STEP] / times[best],
    }

    def row(name: str) -> list[object]:
        held = memory.get(name)
        return [
            name,
            seen[name],
            times[name].times(1e3),
            times[name].rate(seen[name]),
            f"{held['peak_mib'] - held['empty_mib']:,.0f}" if held else "",
            starts.get(name, ""),
        ]

    columns = ("client side", "images", "ms a step", "images/s", "peak MiB", "start-up s")
    common.show(f"cut {cut}, median (least to greatest) of {args.repeats}", columns, [row(name) for name in wanted])
    common.show(f"cut {cut}", ("ratio of times", ""), list(ratios.items()))
    return {
        "cases": {
            name: {
                "images_a_step": seen[name],
                "ms_a_step": times[name].times(1e3).facts(),
                "images_per_second": times[name].rate(seen[name]).facts(),
                **({"peak_mib": round(memory[name]["peak_mib"] - memory[name]["empty_mib"])} if memory else {}),
                **({"start_up_seconds": starts[name].facts()} if name in starts else {}),
                "settings": case["settings"],
            }
            for name, case in wanted.items()
        },
        "ratios": {name: ratio.facts() for name, ratio in ratios.items()},
    }


if __name__ == "__main__":
    main()
