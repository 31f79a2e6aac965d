"""What all benchmarks share: arguments, timing, child processes, synthetic images, the loop, and results."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

import mocosfl
from mocosfl.config import Config
from mocosfl.data.federation import Federation, federate
from mocosfl.data.images import ImageSet
from mocosfl.data.partition import partition
from mocosfl.data.sources import Splits
from mocosfl.experiment import build, choose_device, prepared
from mocosfl.trainer import Callback, Trainer

Name = TypeVar("Name")

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
KNOWN = {"cifar10": (50_000, 32, 10), "cifar100": (50_000, 32, 100)}
"""Training images, pixels a side and classes of the sources that random images can stand in for."""

console = Console(highlight=False, soft_wrap=True)

kernels_of_training = prepared
"""Context manager: the kernels that ``mocosfl.train`` asks for on a device (deterministic ones on a GPU)."""


# Arguments


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and leaves the lines of the description as they are."""


def parser(description: str | None, repeats: int = 5, results: str = "--out") -> argparse.ArgumentParser:
    """The arguments that every benchmark has.

    Args:
        description: of the benchmark.
        repeats: unless another number is asked for.
        results: name of the option that says where the results go.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=_Help)
    made.add_argument("--repeats", type=int, default=repeats, help="repeats of each measurement, after one warm-up")
    made.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    made.add_argument("--threads", type=int, help="CPU threads of PyTorch; unset: its own choice")
    made.add_argument(results, dest="json", type=Path, help="file to write; unset: benchmarks/results/NAME-DEVICE.json")
    made.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="settings to change")
    return made


def begin(args: argparse.Namespace) -> torch.device:
    """Set the threads, and choose the device."""
    if args.threads:
        torch.set_num_threads(args.threads)
    return choose_device(args.device)


def changes(pairs: Sequence[str]) -> dict[str, Any]:
    """``["clients.number=1000"]`` as settings by dotted name."""
    split = (pair.split("=", 1) for pair in pairs)
    return {name: yaml.safe_load(value) for name, value in split}


# Timing


@dataclass(frozen=True)
class Timing:
    """One figure, measured several times; the warm-up is left out."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __truediv__(self, other: Timing) -> Timing:
        """Ratio of each repeat to the one measured beside it."""
        return Timing(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))

    def times(self, factor: float) -> Timing:
        """In another unit: milliseconds of seconds with 1,000."""
        return Timing(tuple(value * factor for value in self.values))

    def rate(self, amount: float) -> Timing:
        """``amount`` a second, of seconds that the amount takes."""
        return Timing(tuple(amount / value for value in self.values))

    def facts(self) -> dict[str, float]:
        """For the JSON, to five digits."""
        figures = {"median": self.median, "min": min(self.values), "max": max(self.values)}
        return {name: float(f"{value:.5g}") for name, value in figures.items()}

    def __str__(self) -> str:
        """Median (least to greatest)."""
        return f"{_short(self.median)} ({_short(min(self.values))} to {_short(max(self.values))})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call, until the device has finished it."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(cases: Mapping[Name, Callable[[], float]], repeats: int, warm_up: bool = True) -> dict[Name, Timing]:
    """Measure cases in turn, so that a slow minute of the machine meets all of them.

    Args:
        cases: each measures itself once and returns the figure.
        repeats: rounds. Every other one runs backwards.
        warm_up: begin with a round that does not count.
    """
    values: dict[Name, list[float]] = {name: [] for name in cases}
    for turn in range(0 if warm_up else 1, repeats + 1):
        print("warm-up" if turn == 0 else f"round {turn} of {repeats}", file=sys.stderr)
        for name in list(cases)[:: -1 if turn % 2 else 1]:
            figure = cases[name]()
            if turn > 0:
                values[name].append(figure)
    return {name: Timing(tuple(figures)) for name, figures in values.items()}


# Memory


def in_child(module: str, case: Mapping[str, Any]) -> dict[str, Any]:
    """Call ``module.child(case)`` in a fresh process, whose memory nothing else has touched.

    Args:
        module: such as ``benchmarks.clients``.
        case: passed as JSON.

    Returns:
        What ``child`` returned, by way of JSON.
    """
    code = f"import json, sys, {module} as m; print(json.dumps(m.child(json.loads(sys.argv[1]))))"
    command = [sys.executable, "-c", code, json.dumps(case)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak_mib(device: torch.device, work: Callable[[], object]) -> float:
    """Most memory that this process (on a GPU: its tensors) held during ``work``, in MiB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here; where not allowed, from the start
    work()
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss would also count the parent: Linux hands it on through fork and exec.
        return int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0]) / 2**10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2 ** (20 if sys.platform == "darwin" else 10)


# Images


def random_images(count: int, size: int = 32, classes: int = 10, channels: int = 3) -> ImageSet:
    """Random pixels and labels, equally many a class. What a step costs does not depend on the pixels."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, channels, size, size), dtype=np.uint8)
    return ImageSet(pixels, rng.permutation(np.arange(count) % classes), tuple(map(str, range(classes))))


def spread(config: Config, images: ImageSet) -> Federation:
    """Give images to the clients; the first ``data.held_out`` of them to nobody."""
    assert images.labels is not None
    assert images.classes is not None
    held_out, rows = np.split(np.arange(len(images)), [round(config.data.held_out * len(images))])
    held = partition(
        config.partition,
        config.clients.number,
        rows,
        images.labels[rows],
        len(images.classes),
        config.seed,
        config.clients.batch,
    )
    return Federation(Splits(images, None), rows, held_out, held)


def federation_of(config: Config, source: str | None) -> tuple[Federation, str]:
    """The images of a recipe and who holds them.

    Args:
        config: what to load. Without ``source``, random pixels stand in for data sets that must be downloaded.
        source: where the images are, as ``data.source``.

    Returns:
        The federation, and what the images are, for the results.
    """
    known = KNOWN.get(config.data.source)
    if source is None and known is not None:
        count, size, classes = known
        images = random_images(config.data.images or count, config.data.size or size, classes, config.data.channels)
        return spread(config, images), f"random pixels in place of {config.data.source}: the cost is the same"
    name = config.data.source
    return federate(config.updated({"data.source": source or name}), lambda line: print(line, file=sys.stderr)), name


# The loop


class _Pause(Callback):
    """Stops the loop after so many steps."""

    left = 0

    def after_step(self, trainer: Trainer, metrics: dict[str, Tensor]) -> None:
        self.left -= 1
        trainer.stop = self.left == 0


class Loop:
    """The trainer's loop, some steps at a time; nothing is logged, evaluated or saved.

    Args:
        config, federation, device: as for ``mocosfl.experiment.build``.
        world: the processes of the run, where there are several.
    """

    def __init__(self, config: Config, federation: Federation, device: torch.device, world: Any = None) -> None:
        config = config.updated({"train.epochs": 1e6})  # never ends
        worlds = () if world is None else (world,)
        self.parts = build(config, federation, device, *worlds)
        self.pause = _Pause()
        images = len(federation.train_rows)
        self.trainer = Trainer(config, self.parts.cohort, self.parts.server, images, [self.pause], *worlds)

    def run(self, steps: int) -> None:
        """Train for so many more steps, synchronisation and change of pools included."""
        self.pause.left, self.trainer.stop = steps, False
        self.trainer.run()


def whole_intervals(config: Config, least: int) -> int:
    """Steps, at least so many, after which the clients have been averaged as often as in the long run."""
    every = config.sync.every
    if config.pool < config.clients.number and config.clients.round is not None:
        every = min(every or config.clients.round, config.clients.round)
    return max(1, every) * -(-least // max(1, every))


# Results


def hardware(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    model = []
    with contextlib.suppress(OSError):
        model = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    facts: dict[str, Any] = {
        "cpu": model[0] if model else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "gpus": torch.cuda.device_count(),
            "gpu_gib": round(properties.total_memory / 2**30, 1),
        }
    return facts


def versions() -> dict[str, str | None]:
    """Of everything that decides about speed; the commit where git knows it."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "numpy": np.__version__,
        "mocosfl": mocosfl.__version__,
        "commit": _commit(),
    }


def _commit() -> str | None:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--porcelain", "src") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def kind_of(device: torch.device) -> str:
    """``cpu``, or the GPU's short name: ``h100``."""
    if device.type != "cuda":
        return device.type
    words = re.split(r"[\s-]+", torch.cuda.get_device_name(device).lower())
    return next((word for word in words if re.search(r"\d", word)), "cuda")


def write(name: str, args: argparse.Namespace, device: torch.device, figures: Mapping[str, Any]) -> None:
    """Write the results, with all it takes to judge and repeat them.

    Args:
        name: of the benchmark.
        args: its arguments; ``json`` says where to write.
        device: where it ran.
        figures: what was measured.
    """
    words = [
        Path(word).name if word.startswith(("/", "..")) else word for word in sys.argv[1:]
    ]  # nobody else's folders
    report = {
        "benchmark": name,
        "command": " ".join(["python", "-m", f"benchmarks.{name}", *words]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "repeats": args.repeats,
        "hardware": hardware(device),
        "versions": versions(),
        **figures,
    }
    path = args.json or RESULTS / f"{name}-{kind_of(device)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(f"written: {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(str, row))
    Console(highlight=False, width=160).print(table)
