"""From pre-training to the audit, as a user calls them, on handwritten digits and pieces of photographs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mocosfl.cli import main
from mocosfl.config import AttackSettings, Config
from mocosfl.data.federation import federate
from mocosfl.errors import RunError, SettingError
from mocosfl.experiment import pretrain, train
from mocosfl.privacy.audit import audit, compare
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
    expected = federation.splits.train.gather(rows)
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
    assert not np.isin(fingerprints(expected), run.fingerprints()).any()


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
        if np.isin(fingerprints(federation.splits.train.gather(federation.partition.client(c))), seen).any()
    )
    message = refused(client=shared, images=1000)
    assert f"attack.client={shared}: the server has seen" in message
    assert "attack client 4" in message
    assert "attack.client=20: the clients are 0 to 19" in refused(client=20)
    assert "attack.auxiliary=digits" in refused(auxiliary="digits")
    assert "attack.share=0.0001: that is 0 of" in refused(share=0.0001)
    assert "attack.strong_share=0.99" in refused(strong_share=0.99)
    (tmp_path / "config.yaml").write_text(run.config.to_yaml())
    with pytest.raises(RunError, match="holds no encoder"):
        audit(tmp_path, QUICK, CPU, silent)
    with pytest.raises(RunError, match="is not a run"):
        audit(tmp_path / "nowhere", QUICK, CPU, silent)


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
    with pytest.raises(RunError, match="is a run of `mocosfl pretrain`; resume it with that"):
        train(settings, tmp_path / "run", resume=True)
    assert pretrain(settings, tmp_path / "run", resume=True).finished
    names = ("encoder.safetensors", "head.safetensors", "seen.npy")
    assert all((tmp_path / "run" / name).read_bytes() == (pretrained / name).read_bytes() for name in names)


def test_a_collapse_is_noticed(source: str, tmp_path: Path) -> None:
    """A rate at which every filter dies: the run ends, and says so."""
    with pytest.raises(RunError, match=r"collapsed at step \d+: the features' variance is|is not finite"):
        pretrain(config(source, **{"pretrain.lr": 50.0, "pretrain.epochs": 20}), tmp_path / "run")


@pytest.mark.parametrize("kind", ["noise", "dropout", "nopeek", "ressfl"])
def test_training_under_a_defence(kind: str, source: str, tmp_path: Path) -> None:
    """It runs, resumes to the same end, and the audit attacks what is sent under it."""
    from mocosfl.trainer import Callback

    class Stop(Callback):
        def after_step(self, trainer, metrics) -> None:
            trainer.stop = trainer.step == 3

    settings = config(source, **{"defence.kind": kind, "ressfl.ssim_target": -1})
    whole = train(settings, tmp_path / "whole")
    assert not train(settings, tmp_path / "run", callbacks=(Stop(),)).finished
    again = train(settings, tmp_path / "run", resume=True)
    plain = train(config(source), tmp_path / "plain")
    for name, weight in whole.encoder.state_dict().items():
        assert torch.equal(weight, again.encoder.state_dict()[name]), name
    weight = "client.stem.0.0.weight"
    assert not torch.equal(whole.encoder.state_dict()[weight], plain.encoder.state_dict()[weight])
    assert audit(tmp_path / "run", QUICK, CPU, silent).report["worst"]["mse"]["value"] > 0
