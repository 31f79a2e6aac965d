"""The command mocosfl-client, as a user starts it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import trustme
from peers import Commands, eventually, last_figures, lines
from PIL import Image

import mocosfl
from mocosfl.footprint.memory import of_client_in_numpy
from mocosfl.footprint.plan import Plan
from mocosfl_device.cli import main
from tiny import digits

START = """
import sys
from mocosfl_device.start import main
sys.argv[0] = "mocosfl-client"
status = main()
print("imported", *sorted({name.partition(".")[0] for name, module in sys.modules.items() if module is not None}))
sys.exit(status)
"""
"""The command, and then what it has imported."""


@pytest.fixture
def client(start: Commands, tmp_path: Path) -> Callable[..., object]:
    """Starts clients: ``client(port, data, "--client", 0)``."""
    script = tmp_path / "start.py"
    script.write_text(START)
    return lambda port, data, *args: start(f"127.0.0.1:{port}", "--data", data, *args, script=script)


def noise(folder: Path, count: int, size: int = 32) -> Path:
    """A folder of colour images."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(folder / f"{number}.png")
    return folder


def figure(said: str, pattern: str) -> float:
    found = re.search(pattern, said)
    assert found, said
    return float(found[1].replace(",", ""))


DEVICE = {
    "data.size": 32,
    "data.channels": 3,
    "model.width": 64,
    "model.bottleneck": "C4S2",
    "clients.number": 2,
    "clients.batch": 1,
    "contrast.queue": 16,
    "train.epochs": 0.6,
}
"""12 steps of two clients with 20 images each."""


@pytest.mark.parametrize("cut", [1, 3])
def test_a_client_that_learns_fits_a_small_device(
    cut: int, start: Commands, client: Callable[..., object], tmp_path: Path
) -> None:
    """Width 64, C4S2, batch 1, 32x32 images, over TLS."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    own = authority.issue_cert("127.0.0.1")
    own.private_key_pem.write_to_path(tmp_path / "server.key")
    own.cert_chain_pems[0].write_to_path(tmp_path / "server.pem")
    start("enroll", "0-1", "--file", tmp_path / "clients.json", "--out", tmp_path).ends_well()
    secured = ["--tls-cert", tmp_path / "server.pem", "--tls-key", tmp_path / "server.key"]
    config = digits(**DEVICE | {"model.cut": cut})
    server = start.serve(config, *secured, "--clients-file", tmp_path / "clients.json")
    port = server.port()
    clients = [
        client(port, noise(tmp_path / f"images-{c}", 20), "--token-file", tmp_path / f"client-{c}.token", "--tls-ca",
               tmp_path / "ca.pem")
        for c in range(2)
    ]  # fmt: skip
    server.ends_well()
    for one in clients:
        said = one.ends_well()
        assert "12 steps, 12 images" in said
        imported = set(re.search(r"imported (.*)", said)[1].split())
        assert {"numpy", "PIL", "grpc", "mocosfl_device"} <= imported
        assert not imported & {"torch", "pandas", "datasets", "pyarrow", "sklearn", "mocosfl"}
        assert figure(said, r"([\d.]+) MiB the whole process") <= 64
        tensors = figure(said, r"([\d.]+) MB of tensors in a step")
        assert 0.1 < tensors <= (0.5 if cut == 1 else 4.5)
        assert tensors * 1e6 == pytest.approx(of_client_in_numpy(Plan.of(config, images=40)), rel=0.1)
        assert figure(said, r"([\d.]+) s of CPU") > 0
        sent = 12 * 2 * 4 * 1024
        halves = figure(said, r"tensors alone are ([\d.]+) and") * 1e6 - sent
        assert halves > 0  # its half, for the averages
    counted = last_figures(tmp_path / "run")
    assert counted["socket_bytes_in"] == pytest.approx(
        1e6 * sum(figure(one.said, r"traffic: ([\d.]+) MB sent") for one in clients), rel=0.02
    )


def test_a_frozen_half_is_told_by_its_hash(
    start: Commands, client: Callable[..., object], data: Callable[..., Path], tmp_path: Path
) -> None:
    mocosfl.train(digits(**{"train.epochs": 0.05}), tmp_path / "half")
    config = digits(**{"clients.init": str(tmp_path / "half"), "clients.frozen": True, "clients.number": 1})
    server = start.serve(config, "--min-clients", 1)
    port, images = server.port(), data(**{"clients.number": 1}) / "client-0"
    wrong = client(port, images, "--half", "0" * 64)
    assert wrong.end() == 1
    found = re.search(r"half=0{64}: the server hands out another frozen half, ([0-9a-f]{64})", wrong.said)
    assert found, wrong.said
    assert found[1] in server.until("half:    SHA-256 .*")[0]
    assert "0 steps" in wrong.said
    right = client(port, images, "--half", found[1])
    server.ends_well()
    assert f"frozen half, SHA-256 {found[1]}, as asked for" in right.ends_well()


def test_images_that_a_camera_adds_are_used(start: Commands, client: Callable[..., object], tmp_path: Path) -> None:
    spool, later = tmp_path / "spool", noise(tmp_path / "later", 30, 8)
    spool.mkdir()
    changes = {"data.channels": 3, "clients.number": 1, "clients.batch": 2, "train.epochs": 400, "train.log_every": 5}
    server = start.serve(digits(**changes), "--min-clients", 1)
    camera = client(server.port(), spool, "--grows")
    camera.until("waiting for the first image")
    for name in ("0.png", "1.png"):
        shutil.copy(later / name, spool)
    eventually(lambda: last_step(tmp_path) > 20)
    (spool / "2.png").write_bytes(b"half-wri")
    for number in range(3, 30):
        shutil.copy(later / f"{number}.png", spool)
    camera.until(r"2\.png: cannot be decoded .*; left out")
    for name in ("0.png", "1.png"):
        (spool / name).unlink()
    step = last_step(tmp_path)
    eventually(lambda: last_step(tmp_path) > step + 20)  # from the new ones alone
    camera.process.terminate()
    camera.end()
    server.kill()


def last_step(folder: Path) -> int:
    return max((line["step"] for line in lines(folder / "run/metrics.jsonl") if "step" in line), default=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense", "--data", "."], "server=nonsense: expected HOST:PORT"),
        (["127.0.0.1:1", "--data", "/nowhere/at/all"], "data=/nowhere/at/all: there is no such file or folder"),
        (["127.0.0.1:1", "--data", ".", "--half", "xyz"], "half=xyz: expected a SHA-256"),
        (["127.0.0.1:1", "--data", ".", "--tls-cert", "a"], "tls_cert=a and tls_key=None: a certificate needs its key"),
        (["127.0.0.1:1", "--data", ".", "--client", "-3"], "client=-3: clients are numbered from 0"),
    ],
)
def test_bad_settings_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


def test_a_damaged_image_ends_it_or_is_left_out(start: Commands, client: Callable[..., object], tmp_path: Path) -> None:
    server = start.serve(digits(**{"data.channels": 3, "clients.number": 1, "train.epochs": 2}), "--min-clients", 1)
    port, images = server.port(), noise(tmp_path / "images", 20, 8)
    (images / "3.png").write_bytes(b"no image")
    first = client(port, images)
    assert first.end() == 1
    assert re.search(r"error: .*3\.png: cannot be decoded .*--skip-corrupt leaves such images out", first.said)
    second = client(port, images, "--skip-corrupt")
    assert "3.png: cannot be decoded" in second.ends_well()
    assert "with 19 images" in second.said
    server.ends_well()


def test_a_half_that_numpy_cannot_compute_is_named(
    start: Commands, client: Callable[..., object], tmp_path: Path
) -> None:
    server = start.serve(digits(**{"data.channels": 3, "model.client_norm": "batch"}))
    one = client(server.port(), noise(tmp_path / "images", 5, 8))
    assert one.end() == 1
    assert "cannot compute the run's client half" in one.said
    assert "use mocosfl join" in one.said
    server.kill()
