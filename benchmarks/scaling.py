"""One run on several processes: milliseconds a step at the same global batch.

Every number of processes is started with torchrun as often as there are repeats, in turn; each start warms up with a
block of steps and times the next one. On a CPU every process has one thread, so there should be a core for each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from functools import partial

import torch

import mocosfl
from benchmarks import common
from benchmarks.common import Loop, seconds
from mocosfl.distributed import joined
from mocosfl.experiment import choose_device


def worker(args: argparse.Namespace) -> None:
    """One process of a run: trains, and the first one prints the seconds of a step."""
    device = choose_device(args.device)
    config = mocosfl.recipe(args.recipe).updated(common.changes(args.set))
    federation, _ = common.federation_of(config, args.source)
    with common.kernels_of_training(device), joined(device) as world:
        loop = Loop(config, federation, device, world)
        loop.run(args.steps)
        time = seconds(lambda: loop.run(args.steps), device) / args.steps
        if world.rank == 0:
            print(json.dumps({"seconds": time, "processes": world.size, "device": str(device)}))


def launch(ranks: int, words: list[str], device: torch.device) -> float:
    """Seconds of a step with so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "benchmarks.scaling", "--worker", *words]
    threads = {"OMP_NUM_THREADS": "1"} if device.type == "cpu" else {}
    done = subprocess.run(
        command, cwd=common.ROOT, env=os.environ | threads, stdout=subprocess.PIPE, text=True, check=True
    )
    facts = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert facts["processes"] == ranks, f"{facts['processes']} processes trained together, not {ranks}"
    return facts["seconds"]


def main() -> None:
    parser = common.parser(__doc__, repeats=3)
    parser.add_argument("--recipe", default="cifar10-small", help="what to train")
    parser.add_argument("--source", help="where the images are; unset: random pixels in place of a download")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes")
    parser.add_argument("--steps", type=int, help="steps of a repeat; unset: 20 or more, whole sync intervals")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    config = mocosfl.recipe(args.recipe).updated(common.changes(args.set))
    args.steps = args.steps or common.whole_intervals(config, 20)
    if args.worker:
        return worker(args)
    device = common.begin(args)
    room = torch.cuda.device_count() if device.type == "cuda" else common.hardware(device)["cores"]
    ranks = [count for count in args.ranks if device.type != "cuda" or count <= room]
    if left_out := sorted({*args.ranks} - {*ranks}):
        common.console.print(f"left out: {left_out} processes, there are {room} GPUs")

    where = "auto" if device.type == "cuda" else device.type  # auto: each process takes a GPU of its own
    words = ["--device", where, "--recipe", args.recipe, "--steps", str(args.steps)]
    words += ["--source", args.source] if args.source else []
    words += ["--set", *args.set] if args.set else []
    launches = {count: partial(launch, count, words, device) for count in ranks}
    times = common.in_turn(launches, args.repeats, warm_up=False)  # every process has warmed up by itself

    first = times[ranks[0]]
    rows = [
        [count, time.times(1e3), time.rate(config.step_images), f"{(first / time).median:.2f}"]
        for count, time in times.items()
    ]
    columns = ("processes", "ms a step", "images/s", f"times as fast as {ranks[0]}")
    common.show(f"{config.recipe}, {config.step_images} images a step, {room} cores or GPUs", columns, rows)
    figures = {
        "recipe": config.recipe,
        "changes": common.changes(args.set),
        "images_a_step": config.step_images,
        "steps_of_a_repeat": args.steps,
        "threads_of_a_process": 1 if device.type == "cpu" else None,
        "cases": [
            {
                "processes": count,
                "more_than_cores_or_gpus": count > room,
                "ms_a_step": time.times(1e3).facts(),
                "images_per_second": time.rate(config.step_images).facts(),
                "speedup": (first / time).facts(),
            }
            for count, time in times.items()
        ],
    }
    return common.write("scaling", args, device, figures)


if __name__ == "__main__":
    main()
