"""Many runs from one file, each in a process and a folder of its own: to be stopped, taken up again, and shared.

The file is YAML::

    recipe: cifar10-small        # or config: FILE; neither: the defaults of all settings
    set: {data.images: 5000}     # for all runs
    runs:                        # by name, what each of them changes
      base: {}
      own-queues: {contrast.feature_sharing: false}
    grid: {seed: [0, 1]}         # every run with every combination: base-seed=0, base-seed=1, ...

The folder holds, of the run NAME::

    NAME/          the run folder
    NAME.log       what its process printed
    failed/        the folders and logs of runs that failed, out of the way until they are tried again
    .sweep/        the settings handed to its process, and a lock: who holds it makes the run

Nothing else is kept: what has been done and what remains is read off the folders, so several sweeps, also on several
machines that share the folder, can work at the same one.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path
from types import FrameType
from typing import IO, Any

import yaml

from mocosfl.config import Config, setting_names
from mocosfl.errors import MocosflError, RunError, SettingError, nearest
from mocosfl.files import write_atomically
from mocosfl.recipes import recipe
from mocosfl.run import FAILED, OF_SWEEP, Run, lock
from mocosfl.trust import check_settings, handed_on

COMMAND = (sys.executable, "-m", "mocosfl", "train")
"""Makes or resumes a run."""
KEYS = ("recipe", "config", "set", "runs", "grid")
NAME = re.compile(r"[A-Za-z0-9][\w.=+,-]*")
STOPPED = (130, -signal.SIGTERM, -signal.SIGINT, -signal.SIGKILL)
"""Exit statuses of a run that was told to stop: after Ctrl-C or a SIGTERM; before it could hear that; by force."""
SECONDS = 0.1
"""Between two looks at the processes."""


class State(Enum):
    """Where a run stands."""

    NEW = "not begun"
    BEGUN = "begun"
    FINISHED = "finished"
    FAILED = "failed"
    ELSEWHERE = "being made elsewhere"


# The file


class _Loader(yaml.SafeLoader):
    """YAML in which a name that is there twice is an error: the first of two runs would be lost without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [str(key.value) for key, _ in node.value]
        if twice := {name for name in names if names.count(name) > 1}:
            raise yaml.MarkedYAMLError(problem=f"{min(twice)} is there twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def read(path: str | Path, changes: Mapping[str, Any] | None = None) -> dict[str, Config]:
    """The runs of a sweep's file.

    Args:
        path: the file.
        changes: further settings for all runs, by dotted name; none that the file's runs or grid set.

    Returns:
        The settings of each run by its name, in the order of the file; those of a grid with the last axis fastest.

    Raises:
        SettingError: the file cannot be read, or a name or a setting of any run is not accepted.
    """
    path, changes = Path(path), dict(changes or {})
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise SettingError(f"cannot read the sweep {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingError(f"{path} is not valid YAML: {error}") from error
    values = _mapping(f"{path}", values)
    for key in values:
        if key not in KEYS:
            raise SettingError(
                f"{path}: unknown key {key}; {nearest(str(key), KEYS) or 'there are ' + ', '.join(KEYS)}"
            )
    if "recipe" in values and "config" in values:
        raise SettingError(f"{path}: recipe and config are both there; a sweep begins with one of them")
    runs = {str(name): _changes(f"runs.{name}", found) for name, found in _mapping("runs", values.get("runs")).items()}
    grid = _changes("grid", values.get("grid"))
    for name, choices in grid.items():
        if not isinstance(choices, list) or not choices:
            raise SettingError(f"grid.{name}={choices!r}: expected a list of values")
    if not runs and not grid:
        raise SettingError(f"{path}: there is nothing to run; expected runs, grid or both")
    for name in changes:
        if name in grid or any(name in run for run in runs.values()):
            raise SettingError(f"set={name}: the sweep's own runs or grid set that")
    if "config" in values:
        base = Config.from_yaml(path.parent / str(values["config"]))
    else:
        base = recipe(str(values["recipe"])) if "recipe" in values else Config()
    base = base.updated(_changes("set", values.get("set")) | _known("set", changes))
    return _planned(base, runs or {"": {}}, grid)


def _planned(base: Config, runs: Mapping[str, dict[str, Any]], grid: Mapping[str, list[Any]]) -> dict[str, Config]:
    planned: dict[str, Config] = {}
    wrong: list[str] = []
    for run, own in runs.items():
        for choice in itertools.product(*grid.values()):
            point = dict(zip(grid, choice, strict=True))
            name = "-".join([*([run] if run else []), *(f"{key}={_text(value)}" for key, value in point.items())])
            if both := own.keys() & point.keys():
                wrong.append(f"run {name}: {min(both)} is set by the run and by the grid")
            elif not NAME.fullmatch(name) or name == FAILED or name.endswith(".log"):
                wrong.append(f"run {name}: a name has letters, digits and _ . = + , - and is not {FAILED} or some .log")
            elif name in planned:
                wrong.append(f"run {name}: there are two of that name")
            else:
                try:
                    planned[name] = base.updated(own | point)
                except SettingError as error:
                    wrong.append(f"run {name}: {error}")
    if wrong:
        raise SettingError("\n".join(wrong))
    return planned


def _text(value: Any) -> str:
    """A value as part of a name, as it is written in YAML."""
    if isinstance(value, list):
        return ",".join(map(_text, value))
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _mapping(name: str, values: Any) -> dict[Any, Any]:
    if not isinstance(values, dict | None):
        raise SettingError(f"{name}: expected values by name, found {type(values).__name__}")
    return values or {}


def _changes(name: str, values: Any) -> dict[str, Any]:
    return _known(name, _mapping(name, values))


def _known(name: str, values: Mapping[Any, Any]) -> dict[str, Any]:
    known = setting_names()
    for setting in values:
        if setting not in known:
            inside = next((other for other in known if other.startswith(f"{setting}.")), None)
            hint = f"name one by one, such as {inside}" if inside else nearest(str(setting), known)
            raise SettingError(f"{name}: unknown setting {setting}" + (f"; {hint}" if hint else ""))
    return dict(values)


def assignments(words: Sequence[str]) -> dict[str, Any]:
    """Settings from ``NAME=VALUE``, values as in YAML.

    Raises:
        SettingError: a word is not of that form.
    """
    found = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign:
            raise SettingError(f"set={word}: expected NAME=VALUE, such as data.images=5000")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SettingError(f"set={word}: {value!r} is not a value") from error
    return found


def chosen(runs: Mapping[str, Config], pattern: str | None) -> dict[str, Config]:
    """The runs whose names fit a pattern with ``*`` and ``?``; all, if it is None.

    Raises:
        SettingError: it fits none.
    """
    found = {name: config for name, config in runs.items() if pattern is None or fnmatchcase(name, pattern)}
    if not found:
        raise SettingError(f"only={pattern}: fits none of the {len(runs)} runs, such as {next(iter(runs))}")
    return found


# The folder


class Folder:
    """The folder of a sweep: where its runs stand.

    Args:
        path: it need not exist.
        runs: settings by name.
    """

    def __init__(self, path: str | Path, runs: Mapping[str, Config]) -> None:
        self.path, self.runs = Path(path), runs
        self.failed, self.own = self.path / FAILED, self.path / OF_SWEEP

    def log(self, name: str) -> Path:
        """What a run's process printed."""
        return self.path / f"{name}.log"

    def folder(self, name: str) -> Path:
        """Where a run is, be it apart or not."""
        apart = self.failed / name
        return apart if self.is_apart(name) else self.path / name

    def is_apart(self, name: str) -> bool:
        """Whether a run has failed and has not been tried again since, by a sweep or by hand."""
        if (self.path / name).exists():
            return False
        return (self.failed / f"{name}.log").exists() or (self.failed / name).exists()

    def check(self) -> dict[str, State]:
        """Where all runs stand.

        Raises:
            RunError: folders hold something else than these runs; names all of them.
        """
        states, wrong = {}, []
        for name in self.runs:
            try:
                states[name] = self.state(name)
            except MocosflError as error:
                wrong.append(str(error))
        if wrong:
            raise RunError("\n".join(wrong))
        return states

    def state(self, name: str) -> State:
        """Where a run stands, by what its folder holds.

        Raises:
            RunError: it holds something else.
            SettingError: its configuration cannot be read.
        """
        path = self.folder(name)
        if (path / "config.yaml").exists():
            run = Run.open(path)
            if run.command != "train":
                raise RunError(f"{path} is a run of mocosfl {run.command}, not of a sweep")
            if differ := run.differences(self.runs[name]):
                lines = "\n".join(f"  {line}" for line in differ)
                raise RunError(f"{path} was started with other settings:\n{lines}\ndelete it, or choose another folder")
            if not self.is_apart(name):
                return State.FINISHED if (path / "result.json").exists() else State.BEGUN
        elif not self.is_apart(name):
            Run.check_free(path)
        return State.FAILED if self.is_apart(name) else State.NEW

    def put_apart(self, name: str) -> None:
        """Move a run that failed out of the way, the log last.

        Raises:
            OSError: another one of that name is there, or the folder cannot be written.
        """
        self.failed.mkdir(exist_ok=True)
        for path in (self.path / name, self.log(name)):
            if path.exists():
                path.rename(self.failed / path.name)

    def take_back(self, name: str) -> None:
        """Undo ``put_apart``, to go on from the last checkpoint; the log first, which says that it failed."""
        for path in (self.failed / f"{name}.log", self.failed / name):
            if path.exists():
                path.rename(self.path / path.name)

    def claim(self, name: str) -> IO[bytes] | None:
        """Keep other sweeps from a run while the file given, or a copy that a process was handed, is open.

        Returns:
            None if another sweep has the run, or a process that it left behind, or a user trains in its folder.

        Raises:
            OSError: the folder cannot be written, or its file system has no locks.
        """
        self.own.mkdir(parents=True, exist_ok=True)
        file = (self.own / f"{name}.lock").open("ab")
        try:
            if lock(file) and not Run(self.path / name, self.runs[name]).in_use:
                return file
        except BaseException:
            file.close()
            raise
        file.close()
        return None


# The runs


@dataclass
class _Process:
    """A run that is being made."""

    process: subprocess.Popen[bytes]
    claim: IO[bytes]
    began: float


def sweep(
    runs: Mapping[str, Config],
    out: str | Path,
    *,
    jobs: int = 1,
    threads: int | None = None,
    retry: bool = False,
    dry_run: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, State]:
    """Make the runs that are not made yet.

    Ctrl-C and SIGTERM end all of them after their steps under way; a second one ends them at once.

    Args:
        runs: settings by name.
        out: the folder of the sweep.
        jobs: runs at a time.
        threads: CPU threads of each. Unset: ``OMP_NUM_THREADS``, or else an equal part of the CPU's cores.
        retry: go on with those that failed, too.
        dry_run: look where they stand, and start none.
        say: told what begins and ends.

    Returns:
        Where each run stands at the end.

    Raises:
        SettingError: frozen clients have nothing to start from, or a run names code of the user's that nobody has
            allowed (``mocosfl.trust``).
        RunError: a folder holds another run; nothing has been started then.
        OSError: the folder cannot be used.
    """
    from mocosfl.experiment import check_frozen

    for name, config in runs.items():
        try:
            check_frozen(config, resume=False)
            check_settings(config)
        except SettingError as error:
            raise SettingError(f"run {name}: {error}") from error
    folder = Folder(out, runs)
    states = folder.check()
    if dry_run:
        return states
    to_make = (State.NEW, State.BEGUN, State.FAILED) if retry else (State.NEW, State.BEGUN)
    waiting = [name for name in runs if states[name] in to_make]
    say(f"{len(runs)} runs, {list(states.values()).count(State.FINISHED)} finished, {len(waiting)} to make")
    failed = [name for name in waiting if states[name] is State.FAILED]
    maker = _Maker(folder, jobs, threads, say, failed)
    with maker.told_to_stop():
        maker.make(waiting)
    states = folder.check()  # others may have finished some meanwhile
    for names, state in ((maker.elsewhere, State.ELSEWHERE), (maker.failed, State.FAILED)):
        states |= {name: state for name in names if states[name] in (State.NEW, State.BEGUN)}
    return states


class _Maker:
    """Starts processes and waits for them.

    Args:
        folder: of the runs.
        jobs, threads, say: as of ``sweep``.
        retry: runs to take back from those that failed. Others that are apart when their turn comes have failed in
            another sweep meanwhile, and stay there.

    Attributes:
        elsewhere: runs that others have.
        failed: runs that could not be begun, or not be put apart.
        under_way: those of ours.
        stops: how often we were told to stop.
    """

    def __init__(
        self,
        folder: Folder,
        jobs: int,
        threads: int | None,
        say: Callable[[str], None],
        retry: Sequence[str] = (),
    ) -> None:
        self.folder, self.jobs, self.say, self.retry = folder, jobs, say, retry
        self.elsewhere: set[str] = set()
        self.failed: set[str] = set()
        self.under_way: dict[str, _Process] = {}
        self.stops = 0
        environment = dict(os.environ) | handed_on()
        if threads is not None or "OMP_NUM_THREADS" not in environment:
            environment["OMP_NUM_THREADS"] = str(threads or max(1, (os.cpu_count() or 1) // jobs))
        self.environment = environment

    def make(self, waiting: list[str]) -> None:
        """Make runs until none is left that others do not make."""
        told = 0
        while True:
            for name in list(waiting):
                if self.stops or len(self.under_way) == self.jobs:
                    break
                if self._begin(name):
                    waiting.remove(name)
            if not self.under_way:
                break
            time.sleep(SECONDS)
            if self.stops > told:
                told = self.stops
                self._stop(signal.SIGTERM if told == 1 else signal.SIGKILL)
            for name, made in list(self.under_way.items()):
                if made.process.poll() is not None:
                    del self.under_way[name]
                    with made.claim:
                        try:
                            self._ended(name, made)
                        except (MocosflError, OSError) as error:
                            self._give_up(name, f"ended with status {made.process.returncode}: {error}")

    def _begin(self, name: str) -> bool:
        """Start a run, unless another sweep is at it or has ended it; whether there is nothing left to do for us."""
        claim = self.folder.claim(name)
        if claim is None:
            self.elsewhere.add(name)
            return False
        self.elsewhere.discard(name)
        try:
            process = self._start(name, claim)
        except (MocosflError, OSError) as error:
            self._give_up(name, f"cannot be begun: {error}")
            process = None
        except BaseException:
            claim.close()
            raise
        if process is None:
            claim.close()
        else:
            self.under_way[name] = _Process(process, claim, time.monotonic())
        return True

    def _start(self, name: str, claim: IO[bytes]) -> subprocess.Popen[bytes] | None:
        folder = self.folder
        if folder.is_apart(name):
            if name not in self.retry:  # it has failed in another sweep, since we looked
                return None
            folder.take_back(name)
        state = folder.state(name)
        if state is State.FINISHED:  # by another sweep, since we looked
            return None
        settings, path = folder.own / f"{name}.yaml", str(folder.path / name)
        write_atomically(settings, lambda file: file.write(folder.runs[name].to_yaml().encode()))
        where = ["--resume", path] if state is State.BEGUN else [str(settings), "--out", path]
        command = [*COMMAND, *where]
        self.say(f"{datetime.now():%H:%M:%S} {name}: " + ("goes on" if state is State.BEGUN else "begins"))
        with folder.log(name).open("ab") as log:
            log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} mocosfl train {' '.join(where)}\n".encode())
            log.flush()
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                # if we are killed and the run is not, it still has the claim
                pass_fds=(claim.fileno(),) if os.name == "posix" else (),
                start_new_session=True,  # a terminal's Ctrl-C reaches the runs through us alone
            )

    def _ended(self, name: str, made: _Process) -> None:
        status, folder = made.process.returncode, self.folder
        if status == 0:
            result = Run(folder.path / name, folder.runs[name]).read_json("result.json") or {}
            known = [(word, result.get(key)) for word, key in (("kNN", "knn"), ("probe", "linear_probe"))]
            figures = [f"{word} {value:.2f} %" for word, value in known if value is not None]
            text = ", ".join(["finished", *figures, f"{(time.monotonic() - made.began) / 60:.1f} min"])
        elif status == STOPPED[0] or (self.stops and status in STOPPED):
            text = "stopped; everything up to here is saved"
        else:
            folder.put_apart(name)
            text = f"failed with status {status}; see {folder.failed / name}.log"
        self.say(f"{datetime.now():%H:%M:%S} {name}: {text}")

    def _give_up(self, name: str, why: str) -> None:
        """Leave a run where it is, and go on with the others."""
        self.failed.add(name)
        self.say(f"{datetime.now():%H:%M:%S} {name}: {why}")

    def _stop(self, number: signal.Signals) -> None:
        if number == signal.SIGTERM:
            self.say("stopping: runs end after their steps under way; Ctrl-C again ends them at once")
        for made in self.under_way.values():
            made.process.send_signal(number)

    @contextmanager
    def told_to_stop(self) -> Iterator[None]:
        """Count Ctrl-C and SIGTERM instead of ending; whatever else ends us ends the runs too."""

        def count(number: int, frame: FrameType | None) -> None:
            self.stops += 1

        main = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, count) for number in (signal.SIGINT, signal.SIGTERM) if main}
        try:
            yield
        finally:
            self._end_all()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _end_all(self) -> None:
        """Where an error ends the sweep: none of its runs is left behind."""
        for made in self.under_way.values():
            made.process.terminate()
        for made in self.under_way.values():
            made.process.wait()
            made.claim.close()
