"""The command line, in processes of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import mocosfl
from mocosfl.cli import main

TINY = [
    *("--model.width", "4", "--model.head", "v1", "--contrast.queue", "64", "--train.warmup", "0"),
    *("--clients.number", "20", "--clients.batch", "2", "--sync.every", "5"),
    *("--evaluation.k", "10", "--evaluation.probe-epochs", "2"),
]


def command(*args: str, **more: object) -> subprocess.CompletedProcess:
    environment = os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "mocosfl", *args], capture_output=True, text=True, env=environment, **more
    )


@pytest.mark.soak
def test_a_real_run_on_digits_learns(tmp_path: Path) -> None:
    """The demo's recipe for a few epochs: a clear margin over the untrained encoder, on the test set."""
    done = command("train", "digits", "--out", "run", "--train.epochs", "20", "--evaluation.every", "10", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["knn"] > result["knn_untrained"] + 5
    assert result["linear_probe"] > 85
    assert f"{result['knn']:.2f} %" in done.stdout
    assert "100, 2 classes each" in done.stdout

    again = command("evaluate", "run", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"{result['linear_probe']:.2f} %" in again.stdout


def test_a_real_run_on_cifar10_learns(tmp_path: Path, cifar10: Path) -> None:
    """2,000 real images, ten epochs of a small network: better than untrained by a clear margin."""
    done = command(
        *("train", "cifar10-small", "--out", "run", "--data.source", str(cifar10), "--data.images", "2000"),
        *("--model.width", "8", "--train.epochs", "10", "--train.lr", "0.12", "--train.precision", "fp32"),
        *("--evaluation.every", "0", "--evaluation.probe-epochs", "0", "--contrast.queue", "1000"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["test_images"] == 2000
    assert result["knn"] > result["knn_untrained"] + 5


LONGER = [*TINY, "--train.epochs", "3", "--train.checkpoint-every", "10", "--train.log-every", "1"]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = command("train", "digits", "--out", str(folder), *LONGER)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.soak
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_goes_on_to_the_same_end(tmp_path: Path, whole_run: Path, stop: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "mocosfl", "train", "digits", "--out", "cut", *LONGER],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    log = tmp_path / "cut/metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and '"step": 25' in log.read_text()):
        time.sleep(0.01)
    process.send_signal(stop)
    _, error = process.communicate(timeout=60)
    if stop is not signal.SIGKILL:
        assert process.returncode == 130
        assert "Go on with: mocosfl train --resume cut" in error
    assert not (tmp_path / "cut/encoder.safetensors").exists()
    resumed = command("train", "--resume", "cut", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming cut at step" in resumed.stdout
    weights = [(folder / "encoder.safetensors").read_bytes() for folder in (whole_run, tmp_path / "cut")]
    assert weights[0] == weights[1]


def test_a_run_is_repeated_from_its_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "digits", "--out", "a", *TINY, "--train.epochs", "0.1"]) == 0
    assert main(["train", "a/config.yaml", "--out", "b"]) == 0
    weights = [(tmp_path / name / "encoder.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_partition_prints_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["partition", "digits", "--clients.number", "12", "--out", "new/split.png"]) == 0
    assert "split.png" in capsys.readouterr().out
    with Image.open(tmp_path / "new/split.png") as picture:
        assert min(picture.size) > 300


def test_recipes_are_listed(capsys: pytest.CaptureFixture) -> None:
    assert main(["recipes"]) == 0
    text = capsys.readouterr().out
    assert "digits" in text
    assert "noniid-1000" in text


def test_help_and_version(capsys: pytest.CaptureFixture) -> None:
    assert main(["--help"]) == 0
    assert main([]) == 2
    assert main(["--version"]) == 0
    text = capsys.readouterr().out
    for word in ("train", "evaluate", "recipes", "partition", f"mocosfl {mocosfl.__version__}"):
        assert word in text
    for name in ("train", "evaluate", "recipes", "partition"):
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"])
        assert stopped.value.code == 0
        assert f"mocosfl {name}" in capsys.readouterr().out


def test_help_needs_no_torch() -> None:
    script = (
        "import sys; from mocosfl.cli import main; main(['--help']); main(['recipes']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["tran"], 2, "unknown command tran; did you mean train?"),
        (["train", "digit"], 1, "unknown recipe digit; did you mean digits?"),
        (["train", "none.yaml"], 1, "cannot read the configuration none.yaml"),
        (["train", "--resume", "nowhere"], 1, "nowhere is not a run"),
        (["train", "--resume=nowhere"], 1, "nowhere is not a run"),
        (["train", "digits", "--resume", "nowhere"], 1, "nowhere is not a run"),
        (["evaluate", "nowhere"], 1, "nowhere is not a run"),
        (["train", "digits", "--partition.classes-per-client", "12"], 1, "the data set has 10 classes"),
        (["train", "digits", "--data.source", "./none"], 1, "data.source=./none"),
        (["train", "digits", "--clients.pool", "700"], 1, "clients.pool=700: there are 100 clients"),
        (["partition", "digits", "--clients.number", "2000"], 1, "clients.number=2000: there are only 1294"),
    ],
)
def test_errors_are_one_message_and_a_status(
    args: list[str],
    status: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(args) == status
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--clients.nunber", "3"], "--clients.number"),
        (["--clients.number", "0"], "clients.number=0"),
        (["--clients.number", "x"], "--clients.number"),
        (["--model.backbone", "vgg"], "resnet18"),
    ],
)
def test_wrong_flags_name_the_setting(flags: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "digits", *flags])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
