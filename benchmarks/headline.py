"""The headline run, `cifar10-noniid-1000`, and how far it is from what the device could do at best.

Trains and evaluates with ``mocosfl.train`` in a run folder. If the folder holds a run already, that one goes on; with
``--seconds`` the command stops in time, keeps a checkpoint, and ends with status 75: call it again. When the run is
finished, the floor is measured and the result written.

The floor is the time of a step on a device that does nothing but the arithmetic of the networks, or nothing but move
their numbers, whichever takes longer, at the speed that a large matrix product and a large copy reach on it:

    floor = max(FLOPs / measured FLOP/s, bytes / measured bytes/s)

FLOPs are counted by PyTorch: server forward and backward on a real step, and one ordinary client half on the images of
all clients, which is what separate halves need too. Without augmentation and anything elementwise.

Bytes, of A numbers that the convolutions of a half put out, at 2 bytes each in bf16 and 4 in fp32:

    forward    4 A   the convolution writes them; norm and ReLU read and write; the next convolution reads
    backward   7 A   the data gradient is written; norm and ReLU read it and the saved numbers, and write; the
                     convolution reads that twice, for data and for weights, and its saved input

online forward and backward and momentum forward, 15 A; for every weight of server and active clients 8 numbers of 4
bytes (SGD reads weight, gradient and momentum and writes two of them; the moving average reads two and writes one); and
the queue, read forward and backward. Skips, the head and the loss are left out.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mocosfl
from benchmarks import common
from benchmarks.common import seconds
from mocosfl.config import Config
from mocosfl.experiment import build
from mocosfl.run import Run
from mocosfl.trainer import Callback, Trainer

TARGET_SECONDS = 480
"""Of training and evaluation."""

NOT_FINISHED = 75
"""Exit status: a checkpoint is kept, call again (EX_TEMPFAIL)."""


class Deadline(Callback):
    """Stops the training in time.

    Args:
        at: when, on the clock of ``time.monotonic``.
    """

    def __init__(self, at: float) -> None:
        self.at = at

    def after_step(self, trainer: Trainer, metrics: dict[str, Tensor]) -> None:
        trainer.stop = trainer.stop or time.monotonic() > self.at


# The floor


@dataclass(frozen=True)
class Rates:
    """What a device reaches: FLOP/s of a large matrix product, bytes/s of a large copy."""

    flops: common.Timing
    bytes: common.Timing


def rates(device: torch.device, dtype: torch.dtype, repeats: int) -> Rates:
    """Measure a device."""
    size, numbers = (8192, 2**28) if device.type == "cuda" else (2048, 2**26)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.ones(numbers, device=device)  # float32
    target = torch.empty_like(source)
    works = {"product": partial(torch.matmul, a, b), "copy": partial(target.copy_, source)}
    times = common.in_turn({name: partial(seconds, work, device) for name, work in works.items()}, repeats)
    return Rates(times["product"].rate(2 * size**3), times["copy"].rate(2 * 4 * numbers))


def outputs_of_convolutions(network: nn.Module, example: Tensor) -> tuple[int, Tensor]:
    """Numbers that the convolutions of a network put out for one image, and the network's output."""
    count = 0

    def add(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal count
        count += output.numel() // len(output)

    hooks = [m.register_forward_hook(add) for m in network.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        output = network(example)
    for hook in hooks:
        hook.remove()
    return count, output


def floor(config: Config, device: torch.device, repeats: int) -> dict[str, Any]:
    """What one step needs at least, and in which time the device could do that."""
    config = config.updated({"train.compile": "off"})  # PyTorch counts only what it runs op by op
    federation, _ = common.federation_of(config, None)
    bf16 = config.train.precision == "bf16"
    contrast, images = config.contrast, config.step_images
    views = 2 if contrast.both_views else 1  # of which the clients send latents
    ways = 2 if contrast.symmetric else 1
    with common.kernels_of_training(device):
        parts = build(config, federation, device)
        half = copy.deepcopy(parts.encoder.client).to(device).train()
        example = torch.randn(views * images, *federation.splits.train.shape, device=device)
        with FlopCounterMode(display=False) as client:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                latents = half(example)
                with torch.no_grad():
                    half(example)
            latents.backward(torch.ones_like(latents))
        sent = parts.cohort.forward()
        with FlopCounterMode(display=False) as server:
            parts.server.step(sent, config.train.lr)
        in_client, latent = outputs_of_convolutions(half, example[:2])
        in_server, _ = outputs_of_convolutions(parts.server.online, latent)
    measured = rates(device, torch.bfloat16 if bf16 else torch.float32, repeats)
    activations = 15 * (views * images * in_client + ways * images * in_server) * (2 if bf16 else 4)
    client_weights = sum(p.numel() for p in half.parameters())
    server_weights = sum(p.numel() for p in parts.server.online.parameters())
    weights = 8 * 4 * (config.pool * client_weights + server_weights)
    queue = 2 * ways * 4 * parts.server.queue.keys[0].numel()
    flops = client.get_total_flops() + server.get_total_flops()
    moved = activations + weights + queue
    by_flops, by_bytes = flops / measured.flops.median, moved / measured.bytes.median
    return {
        "flops": flops,
        "flops_of_clients": client.get_total_flops(),
        "flops_of_server": server.get_total_flops(),
        "bytes": moved,
        "bytes_of_activations": activations,
        "bytes_of_weights": weights,
        "bytes_of_queue": queue,
        "measured_flop_per_second": measured.flops.facts(),
        "measured_bytes_per_second": measured.bytes.facts(),
        "ms_by_flops": by_flops * 1e3,
        "ms_by_bytes": by_bytes * 1e3,
        "ms": max(by_flops, by_bytes) * 1e3,
    }


def main() -> int:
    start = time.monotonic()
    parser = common.parser(__doc__, repeats=5, results="--json")
    parser.add_argument("--recipe", default="cifar10-noniid-1000", help="what to train")
    parser.add_argument("--out", type=Path, default=Path("runs/headline"), help="run folder; a run in it goes on")
    parser.add_argument("--source", help="where the images are; unset: the recipe's")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop training after so many seconds")
    args = parser.parse_args()
    device = common.begin(args)
    changes = common.changes(args.set)
    source = {"data.source": args.source} if args.source else {}
    config = mocosfl.recipe(args.recipe).updated({"train.device": args.device} | source | changes)

    resume = (args.out / "config.yaml").exists()
    deadline = Deadline(start + args.seconds)
    result = mocosfl.train(config, args.out, resume=resume, callbacks=(deadline,), console=common.console)
    metrics = result.metrics
    if not result.finished:
        print(f"stopped at step {metrics['steps']}; the same command goes on", file=sys.stderr)
        return NOT_FINISHED

    least = floor(config, device, args.repeats)
    steps, training = metrics["steps"], metrics["training_seconds"]
    floor_seconds = least["ms"] / 1e3 * steps
    speeds = [record["images_per_second"] for record in Run.open(result.run).metrics() if "images_per_second" in record]
    figures = {
        "recipe": config.recipe,
        "changes": changes,
        "steps": steps,
        "images_a_step": config.step_images,
        "seconds": training + metrics["evaluation_seconds"],
        "training_seconds": training,
        "target_seconds": TARGET_SECONDS,
        "monitor_seconds": metrics["monitor_seconds"],
        "evaluation_seconds": metrics["evaluation_seconds"],
        "images_per_second": round(steps * config.step_images / training),
        "images_per_second_between_evaluations": round(statistics.median(speeds)),
        "ms_a_step": training / steps * 1e3,
        "floor_seconds": floor_seconds,
        "gap": training / floor_seconds,
        "floor_of_a_step": least,
        "metrics": metrics,
    }
    rows: list[tuple[str, object]] = [
        ("training and evaluation", f"{training + metrics['evaluation_seconds']:.0f} s (target {TARGET_SECONDS} s)"),
        ("of it, kNN on held-out images", f"{metrics['monitor_seconds']:.0f} s"),
        ("of it, evaluation at the end", f"{metrics['evaluation_seconds']:.0f} s"),
        ("images/s", f"{figures['images_per_second']:,}"),
        ("images/s between evaluations", f"{figures['images_per_second_between_evaluations']:,}"),
        ("kNN", f"{metrics['knn']:.2f} %" if "knn" in metrics else "no labels"),
        ("linear probe", f"{metrics['linear_probe']:.2f} %" if "linear_probe" in metrics else "not asked for"),
        ("FLOPs a step", f"{least['flops']:.3g}, {least['ms_by_flops']:.3g} ms"),
        ("bytes a step", f"{least['bytes']:.3g}, {least['ms_by_bytes']:.3g} ms"),
        ("floor", f"{floor_seconds:.3g} s"),
        ("training / floor", f"{figures['gap']:.2f}"),
    ]
    common.show(f"{config.recipe}, {steps} steps of {config.step_images} images", ("", ""), rows)
    common.write("headline", args, device, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
