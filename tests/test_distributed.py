"""Several processes train as one would."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mocosfl.config import Config
from mocosfl.distributed import World
from mocosfl.errors import SettingError
from mocosfl.experiment import build, federate

sys.path.insert(0, str(Path(__file__).parent))
from rank import train

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(processes: int, *args: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, *args]


def together(processes: int, out: Path, *runs: tuple[dict, int, str | None]) -> list[list[dict]]:
    """What every process ended each run with: changes to the settings, steps, and a file of the state to start from."""
    command = torchrun(processes, str(Path(__file__).parent / "rank.py"), str(out), json.dumps(runs))
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out if rank == 0 else out.with_suffix(f".{rank}")) for rank in range(processes)]


def assert_same(ours: object, theirs: object, where: str = "state") -> None:
    if isinstance(ours, torch.Tensor):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-7, msg=lambda text: f"{where}: {text}")
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for name in ours:
            assert_same(ours[name], theirs[name], f"{where}.{name}")
    elif isinstance(ours, list):
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{where}[{i}]")
    elif ours is None or isinstance(ours, bool | str):
        assert ours == theirs, where
    else:
        assert ours == pytest.approx(theirs, rel=1e-9), where


KEPT = {"clients.keep_optimizer": True, "sync.momentum": False}


CASES = {
    2: [
        {},
        {"clients.pool": 5, "clients.round": 3, "clients.batch": 2, **KEPT},
        {"contrast.feature_sharing": False, "contrast.symmetric": False, "clients.lr_scale": "per_client_mean"},
        {"model.server_norm": "batch", "model.head": "large", "contrast.queue": 20},
        {"clients.rich_share": 0.3, "clients.rich_batch_factor": 3, "contrast.both_views": True},
        {"clients.frozen": True},
        {"sync.average": "median", "clients.pool": 5, "clients.round": 3},
        {"contrast.objective": "simclr", "contrast.both_views": True, "model.server_norm": "batch"},
        {
            "contrast.objective": "mocov3",
            "contrast.predictor": 16,
            "contrast.feature_sharing": False,
            "clients.batch": 2,
        },
        {
            "clients.holds": "network",
            "clients.batch": 4,
            "clients.lr_scale": "per_client_mean",
            "contrast.objective": "byol",
            "contrast.predictor": 16,
            "contrast.both_views": True,
            "contrast.feature_sharing": False,
        },
        {"sync.own": "ema", "clients.pool": 5, "clients.round": 3, "clients.drop": 0.5},
        {"clients.drop": 0.9, "clients.rich_share": 0.3, "clients.rich_batch_factor": 3, "sync.every": 3},
        {"defence.kind": "ressfl", "ressfl.ssim_target": -1, "ressfl.blocks": 1, "ressfl.channels": 8},
    ],
    4: [
        {"clients.pool": 5, "clients.round": 3},
        {"sync.every": 1, "model.cut": 3},
        {"clients.drop": 0.9, "sync.every": 3},
    ],
}


if not os.environ.get("MOCOSFL_SOAK"):
    del CASES[4]  # four processes on two cores wait for each other for a minute


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[list[dict]]]:
    """What all cases ended with, by number of processes: to start processes takes longer than to train so little."""
    folder = tmp_path_factory.mktemp("ends")
    return {
        processes: together(processes, folder / f"{processes}.pt", *((changes, 9, None) for changes in cases))
        for processes, cases in CASES.items()
    }


@pytest.mark.parametrize(
    ("processes", "case"), [(processes, case) for processes in CASES for case in range(len(CASES[processes]))]
)
def test_processes_train_as_one_would(processes: int, case: int, ends: dict[int, list[list[dict]]]) -> None:
    values, state = train(CASES[processes][case], 9, World())
    for of_process in ends[processes]:  # every process ends with the same queue, server, pool and averages
        assert_same(of_process[case]["values"], values, "metrics")
        assert_same(of_process[case]["state"], state)


@pytest.mark.parametrize(
    ("before", "after"),
    [pytest.param(1, 2, marks=pytest.mark.soak), (2, 1), pytest.param(2, 4, marks=pytest.mark.soak)],
)
def test_a_state_of_some_processes_goes_on_with_others(before: int, after: int, tmp_path: Path) -> None:
    changes = {"clients.pool": 5, "clients.round": 3, **KEPT}
    values, state = train(changes, 9, World())
    half = end(before, tmp_path / "half.pt", changes, 4)
    torch.save(half["state"], tmp_path / "state.pt")
    rest = end(after, tmp_path / "end.pt", changes, 9, str(tmp_path / "state.pt"))
    assert_same(half["values"] + rest["values"], values, "metrics")
    assert_same(rest["state"], state)


def end(processes: int, out: Path, changes: dict, steps: int, start: str | None = None) -> dict:
    """What the first process ended one run with."""
    if processes > 1:
        return together(processes, out, (changes, steps, start))[0][0]
    values, state = train(changes, steps, World(), torch.load(start) if start else None)
    return {"values": values, "state": state}


TINY = [
    *("--data.images", "300", "--model.width", "4", "--train.epochs", "6", "--contrast.queue", "256"),
    *("--train.checkpoint-every", "5", "--train.log-every", "5", "--evaluation.every", "2"),
]


def files(run: Path) -> set[str]:
    return {path.name for path in run.iterdir()}


@pytest.mark.soak
def test_the_command_under_torchrun(tmp_path: Path) -> None:
    """One run folder, the same figures as one process, and a clear message when it cannot be used."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    train_it = ["-m", "mocosfl", "train", "digits", *TINY]
    command = torchrun(2, *train_it, "--out", str(run))
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    subprocess.run([sys.executable, *train_it, "--out", str(alone)], env=ENVIRONMENT, check=True, timeout=300)
    assert files(run) == files(alone)
    assert done.stdout.count("run folder:") == 1
    ours, theirs = (json.loads((folder / "result.json").read_text()) for folder in (run, alone))
    assert ours["processes"] == 2
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)  # float32: rounding grows over the steps
    for figure in ("knn", "knn_untrained", "linear_probe"):
        assert ours[figure] == pytest.approx(theirs[figure], abs=6)
    assert ours["knn_untrained"] == theirs["knn_untrained"]

    again = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert again.returncode != 0
    assert again.stderr.count("already holds a run") == 1


@pytest.mark.soak
def test_a_process_that_dies_leaves_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    run = tmp_path / "run"
    changes = [*TINY, "--train.epochs", "400"]
    command = torchrun(2, "-m", "mocosfl", "train", "digits", *changes, "--out", str(run))
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        deadline = time.monotonic() + 200
        while not list(run.glob("checkpoints/step-0000000[1-9]*.pt")):
            assert started.poll() is None, started.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        second = next(pid for pid in children(started.pid) if b"RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
        os.kill(second, signal.SIGKILL)
        _, errors = started.communicate(timeout=120)
    assert started.returncode != 0
    assert "another of the run's 2 processes has ended" in errors
    assert "is safe in" in errors
    resumed = torchrun(2, "-m", "mocosfl", "train", "--resume", str(run))
    with subprocess.Popen(
        resumed, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        for line in started.stdout:
            if line.startswith("resuming"):
                break
        else:
            pytest.fail(started.stderr.read())
        time.sleep(5)
        started.send_signal(signal.SIGINT)  # as Ctrl-C does: every process gets it, and they stop at one step
        _, errors = started.communicate(timeout=120)
    assert "everything up to here is saved" in errors


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_every_process_needs_a_client() -> None:
    config = Config().updated({"clients.number": 3, "partition.kind": "iid"})
    federation = federate(config.updated({"data.images": 100, "data.channels": 1}), lambda _: None)
    own = config.updated({"clients.drop": 0.5, "contrast.feature_sharing": False})
    with pytest.raises(SettingError, match=r"clients\.drop=0\.5: with queues of the clients' own .* needs one process"):
        build(own, federation, torch.device("cpu"), World(1, 2))
    with pytest.raises(SettingError, match=r"clients\.pool=3: each of the run's 4 processes needs an active client"):
        build(config, federation, torch.device("cpu"), World(3, 4))


def test_shares_are_consecutive_and_even() -> None:
    for count in (0, 1, 7, 100):
        for size in (1, 2, 3, 8):
            shares = [World(rank, size).share(count) for rank in range(size)]
            assert [i for share in shares for i in range(share.start, share.stop)] == list(range(count))
            lengths = [share.stop - share.start for share in shares]
            assert max(lengths) - min(lengths) <= 1
            assert lengths == sorted(lengths, reverse=True)


def test_one_process_needs_no_others() -> None:
    world, tensor = World(), torch.arange(6.0)
    assert world.gather(tensor, [6]) is tensor
    world.add([tensor])
    assert torch.equal(tensor, torch.arange(6.0))
    assert world.any(True)
    assert not world.any(False)
    assert world.first(lambda: 3) == world.lead(lambda: 3) == 3
