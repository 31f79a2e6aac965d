"""From pre-training to the audit, as a user calls them, on handwritten digits and pieces of photographs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mocosfl.cli import main
from mocosfl.config import AttackSettings, Config
from mocosfl.data.federation import federate
from mocosfl.errors import DataError, RunError, SettingError
from mocosfl.experiment import pretrain, train
from mocosfl.privacy.audit import _images, audit, compare
from mocosfl.privacy.mixture import fingerprints
from mocosfl.run import Run

CPU = torch.device("cpu")
QUICK = AttackSettings(
    images=9,
    gallery=60,
    epochs=1,
    strong_blocks=1,
    strong_channels=8,
    strong_steps=3,
    restarts=1,
    iterations=4,
    views=2,
)
FLAGS = [
    *("--images", "9", "--gallery", "60", "--epochs", "1", "--strong-blocks", "1", "--strong-channels", "8"),
    *("--strong-steps", "3", "--restarts", "1", "--iterations", "4", "--views", "2"),
]


def silent(text: str) -> None:
    pass


def config(source: str, **changes: object) -> Config:
    base = {
        "data.source": "digits",
        "data.channels": 1,
        "data.held_out": 0.1,
        "model.width": 4,
        "model.head": "v1",
        "model.bottleneck": "C4S2",
        "contrast.queue": 64,
        "clients.number": 20,
        "clients.batch": 2,
        "pretrain.source": source,
        "pretrain.target_share": 0.02,
        "pretrain.spare_client": 4,
        "pretrain.batch": 16,
        "pretrain.epochs": 2,
        "ressfl.blocks": 1,
        "ressfl.channels": 8,
        "ressfl.warmup": 5,
        "train.epochs": 0.2,
        "train.log_every": 2,
        "evaluation.every": 0,
        "evaluation.probe_epochs": 2,
        "evaluation.k": 10,
    }
    return Config().updated(base | changes)


@pytest.fixture(scope="module")
def source(tmp_path_factory, photos) -> str:
    """A flat folder of 60 colour images of 10x10 pixels."""
    folder = tmp_path_factory.mktemp("source")
    for number, image in enumerate(photos(60, 10)):
        pixels = (image.permute(1, 2, 0) * 255).round().byte().numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return str(folder)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, source: str) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "pretrained"
    pretrain(config(source), folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, source: str, pretrained: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "trained"
    train(config(source, **{"clients.init": str(pretrained), "clients.frozen": True}), folder)
    return folder


def test_pretraining_leaves_a_whole_run(pretrained: Path) -> None:
    result = json.loads((pretrained / "result.json").read_text())
    assert result["steps"] == 2 * 120 // 16  # two epochs of 60 images, which are half of each batch of 16
    assert result["test_images"] == 359  # scored on the clients' test images
    assert {"attacker_ssim", "spread"} <= set(result)
    assert (pretrained / "head.safetensors").exists()
    assert len(Run.open(pretrained).fingerprints()) == 60 + 26


def test_clients_start_from_it_and_stay(pretrained: Path, trained: Path) -> None:
    from mocosfl import load_encoder

    before, after = load_encoder(pretrained), load_encoder(trained)
    for name, weight in before.client.state_dict().items():
        assert torch.equal(weight, after.client.state_dict()[name]), name
    assert torch.equal(before.mean, after.mean)
    assert any(not torch.equal(w, after.server.state_dict()[n]) for n, w in before.server.state_dict().items())


def test_the_audit_spares_nobody(trained: Path, source: str) -> None:
    said: list[str] = []
    found = audit(trained, QUICK, CPU, said.append)
    run = Run.open(trained)
    federation = federate(run.config, silent)
    rows = federation.partition.client(4)[:9]
    train_images = federation.splits.train
    expected = train_images.gather(rows)
    assert np.array_equal((found.originals * 255).round().byte().numpy(), expected)
    assert list(found.reconstructions) == ["decoder", "strong", "auxiliary", "whitebox", "views"]
    for name, made in found.reconstructions.items():
        assert made.shape == found.originals.shape, name
        scores = found.report["attacks"][name]
        assert scores["mse"] == pytest.approx(float((made - found.originals).square().mean()), rel=1e-5)
    worst = found.report["worst"]
    assert worst["mse"]["value"] == min(attack["mse"] for attack in found.report["attacks"].values())
    assert worst["ssim"]["value"] == max(attack["ssim"] for attack in found.report["attacks"].values())
    assert found.report["gallery"] == 60
    again = audit(trained, QUICK, CPU, silent)
    assert all(torch.equal(made, again.reconstructions[name]) for name, made in found.reconstructions.items())
    assert not np.isin(fingerprints(train_images, rows), run.fingerprints()).any()


def test_the_commands(trained: Path, pretrained: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["attack", "--compare", str(trained)]) == 1
    assert "has not been attacked: run mocosfl attack" in capsys.readouterr().err.replace("\n", " ")
    for run in (trained, pretrained):
        assert main(["attack", str(run), *FLAGS]) == 0
        with Image.open(run / "reconstructions.png") as picture:
            assert picture.size[0] > 400
    out = capsys.readouterr().out
    assert "the worst of each" in out
    assert "mean image" in out
    report = json.loads((trained / "privacy.json").read_text())
    assert report["images"] == 9
    assert report["settings"]["strong_steps"] == 3

    assert main(["attack", "--compare", str(trained), str(pretrained), "--out", "pictures/both.png"]) == 0
    assert (tmp_path / "pictures/both.png").exists()
    first, second = compare([trained, pretrained])
    result = json.loads((trained / "result.json").read_text())
    assert first["linear_probe"] == result["linear_probe"]
    assert first["up"] == 2 * 4 * 4 * 4 * 4  # two latents of 4x4x4 numbers in fp32
    assert first["down"] == second["down"] == 0
    assert first["mse"] == report["worst"]["mse"]["value"]

    assert main(["attack"]) == 2
    assert main(["train", "--clients.init", str(pretrained), "--clients.frozen", "--out", "mine"]) == 0  # its settings
    assert Run.open("mine").config.data.channels == 1


def test_what_the_audit_refuses(trained: Path, source: str, tmp_path: Path) -> None:
    def refused(**changes: object) -> str:
        with pytest.raises(SettingError) as error:
            audit(trained, QUICK.model_copy(update=changes), CPU, silent)
        return str(error.value)

    run = Run.open(trained)
    federation = federate(run.config, silent)
    seen = run.fingerprints()
    shared = next(
        c
        for c in range(20)
        if np.isin(fingerprints(federation.splits.train, federation.partition.client(c)), seen).any()
    )
    message = refused(client=shared)
    assert f"client={shared}: the server has seen" in message
    assert "attack client 4" in message
    assert "client=20: the clients are 0 to 19" in refused(client=20)
    assert "auxiliary=digits: 9 of the attacked images are in it" in refused(auxiliary="digits")
    assert "share=0.0001: that is 0 of" in refused(share=0.0001)
    assert "strong_share=0.99" in refused(strong_share=0.99)
    (tmp_path / "config.yaml").write_text(run.config.to_yaml())
    with pytest.raises(RunError, match="holds no encoder"):
        audit(tmp_path, QUICK, CPU, silent)
    with pytest.raises(RunError, match="is not a run"):
        audit(tmp_path / "nowhere", QUICK, CPU, silent)


def test_attackers_have_no_copy_of_an_attacked_image(source: str) -> None:
    """Pixels of the attacked client's images are planted with other clients, and in the auxiliary set."""
    settings = config(source)
    federation = federate(settings, silent)
    mine, train_images = federation.partition.client(4), federation.splits.train
    planted = np.setdiff1d(federation.train_rows, mine)[: len(mine)]
    train_images.images[planted] = train_images.images[mine]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mocosfl.privacy.audit.federate", lambda *_: federation)
        sets = _images(settings, AttackSettings(images=1000, strong_share=0.8), np.zeros(0, np.uint64), silent)
    marks = fingerprints(train_images, sets.attacked)
    assert sorted(sets.attacked) == sorted(mine)
    for rows in (sets.small, sets.large, sets.distractors):
        assert not np.isin(fingerprints(train_images, rows), marks).any()
    assert not np.isin(sets.distractors, sets.large).any()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mocosfl.privacy.audit.federate", lambda *_: federation)
        patch.setattr("mocosfl.privacy.audit.load", lambda *_: federation.splits)
        chosen = AttackSettings(images=1000)
        sets = _images(settings, chosen, np.zeros(0, np.uint64), silent)  # not asked for: they are left out
        assert not np.isin(fingerprints(train_images, sets.its_rows), marks).any()
        with pytest.raises(SettingError, match="attacked images are in it"):
            _images(settings, chosen.model_copy(update={"auxiliary": "x"}), np.zeros(0, np.uint64), silent)


def test_without_auxiliary_images_the_other_attacks_are_made(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    settings = Run.open(trained).config.updated({"pretrain.source": "/gone"})
    (tmp_path / "run/config.yaml").write_text(settings.to_yaml())
    said: list[str] = []
    report = audit(tmp_path / "run", QUICK, CPU, said.append).report
    assert list(report["attacks"]) == ["decoder", "strong", "whitebox", "views"]
    assert any("/gone cannot be had" in line for line in said)
    with pytest.raises(DataError, match="auxiliary=/nowhere/x: there is no such file"):
        audit(tmp_path / "run", QUICK.model_copy(update={"auxiliary": "/nowhere/x"}), CPU, silent)


def test_a_start_that_does_not_fit(pretrained: Path, source: str, tmp_path: Path) -> None:
    def refused(**changes: object) -> str:
        with pytest.raises((SettingError, RunError)) as error:
            train(config(source, **{"clients.init": str(pretrained)} | changes), tmp_path / "run")
        assert not (tmp_path / "run").exists()
        return str(error.value)

    assert "model.cut is 1 there and 3 here" in refused(**{"model.cut": 3})
    assert "model.head is v1 there and small here" in refused(**{"model.head": "small"})
    assert "size of the images is 8 there and 12 here" in refused(**{"data.size": 12})
    assert "is not a run" in refused(**{"clients.init": str(tmp_path / "nowhere")})
    assert "frozen clients need a trained half" in refused(**{"clients.init": None, "clients.frozen": True})


def test_the_server_may_start_afresh(pretrained: Path, source: str, tmp_path: Path) -> None:
    fresh = config(
        source, **{"clients.init": str(pretrained), "train.init_server": False, "model.head": "small", "train.lr": 1e-9}
    )
    encoder = train(fresh, tmp_path / "run").encoder
    from mocosfl import load_encoder
    from mocosfl.encoder import Encoder

    start, begun = load_encoder(pretrained), Encoder(fresh.model, 1, 8, fresh.seed)
    name = next(name for name in begun.state_dict() if "stage1" in name and name.endswith("weight"))
    assert torch.allclose(encoder.state_dict()[name], begun.state_dict()[name], atol=1e-5)
    assert not torch.allclose(encoder.state_dict()[name], start.state_dict()[name], atol=1e-2)
    name = "client.stem.0.0.weight"
    assert torch.allclose(encoder.state_dict()[name], start.state_dict()[name], atol=1e-5)


def test_pretraining_resumes_as_if_never_stopped(pretrained: Path, source: str, tmp_path: Path) -> None:
    from mocosfl.trainer import Callback

    class Stop(Callback):
        def after_step(self, trainer, metrics) -> None:
            trainer.stop = trainer.step == 7

    settings = config(source)
    assert not pretrain(settings, tmp_path / "run", callbacks=(Stop(),)).finished
    for frozen in (True, False):
        with pytest.raises(RunError, match="is a run of `mocosfl pretrain`; resume it with that"):
            train(settings.updated({"clients.frozen": frozen}), tmp_path / "run", resume=True)
    assert pretrain(settings, tmp_path / "run", resume=True).finished
    names = ("encoder.safetensors", "head.safetensors", "seen.npy")
    assert all((tmp_path / "run" / name).read_bytes() == (pretrained / name).read_bytes() for name in names)


def test_a_run_needs_the_other_one_only_to_start(pretrained: Path, source: str, tmp_path: Path) -> None:
    """The run that clients start from may be gone when training goes on."""
    from mocosfl.trainer import Callback

    class Stop(Callback):
        def after_step(self, trainer, metrics) -> None:
            trainer.stop = trainer.step == 3

    start = tmp_path / "start"
    shutil.copytree(pretrained, start)
    settings = config(source, **{"clients.init": str(start), "clients.frozen": True})
    whole = train(settings, tmp_path / "whole")
    assert not train(settings, tmp_path / "run", callbacks=(Stop(),)).finished
    shutil.rmtree(start)
    again = train(settings, tmp_path / "run", resume=True)
    for name, tensor in whole.encoder.state_dict().items():
        assert torch.equal(tensor, again.encoder.state_dict()[name]), name
    assert np.array_equal(Run.open(tmp_path / "run").fingerprints(), Run.open(pretrained).fingerprints())


def test_a_collapse_ends_pretraining(source: str, tmp_path: Path) -> None:
    """Halves and features that are all alike, as a client half gives whose filters have died."""
    from mocosfl.trainer import Callback

    class Kill(Callback):
        def before_training(self, trainer) -> None:
            for name, stack in trainer.cohort.online.weights.items():
                if name.startswith("bottleneck"):
                    stack.data.fill_(-1e3)  # before a ReLU
            trainer.config = trainer.config.updated({"train.log_every": 10})

    with pytest.raises(RunError, match=r"collapsed at step 100: the features' variance is .*; the checkpoint of step"):
        pretrain(config(source, **{"pretrain.epochs": 20}), tmp_path / "run", callbacks=(Kill(),))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["noise", "dropout", "nopeek", "ressfl"])
def test_training_under_a_defence(kind: str, precision: str, source: str, tmp_path: Path) -> None:
    """It runs, resumes to the same end, and the audit attacks what is sent under it."""
    from mocosfl.trainer import Callback

    class Stop(Callback):
        def after_step(self, trainer, metrics) -> None:
            trainer.stop = trainer.step == 3

    settings = config(source, **{"defence.kind": kind, "ressfl.ssim_target": -1, "train.precision": precision})
    whole = train(settings, tmp_path / "whole")
    assert not train(settings, tmp_path / "run", callbacks=(Stop(),)).finished
    again = train(settings, tmp_path / "run", resume=True)
    plain = train(config(source, **{"train.precision": precision}), tmp_path / "plain")
    for name, weight in whole.encoder.state_dict().items():
        assert torch.equal(weight, again.encoder.state_dict()[name]), name
    weight = "client.stem.0.0.weight"
    assert not torch.equal(whole.encoder.state_dict()[weight], plain.encoder.state_dict()[weight])
    assert audit(tmp_path / "run", QUICK, CPU, silent).report["worst"]["mse"]["value"] > 0
