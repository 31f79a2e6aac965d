"""Whole runs, as a user starts them from Python."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

import mocosfl
from mocosfl import experiment
from mocosfl.config import Config
from mocosfl.data.images import ImageSet, channel_statistics
from mocosfl.errors import DataError, RunError, SettingError
from mocosfl.run import Run
from mocosfl.trainer import Callback, Trainer


def small(**changes: object) -> Config:
    """A real but tiny run on digits: 12 steps."""
    base = {
        "data.source": "digits",
        "data.channels": 1,
        "data.held_out": 0.1,
        "model.width": 4,
        "model.head": "v1",
        "contrast.queue": 64,
        "clients.number": 20,
        "clients.batch": 2,
        "sync.every": 5,
        "train.epochs": 0.37,
        "train.log_every": 5,
        "train.checkpoint_every": 4,
        "evaluation.every": 0.2,
        "evaluation.probe_epochs": 2,
        "evaluation.k": 10,
    }
    return Config().updated(base | changes)


class Killed(Exception):
    pass


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, trainer: Trainer, metrics: dict[str, torch.Tensor]) -> None:
        if trainer.step == self.step:
            raise Killed


class PoliteStop(StopAt):
    def after_step(self, trainer: Trainer, metrics: dict[str, torch.Tensor]) -> None:
        trainer.stop = trainer.step == self.step


def without_times(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("seconds", "images_per_second"))} for line in lines]


POOLED = {
    "clients.pool": 6,
    "clients.batch": 3,
    "clients.round": 4,
    "clients.keep_optimizer": True,
    "sync.momentum": False,
    "contrast.feature_sharing": False,
    "train.epochs": 0.19,
    "train.checkpoint_every": 3,
}


CHURN = {"clients.drop": 0.5, "clients.pool": 6, "clients.round": 4, "sync.own": "ema"}


@pytest.mark.parametrize("changes", [{}, POOLED, CHURN | {"model.server_norm": "batch", "train.warmup": 0.3}], ids=str)
@pytest.mark.parametrize("kill_at", [1, 7, 11])
def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path: Path, changes: dict, kill_at: int) -> None:
    config = small(**changes)
    whole = mocosfl.train(config, tmp_path / "whole")
    with pytest.raises(Killed):
        mocosfl.train(config, tmp_path / "cut", callbacks=(StopAt(kill_at),))
    with (tmp_path / "cut/metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # as if killed while writing
    resumed = mocosfl.train(config, tmp_path / "cut", resume=True)

    assert (tmp_path / "whole/encoder.safetensors").read_bytes() == (tmp_path / "cut/encoder.safetensors").read_bytes()
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "cut")
    for name in ("loss", "knn", "linear_probe"):
        assert whole.metrics[name] == resumed.metrics[name]


def test_one_seed_one_result(tmp_path: Path) -> None:
    files = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        mocosfl.train(small(seed=seed), tmp_path / folder)
        files.append((tmp_path / folder / "encoder.safetensors").read_bytes())
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_a_run_that_is_asked_to_stop_keeps_its_last_step(tmp_path: Path) -> None:
    result = mocosfl.train(small(), tmp_path / "run", callbacks=(PoliteStop(6),))
    assert not result.finished
    assert Run.open(tmp_path / "run").latest_step == 6
    assert not (tmp_path / "run/encoder.safetensors").exists()
    assert mocosfl.train(small(), tmp_path / "run", resume=True).finished


def test_the_run_folder(tmp_path: Path) -> None:
    result = mocosfl.train(small(), tmp_path / "run")
    assert result.finished
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "config.yaml",
        "data.json",
        ".lock",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "encoder.safetensors",
        "encoder.json",
        "head.safetensors",
        "partition.npz",
        "participation.npy",
        "curve.png",
        "result.json",
    }
    assert Config.from_yaml(tmp_path / "run/config.yaml") == small()
    assert [p.name for p in sorted((tmp_path / "run/checkpoints").iterdir())] == [
        "step-000000008.pt",
        "step-000000012.pt",
    ]
    assert list((tmp_path / "run/tensorboard").glob("events*"))
    with Image.open(tmp_path / "run/curve.png") as curve:
        assert curve.size[0] > 600
    lines = without_times(tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == [5, 10, 12]
    assert [line["step"] for line in lines if "knn_held_out" in line] == [0, 7, 12]
    assert [line["step"] for line in lines if "divergence" in line] == [5, 10, 12]  # of the last average before it
    times = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    phases = ("clients", "server", "synchronise")
    spent = {phase: sum(line.get(f"seconds/{phase}", 0) for line in times) for phase in phases}
    assert all(spent.values())
    assert sum(spent.values()) < times[-1]["seconds"]
    last = max(place for place, line in enumerate(times) if "knn_held_out" in line)
    assert any("seconds/evaluate" in line for line in times[last + 1 :])  # of the last one, too
    held = np.load(tmp_path / "run/partition.npz")
    assert held["counts"].shape == (20, 10)
    assert held["counts"].sum() == held["images"].sum() == 1294
    assert np.load(tmp_path / "run/participation.npy").tolist() == [24] * 20
    assert result.metrics == json.loads((tmp_path / "run/result.json").read_text())
    assert result.metrics["bank_images"] == 1438
    assert result.metrics["test_images"] == 359


def test_evaluate_repeats_the_figures_of_training(tmp_path: Path) -> None:
    result = mocosfl.train(small(**{"model.server_norm": "batch"}), tmp_path / "run")
    again = mocosfl.evaluate(tmp_path / "run")
    for name in ("knn", "knn_untrained", "linear_probe"):
        assert again[name] == result.metrics[name]
    assert json.loads((tmp_path / "run/evaluation.json").read_text()) == again


def test_the_loaded_encoder_is_the_trained_one(tmp_path: Path) -> None:
    result = mocosfl.train(small(**{"model.cut": 3, "model.bottleneck": "C4S2"}), tmp_path / "run")
    encoder = mocosfl.load_encoder(tmp_path / "run")
    images = torch.rand(5, 1, 8, 8)
    features = encoder(images)
    assert features.shape == (5, 32)
    torch.testing.assert_close(features, result.encoder(images))
    assert not encoder.training
    facts = json.loads((tmp_path / "run/encoder.json").read_text())
    assert facts["model"]["bottleneck"] == "C4S2"
    for wrong in (torch.rand(5, 3, 8, 8), torch.rand(5, 1, 9, 9), torch.rand(1, 8, 8)):
        with pytest.raises(ValueError, match=r"expected float in \[0, 1\] of shape \(n, 1, 8, 8\)"):
            encoder(wrong)
    with pytest.raises(ValueError, match=r"not torch\.uint8"):
        encoder(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))


def test_an_encoder_that_is_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no encoder: encoder\.json is missing"):
        mocosfl.load_encoder(tmp_path)
    mocosfl.train(small(), tmp_path / "run")
    weights = tmp_path / "run/encoder.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(RunError, match="cannot be read"):
        mocosfl.load_encoder(tmp_path / "run")


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_held_out_and_test_images_stay_out_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, norm: str
) -> None:
    """Neither statistics nor a client ever reads a held-out or a test image, and kNN has no say in the result."""
    seen: dict[str, set[int]] = {"statistics": set(), "clients": set()}

    class Spy(ImageSet):
        inside_client = False

        def take(self, rows, device):
            if Spy.inside_client:
                seen["clients"].update(rows.tolist())
            return super().take(rows, device)

    def statistics(images, rows):
        seen["statistics"].update(rows.tolist())
        return channel_statistics(images, rows)

    forward = experiment.LocalCohort.forward

    def watched(self):
        Spy.inside_client = True
        try:
            return forward(self)
        finally:
            Spy.inside_client = False

    federations = []
    federate = experiment.federate

    def spied(config, say):
        federation = federate(config, say)
        federation.splits.train.__class__ = Spy
        federations.append(federation)
        return federation

    monkeypatch.setattr(experiment, "channel_statistics", statistics)
    monkeypatch.setattr(experiment.LocalCohort, "forward", watched)
    monkeypatch.setattr(experiment, "federate", spied)
    config = small(**{"train.epochs": 1.2, "model.server_norm": norm})
    mocosfl.train(config, tmp_path / "run")
    federation = federations[0]
    train, held = set(federation.train_rows.tolist()), set(federation.held_out.tolist())
    assert len(held) == 144
    assert not train & held
    assert train | held == set(range(len(federation.splits.train)))
    assert seen["statistics"] == seen["clients"] == train == set(federation.partition.rows.tolist())

    monkeypatch.setattr(experiment, "held_out_knn", lambda *parts: lambda: 12.5)  # nobody looks at the held-out images
    mocosfl.train(config, tmp_path / "blind")
    weights = [(tmp_path / name / "encoder.safetensors").read_bytes() for name in ("run", "blind")]
    assert weights[0] == weights[1]


def test_held_out_images_are_of_all_classes() -> None:
    federation = experiment.federate(small(), lambda text: None)
    counts = np.bincount(federation.splits.train.labels[federation.held_out], minlength=10)
    assert counts.min() >= 14
    assert counts.max() <= 15


def test_unlabelled_images_train_without_evaluation(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(40):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    config = small(**{"data.source": str(folder), "data.channels": 3, "partition.kind": "iid", "train.epochs": 2})
    result = mocosfl.train(config, tmp_path / "run")
    assert result.finished
    assert not {"knn", "linear_probe", "knn_held_out"} & set(result.metrics)
    with pytest.raises(DataError, match="its training images have no labels; name labelled images with --data"):
        mocosfl.evaluate(tmp_path / "run")
    assert not (tmp_path / "run/evaluation.json").exists()
    assert mocosfl.load_encoder(tmp_path / "run")(torch.rand(1, 3, 20, 20)).shape == (1, 32)


def test_images_without_labels_beside_labelled_ones(tmp_path: Path) -> None:
    """As STL-10 has them: trained on the ones, scored with the others."""
    shades = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    for number, pixels in enumerate(shades):
        split, kind = (("unlabeled", ""), ("train", f"{number % 2}"), ("test", f"{number % 2}"))[min(2, number // 16)]
        folder = tmp_path / "set" / split / kind
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    chosen = {
        "partition.kind": "iid",
        "data.source": str(tmp_path / "set"),
        "data.train_split": "unlabeled",
        "data.label_split": "train",
    }
    result = mocosfl.train(small(**chosen, **{"data.images": None, "clients.number": 2}), tmp_path / "run")
    assert result.metrics["bank_images"] == 16
    assert "knn_held_out" not in result.metrics
    assert mocosfl.evaluate(tmp_path / "run")["knn"] == result.metrics["knn"]


def test_streamed_images_train_to_the_same_bits(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for index in range(120):
        folder = tmp_path / "photos" / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    config = small(
        **{"data.source": str(tmp_path / "photos"), "data.channels": 3, "partition.kind": "dirichlet"},
        **{"clients.number": 8, "train.epochs": 2},
    )
    memory = mocosfl.train(config, tmp_path / "memory")
    said = io.StringIO()
    streamed = mocosfl.train(
        config.updated({"data.memory": 1e-6}), tmp_path / "streamed", console=Console(file=said, width=200)
    )
    assert "are streamed from" in said.getvalue()
    weights = [(run.run / "encoder.safetensors").read_bytes() for run in (memory, streamed)]
    assert weights[0] == weights[1]
    assert memory.metrics["knn"] == streamed.metrics["knn"]


def test_bf16_trains_close_to_fp32(tmp_path: Path) -> None:
    losses = [
        mocosfl.train(small(**{"train.precision": precision}), tmp_path / precision).metrics["loss"]
        for precision in ("fp32", "bf16")
    ]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_a_loss_that_explodes_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    class Explode(Callback):
        def after_step(self, trainer: Trainer, metrics: dict[str, torch.Tensor]) -> None:
            if trainer.step == 5:
                next(trainer.server.online.parameters()).data.fill_(float("nan"))

    with pytest.raises(RunError, match=r"loss at step 6 is not finite; .* the checkpoint of step 4 is safe"):
        mocosfl.train(small(**{"train.log_every": 6}), tmp_path / "run", callbacks=(Explode(),))
    state = Run.open(tmp_path / "run").load_checkpoint(print)
    assert state["step"] == 4
    assert all(t.isfinite().all() for t in state["server"]["online"].values())
    assert "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()


def test_resume_with_other_settings_is_refused(tmp_path: Path) -> None:
    mocosfl.train(small(), tmp_path / "run", callbacks=(PoliteStop(6),))
    with pytest.raises(RunError, match=r"clients\.batch: the run has 2, not 4") as caught:
        mocosfl.train(small(**{"clients.batch": 4, "train.lr": 0.5}), tmp_path / "run", resume=True)
    assert "train.lr: the run has 0.06, not 0.5" in str(caught.value)
    assert mocosfl.train(small(**{"train.log_every": 1}), tmp_path / "run", resume=True).finished


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    mocosfl.train(small(), tmp_path / "run", callbacks=(PoliteStop(6),))
    with pytest.raises(RunError, match="already holds a run"):
        mocosfl.train(small(), tmp_path / "run")
    assert Run.open(tmp_path / "run").latest_step == 6
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.tex").touch()
    for overwrite in (False, True):
        with pytest.raises(RunError, match=r"files that are not of a run \(chapter1\.tex\)"):
            mocosfl.train(small(), tmp_path / "thesis", overwrite=overwrite)
    assert (tmp_path / "thesis/chapter1.tex").exists()
    assert mocosfl.train(small(seed=5), tmp_path / "run", overwrite=True).finished
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["seed"] == 5


def test_overwriting_deletes_nothing_but_a_run(tmp_path: Path) -> None:
    mocosfl.train(small(), tmp_path / "run", callbacks=(PoliteStop(2),))
    (tmp_path / "run/notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"files that are not of a run \(notes\.txt\)"):
        mocosfl.train(small(), tmp_path / "run", overwrite=True)
    assert (tmp_path / "run/notes.txt").exists()
    assert Run.open(tmp_path / "run").latest_step == 2


@pytest.mark.parametrize("left", [["checkpoints"], [".config.yaml.17.tmp"], ["checkpoints", "data.json"]])
def test_a_folder_half_made_or_half_deleted_can_be_used(tmp_path: Path, left: list[str]) -> None:
    (tmp_path / "run").mkdir()
    for name in left:
        if name == "checkpoints":
            (tmp_path / "run" / name).mkdir()
        else:
            (tmp_path / "run" / name).write_text("half")
    assert mocosfl.train(small(), tmp_path / "run").finished


def test_a_run_killed_before_its_first_checkpoint_is_resumed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(small().to_yaml())
    assert mocosfl.train(small(), tmp_path / "run", resume=True).finished


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path) -> None:
    mocosfl.train(small(), tmp_path / "run", callbacks=(PoliteStop(2),))
    with Run.open(tmp_path / "run").locked():
        for how in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(RunError, match="another process is training"):
                mocosfl.train(small(), tmp_path / "run", **how)
    assert Run.open(tmp_path / "run").latest_step == 2


def test_resume_with_other_images_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(50):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    config = small(**{"data.source": str(folder), "partition.kind": "iid", "train.epochs": 12})
    mocosfl.train(config, tmp_path / "run", callbacks=(PoliteStop(2),))
    (folder / "0.png").unlink()
    with pytest.raises(RunError, match=r"the images are no longer those that .*run began with"):
        mocosfl.train(config, tmp_path / "run", resume=True)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot write to the run folder"):
        mocosfl.train(small(), tmp_path / "file" / "run")


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = torch.save

    def full(state, file):
        if state["step"] == 8:
            file.write(b"half a checkpoint")
            raise OSError(28, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match=r"No space left on device; the checkpoint of step 4 is safe"):
        mocosfl.train(small(), tmp_path / "run")
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir() if p.suffix != ".pt"] == []
    monkeypatch.undo()
    monkeypatch.setenv("MOCOSFL_CACHE", str(tmp_path / "cache"))
    assert mocosfl.train(small(), tmp_path / "run", resume=True).finished


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    mocosfl.train(small(), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    (tmp_path / "run/encoder.safetensors").unlink()
    latest = tmp_path / "run/checkpoints/step-000000012.pt"
    latest.write_bytes(latest.read_bytes()[:2000])
    assert mocosfl.train(small(), tmp_path / "run", resume=True).finished
    weights = [(tmp_path / name / "encoder.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1]
    assert (tmp_path / "run/checkpoints/step-000000012.damaged").exists()
    for path in (tmp_path / "run/checkpoints").iterdir():
        path.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(RunError, match=r"no checkpoint of .* can be read"):
            mocosfl.train(small(), tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.cut": 2}, r"model\.cut=2: this backbone can be cut after 1, 3"),
        ({"model.bottleneck": "4x2"}, r"model\.bottleneck=4x2: expected none, or CxSy"),
        ({"partition.classes_per_client": 12}, r"partition\.classes_per_client=12: the data set has 10 classes"),
        ({"clients.number": 5000}, r"clients\.number=5000: there are only 1294 training images"),
        ({"clients.batch": 70}, r"clients\.batch=70"),
        ({"train.device": "cuda:7"}, r"train\.device=cuda:7: not available here"),
        ({"data.source": "digit"}, r"data\.source=digit: .* did you mean digits\?"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_leave_no_folder(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        mocosfl.train(small(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
