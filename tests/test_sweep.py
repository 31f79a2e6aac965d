"""Sweeps. In most tests a script takes the place of `mocosfl train`, and only leaves the files that tell how far it is.
One makes real runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tests.tiny import DIGITS

from mocosfl import sweep as sweeps
from mocosfl import trust
from mocosfl.cli import main
from mocosfl.config import Config
from mocosfl.errors import RunError, SettingError
from mocosfl.sweep import State, assignments, chosen, read, sweep

ROOT = Path(__file__).resolve().parents[1]

STAND_IN = """
import os, shutil, signal, sys, time
resumed = sys.argv[1] == "--resume"
out = sys.argv[2] if resumed else sys.argv[3]
name = os.path.basename(out)
with open(os.path.dirname(out) + "/made.txt", "a") as file:
    file.write(name + (" resumed" if resumed else "") + "\\n")
print("this is", name, flush=True)
if not resumed:
    if name.startswith("early"):
        sys.exit("error: there is no such data")
    os.makedirs(out + "/checkpoints")
    shutil.copy(sys.argv[1], out + "/config.yaml")
def stop(*_):
    open(out + "/checkpoints/step-000000007.pt", "w").close()
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
if name.startswith("bad") and not os.path.exists("mended"):
    sys.exit("error: no luck")
open(out + "/under-way.tmp", "w").close()
while name.startswith("slow") and not os.path.exists("go"):
    time.sleep(0.01)
with open(out + "/result.json", "w") as file:
    file.write('{"knn": 50.0}')
os.remove(out + "/under-way.tmp")
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs whose names begin with `slow` wait for a file `go`, those with `bad` fail until there is one `mended`."""
    script = tmp_path / "train.py"
    script.write_text(STAND_IN, encoding="utf-8")
    monkeypatch.setattr(sweeps, "COMMAND", (sys.executable, "-S", str(script)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def runs_of(*names: str) -> dict[str, Config]:
    return {name: Config(seed=place) for place, name in enumerate(names)}


def made(out: Path) -> list[str]:
    return (out / "made.txt").read_text().splitlines()


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# The file


def written(path: Path, values: object) -> Path:
    file = path / "sweep.yaml"
    file.write_text(values if isinstance(values, str) else yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return file


def test_a_file_gives_every_run_with_every_combination(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        {
            "recipe": "cifar10-small",
            "set": {"data.images": 5000},
            "runs": {"base": None, "own": {"contrast.feature_sharing": False}},
            "grid": {"seed": [0, 1], "augment.crop_scale": [[0.2, 1.0], None]},
        },
    )
    runs = read(file, {"train.lr": 0.01})
    assert list(runs) == [
        *(f"base-seed={seed}-augment.crop_scale={crop}" for seed in (0, 1) for crop in ("0.2,1.0", "null")),
        *(f"own-seed={seed}-augment.crop_scale={crop}" for seed in (0, 1) for crop in ("0.2,1.0", "null")),
    ]
    for name, config in runs.items():
        assert (config.recipe, config.data.images, config.train.lr) == ("cifar10-small", 5000, 0.01)
        assert config.contrast.feature_sharing == name.startswith("base")
        assert config.seed == int(name[name.index("seed=") + 5])
        assert config.augment.crop_scale == (None if name.endswith("null") else (0.2, 1.0))
    assert list(chosen(runs, "own-*null")) == [f"own-seed={seed}-augment.crop_scale=null" for seed in (0, 1)]


def test_a_grid_alone_and_a_configuration_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("train: {epochs: 3}\n", encoding="utf-8")
    runs = read(written(tmp_path, {"config": "mine.yaml", "grid": {"sync.every": [1, 10]}}))
    assert {name: (c.sync.every, c.train.epochs) for name, c in runs.items()} == {
        "sync.every=1": (1, 3),
        "sync.every=10": (10, 3),
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"runs": {"a": {"sync.evry": 1}}}, "runs.a: unknown setting sync.evry; did you mean sync.every"),
        ({"runs": {"a": {"sync": {"every": 1}}}}, "runs.a: unknown setting sync; name one by one, such as sync.every"),
        ({"runs": {"a": {"sync.every": -1}, "b": {"seed": -1}}}, r"run a: sync.every=-1: .*\nrun b: seed=-1"),
        ({"runs": {"a": {"clients.pool": 200}}}, "run a: clients.pool=200: there are 100 clients"),
        ({"runs": {"a/b": {}}}, "run a/b: a name has letters"),
        ({"runs": {"failed": {}}}, "run failed: a name"),
        ({"runs": {"a": {"seed": 1}}, "grid": {"seed": [0]}}, "run a-seed=0: seed is set by the run and by the grid"),
        ({"grid": {"seed": [0, 0]}}, "run seed=0: there are two of that name"),
        ({"grid": {"seed": 0}}, "grid.seed=0: expected a list"),
        ({"set": {"seed": 1}}, "there is nothing to run"),
        ({"run": {"a": {}}}, "unknown key run; did you mean runs"),
        ({"runs": ["a"]}, "runs: expected values by name, found list"),
        ({"recipe": "digit", "runs": {"a": {}}}, "unknown recipe digit; did you mean digits"),
        ({"recipe": "digits", "config": "a.yaml", "runs": {"a": {}}}, "recipe and config are both there"),
        ("runs: {a: {}, a: {seed: 1}}", "a is there twice"),
        ("runs: [", "is not valid YAML"),
    ],
)
def test_what_is_not_accepted_is_named(tmp_path: Path, values: object, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        read(written(tmp_path, values))


def test_changes_of_the_command_line(tmp_path: Path) -> None:
    assert assignments(["data.source=/a=b", "augment.crop_scale=[0.5, 1]", "train.compile='off'"]) == {
        "data.source": "/a=b",
        "augment.crop_scale": [0.5, 1],
        "train.compile": "off",
    }
    with pytest.raises(SettingError, match="set=seed: expected NAME=VALUE"):
        assignments(["seed"])
    file = written(tmp_path, {"runs": {"a": {"seed": 1}}})
    with pytest.raises(SettingError, match="set=seed: the sweep's own runs or grid set that"):
        read(file, {"seed": 2})
    with pytest.raises(SettingError, match="set: unknown setting sed; did you mean seed"):
        read(file, {"sed": 2})
    with pytest.raises(SettingError, match="only=b\\*: fits none of the 1 runs, such as a"):
        chosen(read(file), "b*")
    with pytest.raises(SettingError, match="cannot read the sweep"):
        read(tmp_path / "none.yaml")


def test_the_papers_claims_are_a_sweep() -> None:
    runs = read(ROOT / "examples" / "claims.yaml")
    assert runs["base"].contrast.feature_sharing
    assert not runs["own-queues"].contrast.feature_sharing
    assert {config.data.source for config in runs.values()} == {"cifar10"}
    assert len({config.to_yaml() for config in runs.values()}) == len(runs)


# The folder


def test_what_is_finished_is_skipped_and_what_failed_is_kept_apart(stand_in: Path) -> None:
    out, runs = stand_in / "out", runs_of("a", "bad", "early", "b")
    said: list[str] = []
    failed = {"bad": State.FAILED, "early": State.FAILED}
    expected = {"a": State.FINISHED, "b": State.FINISHED} | failed
    assert sweep(runs, out, jobs=2, say=said.append) == expected
    assert sorted(made(out)) == ["a", "b", "bad", "early"]
    assert said[0] == "4 runs, 0 finished, 4 to make"
    assert any("a: finished, kNN 50.00 %" in line for line in said)
    assert any("bad: failed with status 1" in line for line in said)
    assert "this is a" in (out / "a.log").read_text()
    assert (out / "failed" / "bad.log").read_text().endswith("error: no luck\n")
    assert (out / "failed" / "bad" / "config.yaml").exists()
    assert not (out / "bad").exists()
    assert (out / "failed" / "early.log").read_text().endswith("error: there is no such data\n")

    assert sweep(runs, out) == expected  # once more: nothing is left to do
    assert len(made(out)) == 4
    assert sweep(runs | runs_of("a", "c"), out)["c"] is State.FINISHED  # a run more
    assert made(out)[4:] == ["c"]

    (stand_in / "mended").touch()
    assert sweep(runs, out, retry=True)["bad"] is State.FINISHED
    assert sorted(made(out)[5:]) == ["bad resumed", "early"]
    assert "no luck" in (out / "bad.log").read_text()  # the log goes on
    assert not (out / "failed" / "bad").exists()


def test_a_folder_with_other_settings_ends_it_before_anything_begins(stand_in: Path) -> None:
    out = stand_in / "out"
    sweep(runs_of("a", "b"), out)
    changed = {"new": Config(), "a": Config(seed=3), "b": Config(seed=4).updated({"sync.every": 7})}
    with pytest.raises(RunError) as wrong:
        sweep(changed, out)
    message = str(wrong.value)
    assert "a was started with other settings:\n  seed: the run has 0, not 3" in message
    assert "seed: the run has 1, not 4" in message
    assert "sync.every: the run has 50, not 7" in message
    (out / "new").mkdir()
    (out / "new" / "holiday.jpg").touch()
    with pytest.raises(RunError, match=r"holds files that are not of a run \(holiday.jpg\)"):
        sweep({"new": Config()}, out)
    with pytest.raises(SettingError, match="run frozen: clients\\.frozen=True"):
        sweep({"frozen": Config().updated({"clients.frozen": True})}, out)
    assert made(out) == ["a", "b"]


def test_settings_that_a_folder_does_not_know_have_their_defaults(stand_in: Path) -> None:
    """Of a run that an earlier version made; and settings that change no numbers may differ."""
    out, runs = stand_in / "out", runs_of("a")
    sweep(runs, out)
    file = out / "a" / "config.yaml"
    values = yaml.safe_load(file.read_text())
    del values["sync"]["average"], values["cache"]
    file.write_text(yaml.safe_dump(values))
    other = {"a": runs["a"].updated({"train.log_every": 3, "train.device": "cpu"})}
    assert sweep(other, out) == {"a": State.FINISHED}
    assert made(out) == ["a"]


@pytest.fixture
def stopped(stand_in: Path) -> Path:
    """A sweep of `a`, `slow-b` and `slow-c`, two at a time, that was told to stop when the first had finished."""
    out, runs = stand_in / "out", runs_of("a", "slow-b", "slow-c")

    def interrupt() -> None:
        until(lambda: all((out / name / "under-way.tmp").exists() for name in ("slow-b", "slow-c")))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert sweep(runs, out, jobs=2) == {"a": State.FINISHED, "slow-b": State.BEGUN, "slow-c": State.BEGUN}
    thread.join()
    return out


def test_an_interrupted_sweep_goes_on(stopped: Path) -> None:
    assert (stopped / "slow-b" / "checkpoints" / "step-000000007.pt").exists()
    assert not (stopped / "failed").exists()
    Path("go").touch()
    assert set(sweep(runs_of("a", "slow-b", "slow-c"), stopped).values()) == {State.FINISHED}
    assert made(stopped)[3:] == ["slow-b resumed", "slow-c resumed"]


def test_two_sweeps_share_the_runs(stand_in: Path) -> None:
    out, runs = stand_in / "out", runs_of("slow-a", "b", "c", "d", "e")
    found: dict[str, dict[str, State]] = {}
    first = threading.Thread(target=lambda: found.update(first=sweep(runs, out)))
    first.start()
    until(lambda: (out / "slow-a" / "under-way.tmp").exists())
    others = [threading.Thread(target=sweep, args=(runs, out)) for _ in range(2)]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    assert sorted(made(out)) == ["b", "c", "d", "e", "slow-a"]
    assert sweep(runs, out)["slow-a"] is State.ELSEWHERE
    Path("go").touch()
    first.join()
    assert set(found["first"].values()) == {State.FINISHED}
    assert sorted(made(out)) == ["b", "c", "d", "e", "slow-a"]


def test_what_fails_in_another_sweep_is_not_tried_again(stand_in: Path) -> None:
    """`bad` is another sweep's while ours begins, and has failed there when its turn comes."""
    out, runs = stand_in / "out", runs_of("bad", "b")
    theirs = sweeps.Folder(out, runs)
    claim = theirs.claim("bad")
    assert claim is not None

    def fail(text: str) -> None:
        if "b: finished" in text:
            theirs.log("bad").write_text("error: no luck\n")
            theirs.put_apart("bad")
            claim.close()

    states = sweep(runs, out, say=fail)
    assert claim.closed
    assert states == {"bad": State.FAILED, "b": State.FINISHED}
    assert made(out) == ["b"]
    assert sweep(runs, out, retry=True)["bad"] is State.FAILED
    assert made(out) == ["b", "bad"]


def test_what_another_sweep_has_just_claimed_is_not_in_the_table(
    stand_in: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(stand_in, {"runs": {"a": {}, "b": {"seed": 1}}})
    claim = sweeps.Folder("out", read(file)).claim("a")
    assert claim is not None
    with claim:
        assert main(["sweep", str(file), "--out", "out"]) == 0
    told = capsys.readouterr()
    assert "under way elsewhere: a" in told.err
    assert [line.split()[0] for line in told.out.splitlines() if line.strip()][-1] == "b"


def test_a_run_made_by_hand_beside_one_that_failed_counts(stand_in: Path) -> None:
    """It is gone on with; when it fails, it cannot be put apart, and the other runs are made all the same."""
    out, runs = stand_in / "out", runs_of("bad", "b", "c")
    sweep(chosen(runs, "bad"), out)
    shutil.copytree(out / "failed" / "bad", out / "bad")
    (out / "c.log").mkdir(parents=True)  # c cannot be begun
    said: list[str] = []
    states = sweep(runs, out, retry=True, say=said.append)
    assert states == {"bad": State.FAILED, "b": State.FINISHED, "c": State.FAILED}
    assert any("bad: ended with status 1: " in line and "failed/bad" in line for line in said)
    assert any("c: cannot be begun: " in line for line in said)
    (stand_in / "mended").touch()
    (out / "c.log").rmdir()
    assert set(sweep(runs, out).values()) == {State.FINISHED}
    assert made(out) == ["bad", "bad resumed", "b", "bad resumed", "c"]
    assert "no luck" in (out / "failed" / "bad.log").read_text()  # what is there is not touched


def test_a_run_outlives_its_sweep_and_nobody_makes_it_twice(stand_in: Path) -> None:
    """kill -9 of a sweep leaves its run, which still has the claim."""
    out, runs = stand_in / "out", runs_of("slow-a")
    script = (
        "import sys; from pathlib import Path; from mocosfl import sweep as s; from mocosfl.config import Config\n"
        f"s.COMMAND = {sweeps.COMMAND!r}\n"
        "f = s.Folder('out', {'slow-a': Config(seed=0)}); m = s._Maker(f, 1, None, print); m.make(['slow-a'])"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    until(lambda: (out / "slow-a" / "under-way.tmp").exists())
    process.kill()
    process.wait()
    assert sweep(runs, out) == {"slow-a": State.ELSEWHERE}
    Path("go").touch()
    until(lambda: not (out / "slow-a" / "under-way.tmp").exists())
    until(lambda: sweep(runs, out) == {"slow-a": State.FINISHED})
    assert made(out) == ["slow-a"]


def test_a_folder_in_which_somebody_trains_is_left_alone(stopped: Path) -> None:
    runs = runs_of("a", "slow-b", "slow-c")
    Path("go").touch()
    with sweeps.Run(stopped / "slow-b", runs["slow-b"]).locked():
        states = sweep(runs, stopped)
    assert states == {"a": State.FINISHED, "slow-b": State.ELSEWHERE, "slow-c": State.FINISHED}


@pytest.mark.soak
def test_a_real_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path, {"set": DIGITS, "runs": {"good": {}, "left": {"partition.kind": "classes"}}})
    assert main(["sweep", str(file), "--out", "out", "--dry-run"]) == 0
    assert not Path("out").exists()
    assert "left: not begun. partition.kind=classes" in capsys.readouterr().out
    assert main(["sweep", str(file), "--out", "out", "--only", "g*", "--threads", "1"]) == 0
    told = capsys.readouterr().out
    result = json.loads(Path("out/good/result.json").read_text())
    assert f"good: finished, kNN {result['knn']:.2f} %" in told
    assert ["good", f"{result['knn']:.2f}"] in [line.split()[:2] for line in told.splitlines()]
    log = Path("out/good.log").read_text()
    assert "22 steps of 12 images" in log
    assert main(["sweep", str(file), "--out", "out", "--only", "good"]) == 0
    assert Path("out/good.log").read_text() == log
    assert main(["sweep", str(file), "--out", "out", "--jobs", "0"]) == 1
    assert "jobs=0" in capsys.readouterr().err


def test_code_that_is_typed_may_be_run_by_the_runs_too(
    stand_in: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "_trusted", set())
    monkeypatch.setenv(trust.VARIABLE, "other:net")
    script = stand_in / "train.py"
    script.write_text("import os; print('may run', os.environ['MOCOSFL_TRUST_CODE'])" + STAND_IN, encoding="utf-8")
    runs = {"a": {}, "b": {"model.backbone": "python:mine:net", "model.cut": "0"}}
    file = written(stand_in, {"runs": runs})
    assert main(["sweep", str(file), "--out", "out"]) == 1
    assert "run b: model.backbone=python:mine:net: this runs code of yours" in capsys.readouterr().err
    assert not Path("out").exists()
    file = written(stand_in, {"set": {"contrast.objective": "mine.py:Loss"}, "runs": {"a": {}}})
    assert main(["sweep", str(file), "--out", "out"]) == 1
    message = capsys.readouterr().err
    assert "run a: contrast.objective=mine.py:Loss: this runs code of yours" in message
    assert "set MOCOSFL_TRUST_CODE=mine.py:Loss in the environment" in message
    words = ["contrast.objective=mine.py:Loss", "model.backbone=python:mine:net", "model.cut=0"]
    file = written(stand_in, {"runs": {"a": {}}})
    assert main(["sweep", str(file), "--out", "out", "--set", *words]) == 0
    told = (stand_in / "out" / "a.log").read_text().splitlines()[1].removeprefix("may run ").split(",")
    assert {"mine.py:Loss", "mine:net", "other:net"} <= set(told)


def test_exit_status_and_what_remains(stand_in: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(stand_in, {"runs": {"a": {}, "early": {"seed": 1}}})
    assert main(["sweep", str(file), "--out", "out"]) == 1
    told = capsys.readouterr()
    assert "failed: early; logs are in" in told.err
    assert "seed=1 failed: error: there is no such data" in " ".join(told.out.split())
