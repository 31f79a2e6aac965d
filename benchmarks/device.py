"""What a client spends on a device: memory, processor time and bytes, of real client processes on the loopback device.

The server is a ``RemoteCohort`` with the client half of the paper's network (ResNet-18 of width 64) and no server half:
the gradient that it returns is the latents. One client at a time, batch 1, over TLS, with an average every 50 steps.
``numpy`` is mocosfl-client, ``torch`` is mocosfl join on one thread. Processor time is that of the whole process, its
start included; memory the most that was resident, as the kernel counts it.

Cases with the latent cache make as many steps as sending takes; the server then lets the client go.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trustme
from PIL import Image

from benchmarks import common
from mocosfl.config import DataSettings
from mocosfl.data.sources import load_unlabelled
from mocosfl.footprint import traffic
from mocosfl.footprint.plan import Plan
from mocosfl.latent_cache import RecallingCohort
from mocosfl.models import build
from mocosfl.network.cohort import RemoteCohort
from mocosfl.network.settings import ServeSettings
from mocosfl.recipes import recipe

FROZEN = {"clients.frozen": True, "clients.init": "elsewhere"}
LEARNING = {"clients.frozen": False}
CASES: dict[str, dict[str, Any]] = {
    "learning, cut 1": LEARNING | {"model.cut": 1},
    "learning, cut 3": LEARNING | {"model.cut": 3},
    "frozen, cut 1": FROZEN | {"model.cut": 1},
    "frozen, cut 3": FROZEN | {"model.cut": 3},
    "frozen, cut 3, int8, V = 32": FROZEN | {"traffic.latents": "int8", "cache.views": 32},
    "frozen, cut 3, int8, V = 64": FROZEN | {"traffic.latents": "int8", "cache.views": 64},
}
IMAGES, SIZE, CHANNELS = 50, 32, 3
"""Of the client, as in the paper's device setting."""


def write_images(folder: Path, source: str | None) -> None:
    """The client's images as PNG files: the first of a source, or noise."""
    if source is None:
        pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, CHANNELS, SIZE, SIZE), np.uint8)
    else:
        images = load_unlabelled(DataSettings(source=source, size=SIZE), lambda _: None)
        pixels = images.gather(np.arange(IMAGES))
    folder.mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{number}.png")


def run(kind: str, changes: Mapping[str, Any], steps: int, folder: Path) -> dict[str, Any]:
    """One client, from its start to its end.

    Args:
        kind: numpy or torch.
        changes: of the settings of ``cifar10-device``.
        steps: of the run; without effect where the latent cache decides.
        folder: with ``images``, ``ca.pem``, ``server.pem`` and ``server.key``.
    """
    base = {"clients.number": 1, "clients.pool": None, "clients.round": None, "sync.every": 50}
    config = recipe("cifar10-device").updated(base | dict(changes))
    model = build(config.model, CHANNELS, SIZE, config.seed)
    listen = ServeSettings(
        listen="127.0.0.1:0", tls_cert=folder / "server.pem", tls_key=folder / "server.key", heartbeat=60
    )
    device = torch.device("cpu")
    remote = RemoteCohort(
        model.client, config, listen, model.latent_shape, CHANNELS, SIZE, device, lambda *_, **__: None
    )
    remote.start()
    command = {"numpy": ["mocosfl_device"], "torch": ["mocosfl", "join"]}[kind]
    client = subprocess.Popen(
        [
            *(sys.executable, "-m", *command, f"127.0.0.1:{remote.exchange.service.port}"),
            *("--data", folder / "images", "--tls-ca", folder / "ca.pem"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    peak = begun = 0.0
    try:
        while not remote.present:
            assert client.poll() is None, client.communicate()[0]
            time.sleep(0.05)
        _, mean, std = remote.gather(1)
        remote.begin(mean, std)
        cohort: Any = remote
        if config.recalls:
            cohort = RecallingCohort(remote, config, remote.images, model.latent_shape, device)
            steps = cohort.schedule.first
        remote.follow(steps, None, lambda: False)
        begun = time.perf_counter()
        for step in range(1, steps + 1):
            latents = cohort.forward()
            if latents.learning:
                cohort.backward(latents.query, 1e-3)
                if step % config.sync.every == 0 or step == steps:
                    cohort.synchronise()
            peak = max(peak, resident(client.pid))
        seconds = time.perf_counter() - begun
    finally:
        remote.stop(True)
    assert client.stdout is not None
    said = client.stdout.read()
    _, client.returncode, spent = os.wait4(client.pid, 0)
    assert client.returncode == 0, said
    length = {} if config.recalls else {"train.epochs": steps / IMAGES}
    planned = traffic.of_client(Plan.of(config.updated(length), images=IMAGES)).socket
    return {
        "steps": steps,
        "seconds": seconds,
        "peak_mib": peak,
        "cpu_seconds": spent.ru_utime + spent.ru_stime,
        "planned_mb": [size / 1e6 for size in planned],
        **figures(said),
    }


def resident(process: int) -> float:
    """Most memory that a process has had resident so far, MiB; 0 where that is not known."""
    with suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process}/status").read_text(encoding="ascii"))
        return int(found[1]) / 1024 if found else 0.0
    return 0.0


def figures(said: str) -> dict[str, float]:
    """What a client says of itself at its end."""
    patterns = {
        "tensors_mb": r"([\d.,]+) MB of tensors in a step",
        "own_peak_mib": r"([\d.,]+) MiB the whole process",
        "sent_mb": r"([\d.,]+) MB sent",
        "received_mb": r"([\d.,]+) MB received",
    }
    found = {name: re.search(pattern, said) for name, pattern in patterns.items()}
    return {name: float(match[1].replace(",", "")) for name, match in found.items() if match}


def main() -> None:
    parser = common.parser(__doc__, repeats=1)
    parser.add_argument("--steps", type=int, default=500, help="of each run")
    parser.add_argument("--source", help="images, as data.source; unset: noise")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="unset: all")
    parser.add_argument("--kinds", nargs="+", choices=("numpy", "torch"), default=["numpy", "torch"])
    args: argparse.Namespace = parser.parse_args()
    device = common.begin(args)
    results: dict[str, dict[str, dict[str, Any]]] = {}
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        authority = trustme.CA()
        own = authority.issue_cert("127.0.0.1")
        authority.cert_pem.write_to_path(folder / "ca.pem")
        own.private_key_pem.write_to_path(folder / "server.key")
        own.cert_chain_pems[0].write_to_path(folder / "server.pem")
        write_images(folder / "images", args.source)
        for case in args.cases or CASES:
            for kind in args.kinds:
                made = run(kind, CASES[case], args.steps, folder)
                results.setdefault(case, {})[kind] = made
                rows.append(
                    [
                        *(case, kind, made["steps"], f"{made['peak_mib']:.1f}"),
                        f"{made['tensors_mb']:.3f}" if "tensors_mb" in made else "",
                        f"{1000 * made['cpu_seconds'] / made['steps']:.1f}",
                        *(f"{made['sent_mb']:.3f}", f"{made['received_mb']:.3f}"),
                        " + ".join(f"{size:.3f}" for size in made["planned_mb"]),
                    ]
                )
                common.write("device", args, device, {"images": IMAGES, "results": results})
    columns = ("client", "kind", "steps", "MiB", "MB tensors", "CPU ms an image", "MB sent", "received", "as planned")
    common.show("one client, ResNet-18 of width 64, C4S2, batch 1, 32x32", columns, rows)


if __name__ == "__main__":
    main()
