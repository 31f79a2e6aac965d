"""The folder of a run: what is in it, and how it survives a crash.

::

    config.yaml          every setting; `mocosfl train RUN/config.yaml` repeats the run
    data.json            which images it was trained on: their number, statistics and a checksum
    metrics.jsonl        one line every `train.log_every` steps, and one for each kNN
    tensorboard/         the same for TensorBoard
    checkpoints/         the last two, everything needed to go on
    encoder.safetensors  the trained encoder's weights; encoder.json says how to rebuild it
    head.safetensors     the projection head's weights, for a run that goes on from this one
    partition.npz        images of every client, and of each class where they have labels
    participation.npy    images drawn from every client so far
    seen.npy             fingerprints of the images that the server saw before the clients started
    curve.png            loss, contrast accuracy and kNN over the run
    result.json          the figures at the end; evaluation.json those of `mocosfl evaluate`, and its map as
                         evaluation.png, or evaluation-transfer-SET.png for other images
    events.jsonl         of `mocosfl serve`: joins, refusals, late clients and so on, with client and address
    privacy.json         what `mocosfl attack` found; reconstructions.png shows it
    export/              what `mocosfl export` has written
    report.html          all of it as a page, by `mocosfl report`
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from mocosfl.config import Config
from mocosfl.errors import RunError
from mocosfl.files import remove_unfinished, write_atomically

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CHECKPOINTS_KEPT = 2
FILES = (
    "config.yaml",
    "data.json",
    "metrics.jsonl",
    "tensorboard",
    "checkpoints",
    "encoder.safetensors",
    "encoder.json",
    "head.safetensors",
    "partition.npz",
    "participation.npy",
    "seen.npy",
    "curve.png",
    "result.json",
    "evaluation.json",
    "evaluation.png",
    "privacy.json",
    "reconstructions.png",
    "export",
    "report.html",
    "events.jsonl",
    "events.jsonl.1",
    "events.jsonl.2",
    ".lock",
)
"""What a run writes."""

TRANSFER = "evaluation-transfer"
"""How the names of pictures of other sets begin, which a run holds besides."""

FAILED = "failed"
"""Folder beside runs in which a sweep keeps those that failed, and their logs."""
OF_SWEEP = ".sweep"
"""Folder beside runs in which it keeps the settings that it has handed out, and who is at which run."""

ELSEWHERE = ("serve", "flower")
"""Commands whose clients, and their images, are not in the run's own process."""

RESUMABLE = (
    "train.device",
    "train.compile",
    "train.log_every",
    "train.checkpoint_every",
    "data.memory",
    "evaluation.batch",
)
"""Settings that may differ when a run is resumed: they do not change its numbers (the first two, by rounding alone)."""


class Run:
    """One run folder.

    Args:
        path: the folder.
        config: its settings.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path, self.config = path, config
        self.metrics_file = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self._apart: dict[int, str] = {}  # what checkpoints need besides themselves, by step, as far as is known
        self._written: set[str] = set()  # of those, what this process has written

    @classmethod
    def create(cls, path: str | Path, config: Config, overwrite: bool = False) -> Run:
        """Make a new run folder.

        Args:
            path: must not exist, or be empty.
            config: written into it.
            overwrite: if there is a run at ``path``, delete it first.

        Raises:
            RunError: the folder is in use or cannot be written; nothing has been touched.
        """
        cls.check_free(path, overwrite)
        run = cls(Path(path), config)
        try:
            if (run.path / "config.yaml").exists():
                with run.locked():
                    run._delete()
            elif run.path.exists():
                run._delete()  # what is left of one that was half made or half deleted
            run.path.mkdir(parents=True, exist_ok=True)
            run.write("config.yaml", config.to_yaml())  # first: from here on the folder is a run
        except OSError as error:
            raise RunError(f"cannot write to the run folder {path}: {error.strerror}") from error
        return run

    @staticmethod
    def check_free(path: str | Path, overwrite: bool = False) -> None:
        """Find out, before any work is done, whether ``create`` would accept a folder.

        Raises:
            RunError: it would not.
        """
        path = Path(path)
        try:
            names = {entry.name for entry in path.iterdir()} if path.exists() else set()
        except OSError as error:
            raise RunError(f"cannot write to the run folder {path}: {error.strerror}") from error
        foreign = {
            name
            for name in names - set(FILES)
            if not name.endswith(".tmp") and not (name.startswith(f"{TRANSFER}-") and name.endswith(".png"))
        }
        if foreign:
            raise RunError(
                f"{path} holds files that are not of a run ({', '.join(sorted(foreign)[:3])}); "
                "choose another folder with --out"
            )
        if "config.yaml" in names and not overwrite:
            raise RunError(
                f"{path} already holds a run; continue it with --resume {path}, "
                "replace it with --overwrite, or choose another folder with --out"
            )
        parent = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise RunError(f"cannot write to the run folder {path}: {parent} does not allow it")

    def _delete(self) -> None:
        """Delete what a run writes, the configuration last: until then the folder is a run."""
        for target in (*self.path.glob(f"{TRANSFER}-*.png"), *(self.path / name for name in reversed(FILES))):
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Open an existing run folder.

        Raises:
            RunError: there is no run.
            SettingError: its configuration cannot be read.
        """
        path = Path(path)
        if not (path / "config.yaml").is_file():
            raise RunError(f"{path} is not a run: it has no config.yaml")
        return cls(path, Config.from_yaml(path / "config.yaml"))

    def check_resumable(self, config: Config, command: str = "train") -> None:
        """Make sure that going on with ``config`` continues this run.

        Raises:
            RunError: names the settings that differ, or the command that the run is of.
        """
        if self.command != command:
            made_by = "flwr run" if self.command == "flower" else f"mocosfl {self.command}"
            raise RunError(f"{self.path} is a run of `{made_by}`; resume it with that")
        if differ := self.differences(config):
            lines = "\n".join(f"  {line}" for line in differ)
            raise RunError(
                f"{self.path} was started with other settings:\n{lines}\n"
                "resume it with its own, or start a new run with --out"
            )

    def differences(self, config: Config) -> list[str]:
        """What tells this run's settings from others, a line each; ``RESUMABLE`` ones do not count."""
        ours, theirs = (_flat(c.model_dump(mode="json")) for c in (self.config, config))
        differ = [name for name in ours if ours[name] != theirs[name] and name not in RESUMABLE]
        return [f"{name}: the run has {ours[name]}, not {theirs[name]}" for name in differ]

    def check_data(self, facts: dict[str, Any]) -> None:
        """Note which images the run is trained on; when it is resumed, make sure that they are the same.

        Raises:
            RunError: they are not.
        """
        if self.data_facts() not in (None, facts):
            raise RunError(
                f"data.source={self.config.data.source}: the images are no longer those that {self.path} began "
                "with; start a new run with --out"
            )
        self.write_json("data.json", facts)

    def write_fingerprints(self, numbers: NDArray[np.uint64]) -> None:
        """Keep the fingerprints of images that the server has seen, if any."""
        if len(numbers):
            write_atomically(self.path / "seen.npy", lambda file: np.save(file, numbers))

    def fingerprints(self) -> NDArray[np.uint64]:
        """Of the images that the server saw before the clients started; none where it saw none."""
        path = self.path / "seen.npy"
        return np.load(path) if path.exists() else np.zeros(0, np.uint64)

    def write_partition(
        self, images: NDArray[np.int64], counts: NDArray[np.int64] | None = None, classes: Sequence[str] | None = None
    ) -> None:
        """Note who holds how many images.

        Args:
            images: (N,) of every client.
            counts: (N, C) of every client and class, where there are labels.
            classes: names of the C classes.
        """
        arrays: dict[str, Any] = {"images": images}
        if counts is not None and classes is not None:
            arrays |= {"counts": counts, "classes": np.array(classes)}
        write_atomically(self.path / "partition.npz", lambda file: np.savez_compressed(file, **arrays))

    def write_participation(self, drawn: NDArray[np.int64]) -> None:
        """Note how many images have been drawn from every client, (N,)."""
        write_atomically(self.path / "participation.npy", lambda file: np.save(file, drawn))

    def write(self, name: str, text: str) -> None:
        """Write a text file of the run atomically."""
        write_atomically(self.path / name, lambda file: file.write(text.encode()))

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        """Write a JSON file of the run atomically."""
        self.write(name, json.dumps(values, indent=2, ensure_ascii=False) + "\n")

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Read a JSON file of the run; None if it is not there.

        Raises:
            RunError: it is damaged.
        """
        path = self.path / name
        if not path.exists():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"{path} cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise RunError(f"{path} cannot be read: expected values by name, found {type(values).__name__}")
        return values

    def data_facts(self) -> dict[str, Any] | None:
        """What ``check_data`` noted; None before."""
        return self.read_json("data.json")

    @property
    def command(self) -> str:
        """The command that makes and resumes this run: train, pretrain, serve, or flower for `flwr run`."""
        return (self.data_facts() or {}).get("kind", "train")

    @property
    def clients_elsewhere(self) -> bool:
        """Whether clients were connected, with images of their own, rather than simulated."""
        return self.command in ELSEWHERE

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, in a single write."""
        with self.metrics_file.open("ab") as file:
            file.write((json.dumps(record) + "\n").encode())

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of metrics.jsonl, as far as they can be read: a crash may have cut the last one short."""
        with self.metrics_file.open("rb") as file:
            for line in file:
                try:
                    yield json.loads(line)
                except ValueError:
                    return

    def rewind_metrics(self, step: int) -> None:
        """Drop what was logged after a step: it will be logged again."""
        kept = [json.dumps(record) for record in self.metrics() if record["step"] <= step]
        self.write("metrics.jsonl", "".join(line + "\n" for line in kept))

    def save_checkpoint(
        self, step: int, state: dict[str, Any], apart: tuple[int, dict[str, Any]] | None = None
    ) -> None:
        """Write the state after a step; of the older checkpoints the latest stays.

        Args:
            step: how many there were.
            state: everything needed to go on.
            apart: what is large and changes seldom, and a number that grows when it does: it is only written then.

        Raises:
            OSError: it could not be written; the older ones are untouched.
        """
        try:
            if apart is not None:
                version, large = apart
                path = self.checkpoints / f"apart-{version:09d}.pt"
                if path.name not in self._written:  # one of an earlier process may be damaged, or of another course
                    write_atomically(path, lambda file: torch.save(large, file))
                    self._written.add(path.name)
                state = state | {"apart": path.name}
                self._apart[step] = path.name
            write_atomically(self.checkpoints / f"step-{step:09d}.pt", lambda file: torch.save(state, file))
        except RuntimeError as error:  # how torch.save reports a full disk
            raise OSError(f"cannot write a checkpoint: {error}") from error
        for path in self._files("step")[:-CHECKPOINTS_KEPT]:
            path.unlink()
        kept = [int(path.stem.removeprefix("step-")) for path in self._files("step")]
        if apart is not None and all(step in self._apart for step in kept):  # else we do not know what they need
            needed = {self._apart[step] for step in kept}
            for path in self._files("apart"):
                if path.name not in needed:
                    path.unlink()
                    self._written.discard(path.name)

    def load_checkpoint(self, say: Callable[[str], None]) -> dict[str, Any] | None:
        """The state of the latest checkpoint that can be read, on the CPU; None if there is none.

        Args:
            say: told of those that cannot be read; they are put aside. What was written apart is in the state again.

        Raises:
            RunError: there are checkpoints, and none can be read.
        """
        for path in reversed(self._files("step")):
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
                if "apart" in state:
                    self._apart[int(path.stem.removeprefix("step-"))] = state["apart"]
                    state["apart"] = torch.load(
                        self.checkpoints / state["apart"], map_location="cpu", weights_only=True
                    )
                return state
            except Exception as error:  # whatever a damaged file makes the reader raise
                aside = path.with_suffix(".damaged")
                path.rename(aside)
                reason = str(error).partition("\n")[0] or type(error).__name__
                say(f"{path} cannot be read ({reason}); it is now {aside.name}")
        if any(self.checkpoints.glob("*.damaged")):
            raise RunError(f"no checkpoint of {self.path} can be read; start again with --overwrite")
        return None

    def _files(self, kind: str) -> list[Path]:
        """Checkpoints, or what was written apart from them, the oldest first."""
        return sorted(p for p in self.checkpoints.glob(f"{kind}-*.pt") if re.fullmatch(kind + r"-\d+\.pt", p.name))

    @property
    def latest_step(self) -> int | None:
        """Step of the latest checkpoint."""
        files = self._files("step")
        return int(files[-1].stem.removeprefix("step-")) if files else None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training in the same folder; the lock goes with this process, however it ends.

        Raises:
            RunError: another one is at it, or the folder cannot be written.
        """
        try:
            file = (self.path / ".lock").open("w")
        except OSError as error:
            raise RunError(f"cannot write to the run folder {self.path}: {error.strerror}") from error
        with file:
            if not lock(file):
                raise RunError(f"another process is training in {self.path}")
            self.checkpoints.mkdir(exist_ok=True)
            self.metrics_file.touch()
            remove_unfinished(self.path)
            remove_unfinished(self.checkpoints)
            yield

    @property
    def in_use(self) -> bool:
        """Whether another process is training in the folder."""
        path = self.path / ".lock"
        if not path.exists():
            return False
        with path.open("ab") as file:
            return not lock(file)


def lock(file: IO[Any]) -> bool:
    """Lock a file for as long as it is open here or in a process that was handed it; False if another has locked it.

    Raises:
        OSError: the file system has no locks.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
