"""The folder of a run: what is in it, and how it survives a crash.

::

    config.yaml          every setting; `mocosfl train RUN/config.yaml` repeats the run
    metrics.jsonl        one line every `train.log_every` steps, and one for each kNN
    tensorboard/         the same for TensorBoard
    checkpoints/         the last two, everything needed to go on
    encoder.safetensors  the trained encoder's weights; encoder.json says how to rebuild it
    curve.png            loss, contrast accuracy and kNN over the run
    result.json          the figures at the end
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mocosfl.config import Config
from mocosfl.errors import RunError
from mocosfl.files import write_atomically

CHECKPOINTS_KEPT = 2
RESUMABLE = ("train.device", "train.log_every", "train.checkpoint_every", "data.memory", "evaluation.batch")
"""Settings that may differ when a run is resumed: they do not change its numbers."""


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
        path = Path(path)
        try:
            if path.is_dir() and any(path.iterdir()):
                if not (path / "config.yaml").is_file():
                    raise RunError(f"{path} is not empty and not a run; choose another folder with --out")
                if not overwrite:
                    raise RunError(
                        f"{path} already holds a run; continue it with `mocosfl train --resume {path}`, "
                        "replace it with --overwrite, or choose another folder with --out"
                    )
                shutil.rmtree(path)
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
            run = cls(path, config)
            run.write("config.yaml", config.to_yaml())
            run.metrics_file.touch()
        except OSError as error:
            raise RunError(f"cannot write to the run folder {path}: {error.strerror}") from error
        return run

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

    def check_resumable(self, config: Config) -> None:
        """Make sure that going on with ``config`` continues this run.

        Raises:
            RunError: names the settings that differ.
        """
        ours, theirs = (_flat(c.model_dump(mode="json")) for c in (self.config, config))
        differ = [name for name in ours if ours[name] != theirs[name] and name not in RESUMABLE]
        if differ:
            lines = "\n".join(f"  {name}: the run has {ours[name]}, not {theirs[name]}" for name in differ)
            raise RunError(
                f"{self.path} was started with other settings:\n{lines}\n"
                "resume it with its own, or start a new run with --out"
            )

    def write(self, name: str, text: str) -> None:
        """Write a text file of the run atomically."""
        write_atomically(self.path / name, lambda file: file.write(text.encode()))

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        """Write a JSON file of the run atomically."""
        self.write(name, json.dumps(values, indent=2, ensure_ascii=False) + "\n")

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, in a single write."""
        with self.metrics_file.open("ab") as file:
            file.write((json.dumps(record) + "\n").encode())

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line cut short by a crash is left out."""
        with self.metrics_file.open(encoding="utf-8") as file:
            for line in file:
                if not line.endswith("\n"):
                    return
                yield json.loads(line)

    def rewind_metrics(self, step: int) -> None:
        """Drop what was logged after a step: it will be logged again."""
        kept = [json.dumps(record) for record in self.metrics() if record["step"] <= step]
        self.write("metrics.jsonl", "".join(line + "\n" for line in kept))

    def save_checkpoint(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after a step; of the older checkpoints the latest stays.

        Raises:
            OSError: it could not be written; the older ones are untouched.
        """
        try:
            write_atomically(self.checkpoints / f"step-{step:09d}.pt", lambda file: torch.save(state, file))
        except RuntimeError as error:  # how torch.save reports a full disk
            raise OSError(f"cannot write a checkpoint: {error}") from error
        for path in self._checkpoint_files()[:-CHECKPOINTS_KEPT]:
            path.unlink()

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The state of the latest checkpoint that can be read, on the CPU; None if there is none.

        Raises:
            RunError: there are checkpoints, and none can be read.
        """
        files = self._checkpoint_files()
        for path in reversed(files):
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # whatever a damaged file makes the reader raise
                reason = f"{path}: {error}"
        if files:
            raise RunError(f"no checkpoint of {self.path} can be read; {reason}")
        return None

    def _checkpoint_files(self) -> list[Path]:
        return sorted(p for p in self.checkpoints.glob("step-*.pt") if re.fullmatch(r"step-\d+\.pt", p.name))

    @property
    def latest_step(self) -> int | None:
        """Step of the latest checkpoint."""
        files = self._checkpoint_files()
        return int(files[-1].stem.removeprefix("step-")) if files else None

    def check_writable(self) -> None:
        """Find out before hours of work whether results can be written.

        Raises:
            RunError: they cannot.
        """
        if not os.access(self.path, os.W_OK):
            raise RunError(f"cannot write to the run folder {self.path}")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
