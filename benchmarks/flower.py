"""What Flower costs beside gRPC: the same frozen clients, the same run, on the loopback device.

- Flower: a SuperLink and SuperNodes as `docs/flower.md` starts them, one message for many steps.
- gRPC: ``mocosfl serve`` and as many processes of ``mocosfl join``, a message for every step.
- simulated: ``mocosfl train``, for what the arithmetic alone takes.

Every node, client and server is a process of its own; all share this machine's cores. Seconds of a run are those from
the first to the last step (``training_seconds``), waiting for clients between them included; starting processes and
joining are not in them. A round trip is that of a message which asks for latents: from the server's app until its
answer is there and checked.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from benchmarks import common
from mocosfl.config import Config
from mocosfl.data.federation import export, federate
from mocosfl.recipes import recipe

BIN = Path(sys.executable).parent
HOST = "127.0.0.1"
PATIENCE = 120
"""Seconds after which a process that was started or stopped has failed."""


def free_port() -> int:
    with socket.socket() as handle:
        handle.bind((HOST, 0))
        return handle.getsockname()[1]


class Flower:
    """A SuperLink and SuperNodes as processes on the loopback device; none outlives ``stop``.

    Args:
        folder: of logs, and of what Flower keeps.
        simulated: the SuperLink simulates its nodes.
    """

    def __init__(self, folder: Path, simulated: bool = False) -> None:
        self.folder, self.port, self.nodes = folder, free_port(), 0
        home = folder / "flwr"
        home.mkdir(parents=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{HOST}:{self.port}"\ninsecure = true\n'
        )
        paths = [str(common.ROOT / "src"), str(common.ROOT / "device" / "src"), os.environ.get("PYTHONPATH", "")]
        self.environment = os.environ | {
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        }
        self.started: list[psutil.Popen] = []
        kind = ["--simulation"] if simulated else []
        self._start(
            "superlink",
            *("flower-superlink", "--insecure", "--host", HOST, "--port", str(self.port)),
            *("--disable-runtime-dependency-installation", *kind),
        )
        self._listening()

    def _start(self, name: str, *command: str) -> psutil.Popen:
        with (self.folder / f"{name}.log").open("wb") as log:
            process = psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=self.environment, cwd=self.folder)
        self.started.append(process)
        return process

    def _listening(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while True:
            with socket.socket() as handle:
                if handle.connect_ex((HOST, self.port)) == 0:
                    return
            assert self.started[0].poll() is None, (self.folder / "superlink.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def node(self, config: str) -> psutil.Popen:
        """Start a SuperNode.

        Args:
            config: its ``--node-config``.
        """
        self.nodes += 1
        return self._start(
            f"node-{self.nodes}",
            *("flower-supernode", "--insecure", "--superlink", f"{HOST}:{self.port}"),
            *("--host", HOST, "--port", str(free_port()), "--node-config", config),
        )

    def begin(self, settings: Mapping[str, Any], *more: str) -> psutil.Popen:
        """Start `flwr run`, which ends with the run.

        Args:
            settings: the run config.
            more: arguments.
        """
        words = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
        return self._start("run", "flwr", "run", str(common.ROOT), "--stream", "--run-config", " ".join(words), *more)

    @property
    def said(self) -> str:
        """What `flwr run` has printed."""
        return (self.folder / "run.log").read_text(errors="replace")

    def run(self, settings: Mapping[str, Any], *more: str, seconds: float = 3600) -> str:
        """A whole run; returns what was printed."""
        self.begin(settings, *more).wait(seconds)
        return self.said

    def stop(self) -> None:
        """End all processes and those that they have started."""
        family = [one for process in self.started for one in _family(process)]
        for process in reversed(self.started):
            if process.is_running():
                process.send_signal(signal.SIGCONT)
                process.terminate()
        _, left = psutil.wait_procs(family, timeout=5)
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=PATIENCE)


def _family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return [process]


def by_flower(folder: Path, config: Config, parts: list[Path], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A run of Flower's. Args: where to work, the run's settings, each client's images, and the run config."""
    flower = Flower(folder)
    try:
        for client, part in enumerate(parts):
            flower.node(f'data="{part}" client={client}')
        (folder / "run.yaml").write_text(config.to_yaml())
        began = time.monotonic()
        said = flower.run({"recipe": str(folder / "run.yaml"), "out": str(folder / "run"), **settings})
        seconds = time.monotonic() - began
    finally:
        flower.stop()
    return figures(folder / "run", said) | {"command_seconds": seconds}


def by_grpc(folder: Path, config: Config, parts: list[Path], heartbeat: int = 60) -> dict[str, Any]:
    """The same over gRPC."""
    folder.mkdir()
    (folder / "run.yaml").write_text(config.to_yaml())
    port, mocosfl = free_port(), [sys.executable, "-m", "mocosfl"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    log = (folder / "server.log").open("w")
    serve = [*mocosfl, "serve", str(folder / "run.yaml"), "--out", str(folder / "run"), "--listen", f"{HOST}:{port}"]
    began = time.monotonic()
    processes = [
        subprocess.Popen([*serve, "--heartbeat", str(heartbeat)], env=environment, stdout=log, stderr=subprocess.STDOUT)
    ]
    try:
        for client, part in enumerate(parts):
            join = [*mocosfl, "join", f"{HOST}:{port}", "--client", str(client), "--data", str(part)]
            processes.append(subprocess.Popen(join, env=environment, stdout=subprocess.DEVNULL))
        processes[0].wait()
    finally:
        for process in processes:
            process.terminate()
            process.wait()
        log.close()
    return figures(folder / "run", (folder / "server.log").read_text()) | {"command_seconds": time.monotonic() - began}


def simulated(folder: Path, config: Config) -> dict[str, Any]:
    """The same with simulated clients."""
    folder.mkdir()
    (folder / "run.yaml").write_text(config.to_yaml())
    command = [sys.executable, "-m", "mocosfl", "train", str(folder / "run.yaml"), "--out", str(folder / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    began = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return figures(folder / "run", done.stdout) | {"command_seconds": time.monotonic() - began}


def figures(run: Path, said: str) -> dict[str, Any]:
    """Of a run that has ended."""
    assert (run / "result.json").exists(), said
    result = json.loads((run / "result.json").read_text())
    names = ("steps", "training_seconds", "waited_seconds", "round_trip_seconds", "chunks", "failures", "loss")
    names += ("bytes_in", "tensor_bytes_in", "socket_bytes_in")
    found = {name: result[name] for name in names if name in result}
    return found | {"steps_per_second": found["steps"] / found["training_seconds"]}


def main() -> None:
    parser = common.parser(__doc__, repeats=1)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--epochs", type=float, default=60, help="of each run")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 30, 300], help="that one message covers")
    parser.add_argument("--least", type=int, default=4, help="messages of a run: fewer epochs where messages are small")
    args: argparse.Namespace = parser.parse_args()
    device = common.begin(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # or the processes would go on
    base = recipe("digits").updated(
        {
            "clients.number": args.clients,
            "clients.batch": 100 // args.clients,
            "partition.kind": "iid",
            "train.epochs": args.epochs,
            "evaluation.every": 0,
            "evaluation.probe_epochs": 0,
            **common.changes(args.set),
        }
    )
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        federation = federate(base, lambda _: None)
        parts = export(federation, folder / "parts")
        simulated(folder / "half", base.updated({"train.epochs": 0.1}))
        config = base.updated({"clients.frozen": True, "clients.init": str(folder / "half/run")})
        images = len(federation.train_rows)

        def note(title: str, made: dict[str, Any]) -> None:
            results[title] = made
            common.write("flower", args, device, {"clients": args.clients, "results": results})

        note("simulated", simulated(folder / "simulated", config))
        note("gRPC", by_grpc(folder / "grpc", config, parts))
        cases = [(steps, "fp32") for steps in args.steps] + [(args.steps[-1], "int8")]
        for steps, latents in cases:
            length = min(args.epochs, args.least * steps * config.step_images / images)
            own = config.updated({"traffic.latents": latents, "train.epochs": length})
            made = by_flower(folder / f"flower-{steps}-{latents}", own, parts, {"steps": steps})
            note(f"Flower, {steps} steps a message, {latents}", made)
    rows = [
        [
            title,
            made["steps"],
            f"{made['training_seconds']:.1f}",
            f"{made['steps_per_second']:.2f}",
            f"{made['round_trip_seconds']:.1f}" if "round_trip_seconds" in made else "",
            f"{made['waited_seconds']:.1f}" if "waited_seconds" in made else "",
            f"{made.get('bytes_in', made.get('tensor_bytes_in', 0)) / made['steps'] / 1e3:.0f}",
            f"{made['command_seconds']:.0f}",
        ]
        for title, made in results.items()
    ]
    columns = ("how", "steps", "seconds", "steps/s", "round trip s", "waited s", "kB a step", "command s")
    common.show(f"{args.clients} frozen clients, digits, 100 images a step", columns, rows)


if __name__ == "__main__":
    main()
