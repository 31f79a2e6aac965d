"""Where the time of a training step goes.

The trainer's loop runs under torch.profiler; the source names its parts with ``record_function``. A part does not
include parts within it. On a GPU the kernels count for the part in which the host launched them, also those that
autograd launches from a thread of its own; the host's time in each part is beside it.

The profiler costs the host time, so the steps are also timed without it. Shares on a CPU are of a step under the
profiler; on a GPU they are the kernels' time in a step without it.
"""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import mocosfl
from benchmarks import common
from benchmarks.common import Loop, Timing, seconds

PARTS = (
    "augment",
    "clients: forward",
    "clients: backward",
    "clients: update",
    "clients: synchronise",
    "server: moving average",
    "server: forward",
    "server: loss",
    "server: backward",
    "server: optimizer",
    "server: queue",
)
OTHER = "other"
KERNELS = {"kernel", "gpu_memcpy", "gpu_memset"}


Times = dict[str, float]
"""Time of each part, by name."""


def timeline(ranges: Iterable[tuple[float, float, str]]) -> list[tuple[float, str]]:
    """The innermost range at every moment.

    Args:
        ranges: start, end and name of each; one lies within another or beside it.

    Returns:
        When each stretch begins, in ascending order, and the name of its range; ``OTHER`` where there is none.
    """
    line: list[tuple[float, str]] = [(-inf, OTHER)]
    open_: list[tuple[float, str]] = []  # ends and names, the outermost first

    def close(until: float) -> None:
        while open_ and open_[-1][0] <= until:
            end, _ = open_.pop()
            line.append((end, open_[-1][1] if open_ else OTHER))

    for start, end, name in sorted(ranges, key=lambda r: (r[0], -r[1])):
        close(start)
        open_.append((end, name))
        line.append((start, name))
    close(inf)
    return line


def parts_of(events: list[dict[str, Any]]) -> tuple[Times, Times]:
    """Microseconds of host and of device in each part, from a trace of the profiler."""
    ranges = [
        (event["ts"], event["ts"] + event["dur"], event["name"])
        for event in events
        if event.get("cat") == "user_annotation" and event["name"] in PARTS
    ]
    line = timeline(ranges)
    host: Times = defaultdict(float)
    for (start, name), (end, _) in pairwise(line):
        if name != OTHER:
            host[name] += end - start

    device: Times = defaultdict(float)
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    starts = [start for start, _ in line]
    for event in events:
        if event.get("cat") in KERNELS:
            when = launched.get(event["args"].get("correlation"), -inf)
            device[line[bisect_right(starts, when) - 1][1]] += event["dur"]
    return host, device


def profiled(loop: Loop, steps: int, device: torch.device) -> tuple[float, Times, Times]:
    """Milliseconds a step under the profiler, and of host and device in each part."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        wall = seconds(lambda: loop.run(steps), device)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        host, on_device = parts_of(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"])
    host, on_device = ({name: time / 1e3 / steps for name, time in times.items()} for times in (host, on_device))
    return wall / steps * 1e3, host, on_device


def main() -> None:
    parser = common.parser(__doc__, repeats=3)
    parser.add_argument("--recipe", default="cifar10-small", help="what to train; also cifar10-noniid-1000")
    parser.add_argument("--source", help="where the images are; unset: random pixels in place of a download")
    parser.add_argument("--steps", type=int, help="steps of a repeat; unset: 10 or more, whole sync intervals")
    args = parser.parse_args()
    device = common.begin(args)
    config = mocosfl.recipe(args.recipe).updated(common.changes(args.set))
    steps = args.steps or common.whole_intervals(config, 10)
    federation, images = common.federation_of(config, args.source)

    with common.kernels_of_training(device):
        loop = Loop(config, federation, device)
        loop.run(steps)
        profiled(loop, steps, device)  # warm-up
        plain, walls, hosts, devices = [], [], [], []
        for _ in range(args.repeats):
            plain.append(seconds(lambda: loop.run(steps), device) / steps * 1e3)
            wall, host, on_device = profiled(loop, steps, device)
            walls.append(wall)
            hosts.append(host | {OTHER: wall - sum(host.values())})
            devices.append(on_device)
    cuda = device.type == "cuda"
    wall_ms, plain_ms = Timing(tuple(walls)), Timing(tuple(plain))
    if not any(part in host for host in hosts for part in PARTS):
        common.console.print("no parts found: the source has no record_function ranges of these names")

    rows: list[list[object]] = []
    facts = []
    for part in (*PARTS, OTHER):
        host_ms, device_ms = (Timing(tuple(times.get(part, 0) for times in many)) for many in (hosts, devices))
        share = device_ms / plain_ms if cuda else host_ms / wall_ms
        rows.append([part, host_ms, *([device_ms] if cuda else []), f"{share.median:.1%}"])
        fact: dict[str, Any] = {"part": part, "host_ms": host_ms.facts(), "share": share.facts()}
        facts.append(fact | ({"device_ms": device_ms.facts()} if cuda else {}))
    if cuda:
        idle = Timing(tuple(wall - sum(times.values()) for wall, times in zip(plain, devices, strict=True)))
        rows.append(["device waits for the host", "", idle, f"{(idle / plain_ms).median:.1%}"])
        facts.append({"part": "device waits for the host", "device_ms": idle.facts()})
    columns = ["part", "host ms a step", *(["device ms a step"] if cuda else []), "share of the step"]
    common.show(f"{config.recipe}: {config.step_images} images a step", columns, rows)
    common.console.print(f"a step takes {plain_ms} ms, and {wall_ms} ms under the profiler\nimages: {images}")
    figures = {
        "recipe": config.recipe,
        "changes": common.changes(args.set),
        "images": images,
        "images_a_step": config.step_images,
        "steps_of_a_repeat": steps,
        "unit": "milliseconds a step",
        "share": "kernels' time of the unprofiled step" if cuda else "host's time of the profiled step",
        "ms_a_step": plain_ms.facts(),
        "ms_a_step_profiled": wall_ms.facts(),
        "cases": facts,
    }
    common.write("step", args, device, figures)


if __name__ == "__main__":
    main()
