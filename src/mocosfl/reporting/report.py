"""What a run folder holds, gathered for a page to show. Nothing here draws.

Whatever a run lacks is a ``Missing``, which says why: a run may be under way, may have crashed, or may be of an earlier
version.
"""

from __future__ import annotations

import json
import math
import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mocosfl.config import Config, by_name
from mocosfl.errors import MocosflError
from mocosfl.footprint import traffic
from mocosfl.footprint.plan import Plan
from mocosfl.footprint.traffic import Traffic
from mocosfl.run import ELSEWHERE, Run

T = TypeVar("T")


@dataclass(frozen=True)
class Missing:
    """There is nothing to show.

    Attributes:
        why: a sentence, without its full stop.
    """

    why: str


class Series:
    """The values of one metric, in the order in which they were logged."""

    def __init__(self) -> None:
        self._columns = array("d"), array("d"), array("d")

    def add(self, step: float, epoch: float, value: float) -> None:
        """Append a value."""
        for column, number in zip(self._columns, (step, epoch, value), strict=True):
            column.append(number)

    def __len__(self) -> int:
        return len(self._columns[0])

    @property
    def steps(self) -> NDArray[np.float64]:
        """(n,) steps after which it was logged."""
        return np.array(self._columns[0])

    @property
    def epochs(self) -> NDArray[np.float64]:
        """(n,) the same in epochs."""
        return np.array(self._columns[1])

    @property
    def values(self) -> NDArray[np.float64]:
        """(n,)."""
        return np.array(self._columns[2])


class Metrics:
    """metrics.jsonl by metric. ``update`` reads what was added since; a line that is not whole yet waits.

    Args:
        path: the file; it may not be there yet.

    Attributes:
        series: by name.
        step, epoch, seconds: of the last line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begin()

    def _begin(self) -> None:
        self.series: dict[str, Series] = {}
        self.step, self.epoch, self.seconds = 0, 0.0, 0.0
        self._read = 0  # bytes
        self._file: int | None = None  # which it is: a run that is resumed or made anew has another one

    def update(self) -> None:
        """Read the lines that are new; all of them, if the file has become shorter or is another one.

        Raises:
            OSError: the file is there and cannot be read.
        """
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            found = os.fstat(file.fileno())
            if found.st_size < self._read or found.st_ino != self._file:
                self._begin()
                self._file = found.st_ino
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._read += len(line)
                self._add(line)

    def _add(self, line: bytes) -> None:
        try:
            record = json.loads(line)
        except ValueError:  # cut short by a crash, and written on behind it
            return
        if not isinstance(record, dict):
            return
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        step, epoch, seconds = (numbers.pop(name, None) for name in ("step", "epoch", "seconds"))
        if step is None or epoch is None:
            return
        self.step, self.epoch, self.seconds = int(step), epoch, self.seconds if seconds is None else seconds
        for name, value in numbers.items():
            series = self.series.get(name)
            if series is None:  # setdefault would make one for every value
                series = self.series[name] = Series()
            series.add(step, epoch, value)

    def last(self, name: str) -> float | None:
        """The last value of a metric; None if it was never logged."""
        series = self.series.get(name)
        return None if series is None else float(series.values[-1])


@dataclass(frozen=True)
class Held:
    """Who holds which images.

    Attributes:
        images: (N,) of each client.
        counts: (N, C) of each client and class; None without labels.
        classes: names of the classes.
    """

    images: NDArray[np.int64]
    counts: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Contents:
    """What a run folder holds.

    Attributes:
        path, command, config: the folder, the command that the run is of, its settings.
        settings: the same by dotted name.
        images: of all clients; None before the run has begun.
        steps: of the whole run; None where that is not known yet.
        metrics: of metrics.jsonl.
        result: of result.json.
        evaluation: the figures on the test set, each of evaluation.json or else of result.json.
        privacy: of privacy.json.
        reconstructions: the bytes of reconstructions.png.
        partition: who holds what.
        participation: (N,) images drawn from each client so far.
        counted: bytes between a client of each kind and the server, as ``footprint`` counts them for the whole run.
        measured: bytes that came in and went out across the server's sockets, up to the last line.
        phases: seconds spent in each phase; what is left of the time since the run began is ``other``.
    """

    path: Path
    command: str
    config: Config
    settings: dict[str, Any]
    images: int | None
    steps: int | None
    metrics: Metrics
    result: dict[str, Any] | Missing
    evaluation: dict[str, Any] | Missing
    privacy: dict[str, Any] | Missing
    reconstructions: bytes | Missing
    partition: Held | Missing
    participation: NDArray[np.int64] | Missing
    counted: dict[str, Traffic] | Missing
    measured: tuple[float, float] | None
    phases: dict[str, float] | Missing


UNFINISHED = "the run has not finished: it is under way, was stopped, or has crashed"
EARLIER = "the run was made by an earlier version of mocosfl, or has not come so far"


@dataclass
class Reader:
    """Reads a run folder, again and again while the run is under way: only what has changed is read anew.

    Args:
        path: the folder.
        size: height and width of the images in pixels, where they are known before the run has finished.

    Raises:
        RunError: there is no run.
        SettingError: its configuration cannot be read.
    """

    path: Path
    size: int | None = None
    _known: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.run = Run.open(self.path)
        self.metrics = Metrics(self.run.metrics_file)
        self.settings = by_name(self.run.config)

    def read(self) -> Contents:
        """The folder as it is now.

        Raises:
            OSError: a file is there and cannot be read.
        """
        self.metrics.update()
        facts = self._file("data.json", _json, "")
        facts = {} if isinstance(facts, Missing) else facts
        command = facts.get("kind", "train")
        result = self._file("result.json", _figures, UNFINISHED)
        evaluation = self._file("evaluation.json", _figures, "")
        there = evaluation.why if isinstance(evaluation, Missing) else "knn" in evaluation
        if not there:  # or of other images alone
            evaluation = result
        elif not isinstance(evaluation, Missing) and not isinstance(result, Missing):
            evaluation = result | evaluation  # which may be without a probe
        if not isinstance(evaluation, Missing) and "knn" not in evaluation:
            evaluation = Missing("there were no labelled training and test images to evaluate on")
        alone = Missing("the server pre-trains alone: no client takes part yet")
        clients = command != "pretrain"
        attack = f"the run has not been attacked; mocosfl attack {self.path} does it"
        images = facts.get("images")
        return Contents(
            path=self.path,
            command=command,
            config=self.run.config,
            settings=self.settings,
            images=images,
            steps=self._steps(command, images, result),
            metrics=self.metrics,
            result=result,
            evaluation=evaluation,
            privacy=self._file("privacy.json", _audit, attack),
            reconstructions=self._file("reconstructions.png", Path.read_bytes, attack),
            partition=self._file("partition.npz", _partition, _no_partition(command)) if clients else alone,
            participation=self._file("participation.npy", _participation, EARLIER) if clients else alone,
            counted=self._counted(images) if clients else alone,
            measured=_measured(self.metrics),
            phases=_phases(self.metrics),
        )

    def _file(self, name: str, read: Callable[[Path], T], why: str) -> T | Missing:
        """A file of the run, read again if it has changed."""
        path = self.path / name
        try:
            status = path.stat()
        except FileNotFoundError:
            return Missing(why)
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        if self._known.get(name, (None,))[0] != stamp:
            try:
                self._known[name] = stamp, read(path)
            except (ValueError, KeyError, TypeError, EOFError) as error:  # what damaged files make readers raise
                self._known[name] = stamp, Missing(f"{name} cannot be read ({error or type(error).__name__})")
        return self._known[name][1]

    def _steps(self, command: str, images: int | None, result: dict[str, Any] | Missing) -> int | None:
        if not isinstance(result, Missing) and "steps" in result:
            return int(result["steps"])
        return None if images is None or command == "pretrain" else Plan(self.run.config, images, 0).steps

    def _counted(self, images: int | None) -> dict[str, Traffic] | Missing:
        """Bytes of the whole run, counted once: it takes a moment."""
        found = self._file("encoder.json", lambda path: int(_json(path)["size"]), "")
        size = self.size if isinstance(found, Missing) else found
        key = (images, size)
        if self._known.get("counted", (None,))[0] != key:
            self._known["counted"] = key, _count(self.run.config, images, size)
        return self._known["counted"][1]


def _json(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"expected figures by name, found {type(values).__name__}")
    return values


FIGURES = (
    *("knn_untrained", "knn", "linear_probe", "linear_probe_train", "test_images", "bank_images"),
    *("logistic_probe", "finetune_10", "finetune_1", "alignment", "uniformity"),
    *("steps", "training_seconds", "evaluation_seconds"),
)
"""Of result.json and evaluation.json, what is shown as a number."""


def _figures(path: Path) -> dict[str, Any]:
    """Without those that are null."""
    found = {name: value for name, value in _json(path).items() if value is not None}
    for name in FIGURES:
        if not isinstance(found.get(name, 0), int | float):
            raise ValueError(f"{name}: expected a number, found {found[name]!r}")
    return found


def _audit(path: Path) -> dict[str, Any]:
    report = _json(path)
    for name in ("attacks", "worst", "mean image", "images", "client"):
        report[name]
    return report


def _partition(path: Path) -> Held:
    with np.load(path, allow_pickle=False) as arrays:
        held = Held(arrays["images"])
        if "counts" in arrays:
            held = Held(arrays["images"], arrays["counts"], tuple(str(name) for name in arrays["classes"]))
    clients = len(held.images)
    if held.images.ndim != 1 or not clients:
        raise ValueError(f"images of shape {held.images.shape}: expected (N,)")
    if held.counts is not None and held.counts.shape != (clients, len(held.classes)):
        raise ValueError(f"counts of shape {held.counts.shape}: expected ({clients}, {len(held.classes)})")
    return held


def _participation(path: Path) -> NDArray[np.int64]:
    drawn = np.load(path, allow_pickle=False)
    if drawn.ndim != 1 or not len(drawn):
        raise ValueError(f"shape {drawn.shape}: expected (N,)")
    return drawn


def _no_partition(command: str) -> str:
    if command in ELSEWHERE:
        return "the clients' images stay with them; how many each holds is noted when the run ends"
    return EARLIER


def _count(config: Config, images: int | None, size: int | None) -> dict[str, Traffic] | Missing:
    if images is None:
        return Missing("the run has not begun")
    try:
        plan = Plan.of(config.updated({"data.size": size}) if size else config, images)
        kinds = {"a client": False, "a rich client": True} if config.rich else {"a client": False}
        return {name: traffic.of_client(plan, rich) for name, rich in kinds.items()}
    except MocosflError as error:
        return Missing(f"bytes cannot be counted: {error}")


def _measured(metrics: Metrics) -> tuple[float, float] | None:
    """Bytes in and out. The server counts from zero again when it is started anew."""
    if "socket_bytes_in" not in metrics.series or "socket_bytes_out" not in metrics.series:
        return None
    return (
        float(running_total(metrics.series["socket_bytes_in"].values)[-1]),
        float(running_total(metrics.series["socket_bytes_out"].values)[-1]),
    )


def running_total(counter: NDArray[np.float64]) -> NDArray[np.float64]:
    """What a counter has counted in all, where it begins at zero again whenever it has become smaller."""
    moved = np.diff(counter, prepend=0.0)
    return np.cumsum(np.where(moved < 0, counter, moved))


PHASE = "seconds/"


PHASES = ("clients", "server", "synchronise", "evaluate", "checkpoint")
"""In the order in which they are told; any others follow."""


def _phases(metrics: Metrics) -> dict[str, float] | Missing:
    found = {
        name.removeprefix(PHASE): math.fsum(series.values)
        for name, series in metrics.series.items()
        if name.startswith(PHASE)
    }
    if not found:
        return Missing(f"metrics.jsonl holds no seconds by phase: {EARLIER}")
    rest = metrics.seconds - math.fsum(found.values())
    if rest > 0:
        found["other"] = found.get("other", 0.0) + rest
    return {name: found[name] for name in (*PHASES, *found) if name in found}


def layers(metrics: Metrics) -> Iterator[tuple[str, Series]]:
    """Divergence of each layer, by its name."""
    for name, series in metrics.series.items():
        if name.startswith("divergence/"):
            yield name.removeprefix("divergence/"), series
