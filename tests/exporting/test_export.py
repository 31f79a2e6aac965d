"""What an export holds, when it is refused, and what loads it."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.numpy import load_file
from shaken import Finished

import mocosfl
from mocosfl.cli import main
from mocosfl.encoder import Encoder, load_encoder
from mocosfl.errors import RunError, SettingError
from mocosfl.exporting import to_onnx
from mocosfl.exporting.card import model_card
from mocosfl.exporting.export import export
from mocosfl.run import Run
from mocosfl_device.engine import built


def test_huggingface_layout_loads_bit_for_bit(finished: Finished) -> None:
    run = finished(**{"model.server_norm": "batch", "model.bottleneck": "C4S2"})
    done = export(run.path, formats=["huggingface"])
    folder = run.path / "export"
    assert {path.relative_to(folder).name for path in done.files} == {"README.md", "config.json", "model.safetensors"}
    assert not done.left_out
    images = torch.rand(5, 1, 8, 8)
    encoder = Encoder.from_pretrained(folder)
    assert not encoder.training
    assert torch.equal(encoder(images), mocosfl.load_encoder(run.path)(images))
    assert encoder.card == (folder / "README.md").read_text()
    assert str(run.path.parent) not in encoder.card + (folder / "config.json").read_text()


def test_model_card(finished: Finished, tmp_path: Path) -> None:
    private = tmp_path / "secret" / "faces"
    private.mkdir(parents=True)
    run = finished(**{"data.source": str(private), "clients.number": 20, "partition.kind": "iid"})
    run.write_json(
        "privacy.json",
        {
            "images": 12,
            "gallery": 1000,
            "worst": {name: {"value": value} for name, value in (("mse", 0.02), ("ssim", 0.5), ("identified", 91.0))},
        },
    )
    export(run.path, formats=["huggingface"], license="Apache-2.0")
    card = ModelCard.load(run.path / "export" / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0"
    assert data["library_name"] == "mocosfl"
    assert "datasets" not in data
    results = data["model-index"][0]["results"][0]
    assert results["dataset"] == {"name": "faces", "type": "faces", "split": "test"}
    assert [metric["value"] for metric in results["metrics"]] == [0.9725, 0.98]
    for words in ("| clients | 20, simulated", "| partition | IID |", "97.25 %", "359 test images", "1,294", "faces"):
        assert words in card.text
    assert "91 % recognised among 1,000" in card.text
    assert "secret" not in card.content
    settings = yaml.safe_load(card.text.partition("```yaml")[2].partition("```")[0])
    assert settings["data"]["source"] == "faces"
    assert settings["clients"]["number"] == 20


@pytest.mark.parametrize(("measured", "told"), [({}, 40), ({"linear_probe": 99.0, "probe": {"epochs": 7}}, 7)])
def test_model_card_tells_the_settings_that_a_figure_was_measured_with(
    finished: Finished, measured: dict, told: int
) -> None:
    """The last call was without a probe: it is that of the run's end, or of a call before."""
    run = finished(**{"data.source": "digits", "evaluation.probe_epochs": 40})
    last = {"knn": 96.0, "how": {"settings": {"probe_epochs": 0, "k": 30}}}
    run.write_json("evaluation.json", measured | last)
    text = model_card(run, load_encoder(run.path), None)
    assert f"kNN with k = 30, T = 0.1 and 1,438 labelled training images; linear probe of {told} epochs" in text
    assert f"| linear probe | {measured.get('linear_probe', 98):.2f} % |" in text
    run.write_json("result.json", {"bank_images": 1438, "test_images": 359})
    run.write_json("evaluation.json", last)
    assert "probe of" not in model_card(run, load_encoder(run.path), None)


def test_model_card_of_clients_with_whole_networks_speaks_of_no_attack(finished: Finished) -> None:
    whole = {"clients.holds": "network", "clients.lr_scale": "per_client_mean"}
    whole |= {"contrast.feature_sharing": False, "contrast.both_views": True}
    runs = finished(**{"data.source": "digits"}), finished(name="whole", **{"data.source": "digits"} | whole)
    halves, networks = (model_card(run, load_encoder(run.path), None) for run in runs)
    assert "Nobody has tried by `mocosfl attack`" in halves
    assert "mocosfl attack" not in networks
    assert "Each client trained the whole network" in networks


def test_model_card_of_a_hub_data_set_and_no_licence(finished: Finished) -> None:
    run = finished(channels=3, **{"data.source": "cifar10"})
    export(run.path, formats=["huggingface"])
    card = ModelCard.load(run.path / "export" / "README.md")
    assert card.data.license == "unknown"
    assert card.data.datasets == ["uoft-cs/cifar10"]
    assert "Nobody has said yet under which licence" in card.text


def test_model_card_of_other_commands(finished: Finished) -> None:
    run = finished(name="pre", **{"pretrain.source": "cifar100", "pretrain.target_share": 0.1})
    run.write_json("data.json", {"images": 500, "kind": "pretrain"})
    export(run.path, formats=["huggingface"])
    card = ModelCard.load(run.path / "export" / "README.md")
    assert card.data.datasets == ["uoft-cs/cifar100"]
    assert "The server's own images were those of cifar100." in card.text
    assert "a share of 0.1 of the clients' images of digits" in card.text

    run = finished(name="served")
    run.write_json("data.json", {"images": 500, "kind": "serve", "evaluate_on": None})
    run.write_json("result.json", {"steps": 3})
    export(run.path, formats=["huggingface"])
    card = ModelCard.load(run.path / "export" / "README.md")
    assert "The images stayed with the clients" in card.text
    assert "over the network" in card.text
    assert "None: there were no labelled images" in card.text
    assert "model-index" not in card.data.to_dict()
    assert "| source | the clients' own |" in card.text

    run = finished(name="flower", **{"data.source": "digits"})
    run.write_json("data.json", {"images": 500, "kind": "flower", "evaluate_on": "cifar10"})
    export(run.path, formats=["huggingface"])
    card = ModelCard.load(run.path / "export" / "README.md")
    assert "The images stayed with the clients" in card.text
    assert "connected by Flower" in card.text
    assert "simulated" not in card.text
    assert "| partition |" not in card.text
    assert "datasets" not in card.data.to_dict()
    assert card.data.to_dict()["model-index"][0]["results"][0]["dataset"]["type"] == "uoft-cs/cifar10"
    assert "| source | the clients' own |" in card.text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sync.every": 1}, "averaged every step |"),
        ({"sync.every": 1000}, "averaged every 1,000 steps |"),
        ({"sync.every": 0}, "averaged at the end alone |"),
        ({"sync.every": 0, "clients.pool": 5}, "averaged whenever others take their turn, and at the end |"),
        ({"clients.frozen": True}, "frozen |"),
    ],
)
def test_model_card_tells_how_halves_are_averaged(finished: Finished, settings: dict[str, object], words: str) -> None:
    run = finished(**{"clients.number": 20, **settings})
    assert f"| client halves | {words}" in model_card(run, mocosfl.load_encoder(run.path), None)


class Hub:
    """Stands in for the hub's interface: notes what it is asked for."""

    def __init__(self, token: str | None = None) -> None:
        self.token = token

    calls: list[Any]

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> huggingface_hub.RepoUrl:
        self.calls.append((repo_id, private, exist_ok, self.token))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> str:
        self.calls.append((repo_id, {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}))
        return f"https://huggingface.co/{repo_id}/commit/0"


def test_push_to_hub_uploads_what_from_pretrained_reads(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = finished()
    export(run.path, out=tmp_path / "out", formats=["huggingface"])
    Hub.calls = []
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    encoder = Encoder.from_pretrained(tmp_path / "out")
    assert encoder.push_to_hub("me/encoder", private=True, token="t") == "https://huggingface.co/me/encoder/commit/0"
    (made, (repo, uploaded)) = Hub.calls
    assert made == ("me/encoder", True, True, "t")
    assert repo == "me/encoder"
    assert uploaded == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    with pytest.raises(RunError, match=r"me/encoder: the encoder has no model card to upload; export the run"):
        mocosfl.load_encoder(run.path).push_to_hub("me/encoder")
    assert len(Hub.calls) == 2

    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda repo_id, **more: asked.append((repo_id, more["revision"])) or str(tmp_path / "out"),
    )
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(Encoder.from_pretrained("me/encoder", revision="v1")(images), encoder(images))
    assert asked == [("me/encoder", "v1")]


def test_what_is_no_encoder_is_said(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **more: object) -> None:
        raise ConnectionError("no route to the hub")

    with pytest.raises(RunError, match="is a run: load it with load_encoder"):
        Encoder.from_pretrained(finished().path)
    with pytest.raises(RunError, match=r"holds no encoder: config\.json is missing \(mocosfl export RUN"):
        Encoder.from_pretrained(tmp_path)
    with pytest.raises(RunError, match="there is no such folder, and it is not owner/name"):
        Encoder.from_pretrained(tmp_path / "nowhere")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(RunError, match="me/encoder cannot be loaded from the Hugging Face hub: no route to the hub"):
        Encoder.from_pretrained("me/encoder")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(RunError, match=r"config\.json is not of an encoder of mocosfl"):
        Encoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(RunError, match="cannot be read"):
        Encoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("settings", [{}, {"model.bottleneck": "C4S2", "model.cut": 3}])
def test_client_half_runs_on_a_device(finished: Finished, settings: dict[str, object]) -> None:
    run = finished(channels=3, size=16, **settings)
    export(run.path, formats=["client"])
    facts = json.loads((run.path / "export" / "client.json").read_text())
    weights = load_file(run.path / "export" / "client.safetensors")
    images = torch.rand(2, 3, 16, 16)
    mean, std = (np.float32(facts[name])[:, None, None] for name in ("mean", "std"))
    latents = built(facts["layers"]).forward((images.numpy() - mean) / std, weights, learns=False)
    assert list(latents.shape[1:]) == facts["latent_shape"]
    encoder = mocosfl.load_encoder(run.path)
    with torch.inference_mode():
        np.testing.assert_allclose(encoder.server(torch.from_numpy(latents)), encoder(images), atol=1e-5)


def test_client_half_that_needs_pytorch_is_said(finished: Finished) -> None:
    run = finished(**{"model.client_norm": "batch", "clients.batch": 2})
    done = export(run.path, formats=["client"])
    assert "layers" not in json.loads((run.path / "export" / "client.json").read_text())
    assert "not its layers (stem.0.1: BatchNorm2d" in done.files[run.path / "export" / "client.json"]


def test_the_command_writes_all_that_can_be_made(finished: Finished, capsys: pytest.CaptureFixture) -> None:
    run = finished()
    assert main(["export", str(run.path), "--license", "mit"]) == 0
    said = capsys.readouterr().out
    folder = run.path / "export"
    for path in folder.iterdir():
        assert f"{path}: " in said
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "config.json", "model.safetensors"),
        *("encoder.onnx", "client.onnx", "client.safetensors", "client.json"),
    }
    assert "onnxruntime and PyTorch differ by at most" in said
    assert "left out, torchvision: a ResNet of torchvision or timm cannot be like this one: model.width=4" in said
    assert json.loads((folder / "client.json").read_text())["license"] == "mit"
    import onnxruntime

    for name in ("encoder.onnx", "client.onnx"):
        session = onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
        assert session.get_modelmeta().custom_metadata_map == {"license": "mit"}

    assert main(["export", str(run.path)]) == 1
    assert "already holds an export; replace it with --overwrite" in capsys.readouterr().err
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert main(["export", str(run.path), "--overwrite", "--formats", "client", "torchvision"]) == 1
    assert "formats=torchvision: a ResNet of torchvision" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before

    assert main(["export", str(run.path), "--overwrite", "--formats", "client"]) == 0
    assert {path.name for path in folder.iterdir()} == {"client.safetensors", "client.json"}
    assert "license" not in json.loads((folder / "client.json").read_text())
    Run.create(run.path, run.config, overwrite=True)
    assert not folder.exists()


def test_without_the_packages_for_onnx(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_onnx, "PACKAGES", ("no_such_package",))
    run = finished()
    done = export(run.path)
    assert done.left_out.keys() == {"onnx", "torchvision"}
    assert done.left_out["onnx"] == "not installed: no_such_package; pip install no_such_package"
    assert (run.path / "export" / "model.safetensors").exists()
    with pytest.raises(SettingError, match="formats=onnx: not installed: no_such_package"):
        export(run.path, overwrite=True, formats=["onnx"])


def test_what_is_refused_touches_nothing(finished: Finished, tmp_path: Path) -> None:
    run = finished()
    with pytest.raises(RunError, match="is not a run"):
        export(tmp_path / "nowhere")
    with pytest.raises(SettingError, match="license=my own: expected an SPDX identifier"):
        export(run.path, license="my own")
    with pytest.raises(RunError, match=r"holds files that are not of an export \(config\.yaml, data\.json"):
        export(run.path, out=run.path, overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file is a file; choose another folder"):
        export(run.path, out=tmp_path / "file")
    assert not (run.path / "export").exists()
    (run.path / "encoder.json").unlink()
    with pytest.raises(RunError, match=r"encoder\.json is missing \(it is written when training ends\)"):
        export(run.path)
