"""ResNets of others: their weights give the features that they gave before, and what does not fit is named."""

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mocosfl.config import ModelSettings
from mocosfl.encoder import Encoder
from mocosfl.errors import RunError, SettingError
from mocosfl.exporting.torchvision import by_their_names, torchvision_weights
from mocosfl.foreign import load_weights, open_encoder

sys.path.insert(0, str(Path(__file__).parent / "exporting"))
from shaken import shaken

HALF = {"mean": (0.5,), "std": (0.25,)}


@pytest.mark.parametrize(
    ("backbone", "stem", "cut", "client_norm", "server_norm", "channels", "size"),
    [
        ("resnet18", "32", 1, "batch", "batch", 3, 16),
        ("resnet18", "64", 1, "group", "group", 1, 16),
        ("resnet18", "224", 5, "group", "batch", 3, 32),
    ],
)
def test_an_export_for_torchvision_comes_back(
    tmp_path: Path, backbone: str, stem: str, cut: int, client_norm: str, server_norm: str, channels: int, size: int
) -> None:
    settings = ModelSettings(backbone=backbone, stem=stem, cut=cut, client_norm=client_norm, server_norm=server_norm)
    encoder = shaken(Encoder(settings, channels, size))
    weights, facts = torchvision_weights(encoder)
    save_file(weights, tmp_path / "torchvision.safetensors")
    (tmp_path / "torchvision.json").write_text(json.dumps(facts))
    images = torch.rand(2, channels, size, size)
    with torch.inference_mode():
        expected = encoder(images)
        assert expected.std(dim=0).mean() > 1e-3  # features tell the images apart
        again = open_encoder(tmp_path / "torchvision.safetensors")
        torch.testing.assert_close(again(images), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        if client_norm == server_norm == "batch":  # as plain BatchNorm it is anybody's ResNet
            (tmp_path / "torchvision.json").unlink()
            told = {"mean": facts["mean"], "std": facts["std"]}
            again = load_weights(tmp_path / "torchvision.safetensors", backbone, size, **told)
            assert torch.equal(again(images), expected)
            assert not again.training


@pytest.fixture(scope="module")
def plain() -> tuple[Encoder, dict[str, Tensor]]:
    """A narrow ResNet-18 for small grey images, and its weights under the names of others."""
    settings = ModelSettings(width=4, stem="32", client_norm="batch", server_norm="batch")
    encoder = shaken(Encoder(settings, 1, 8))
    encoder.mean.fill_(0.5)
    encoder.std.fill_(0.25)
    named = by_their_names(encoder)
    return encoder, {f"{name}.{part}": t for name, module in named.items() for part, t in module.state_dict().items()}


def test_prefixes_and_what_lies_beside_the_network(plain: tuple[Encoder, dict[str, Tensor]], tmp_path: Path) -> None:
    encoder, weights = plain
    images = torch.rand(3, 1, 8, 8)
    kept = {name: w for name, w in weights.items() if "num_batches" not in name}  # very old files have none
    fc = {"fc.weight": torch.zeros(10, 32), "fc.bias": torch.zeros(10)}
    prefixed = {f"module.encoder_q.{name}": w for name, w in (weights | fc).items()} | {"module.queue": torch.zeros(3)}
    checkpoint = {"epoch": 3, "arch": "resnet18", "state_dict": prefixed, "optimizer": {"state": {0: torch.zeros(1)}}}
    forms = {
        "plain.pth": weights,
        "old.pt": kept | fc,
        "backbone.pth": {f"backbone.{name}": w for name, w in weights.items()} | {"head.weight": torch.zeros(3)},
        "encoder.pth": {"model": {f"encoder.{name}": w for name, w in weights.items()}},
        "moco.pth.tar": checkpoint,
        "half.pth": {name: w.double() for name, w in weights.items()},
    }
    for name, content in forms.items():
        torch.save(content, tmp_path / name)
        found = load_weights(tmp_path / name, "resnet18", 8, **HALF)
        assert torch.equal(found(images), encoder(images)), name
        assert (found.size, found.channels, found.settings.width) == (8, 1, 4)
    save_file({f"module.{name}": w.contiguous() for name, w in weights.items()}, tmp_path / "w.safetensors")
    assert torch.equal(load_weights(tmp_path / "w.safetensors", "resnet18", 8, **HALF)(images), encoder(images))


def test_of_two_networks_the_prefix_chooses(plain: tuple[Encoder, dict[str, Tensor]], tmp_path: Path) -> None:
    encoder, weights = plain
    both = {f"module.encoder_q.{name}": w for name, w in weights.items()}
    both |= {f"module.encoder_k.{name}": torch.zeros_like(w) for name, w in weights.items()}
    torch.save({"state_dict": both}, tmp_path / "moco.pth")
    with pytest.raises(
        SettingError,
        match=r"prefix=unset: .* several networks; choose one of state_dict\.module\.encoder_q\., state_dict\.mod",
    ):
        load_weights(tmp_path / "moco.pth", "resnet18", 8, **HALF)
    images = torch.rand(3, 1, 8, 8)
    for prefix in ("module.encoder_q.", "state_dict.module.encoder_q."):
        found = load_weights(tmp_path / "moco.pth", "resnet18", 8, **HALF, prefix=prefix)
        assert torch.equal(found(images), encoder(images))
    with pytest.raises(SettingError, match=r"prefix=encoder\.: .* has state_dict\.module\.encoder_q\., state_dict"):
        load_weights(tmp_path / "moco.pth", "resnet18", 8, **HALF, prefix="encoder.")


@pytest.mark.parametrize(
    ("change", "told", "message"),
    [
        (
            {"bn1.weight": None},
            {},
            r"does not fit resnet18 for 8 pixels with stem 32: missing are bn1\.weight; accepted are ResNets as",
        ),
        ({"conv9.weight": torch.zeros(1)}, {}, r"unexpected are conv9\.weight; accepted"),
        (
            {"layer5.bias": torch.zeros(1), "bn1.bias": None},
            {},
            r"missing are bn1\.bias; unexpected are layer5\.bias; accepted",
        ),
        ({"bn1.bias": torch.zeros(3)}, {}, r"of other shapes are bn1\.bias has \(3,\), not \(4,\)"),
        ({}, {"arch": "resnet34"}, r"missing are layer1\.2\.conv1\.weight.* and \d+ more"),
        ({}, {"stem": "224"}, r"stem 224: of other shapes are conv1\.weight has \(4, 1, 3, 3\), not \(4, 1, 7, 7\)"),
        ({}, {"arch": "resnet19"}, r"arch=resnet19: .* needs one of resnet18, resnet34"),
        ({}, {"arch": None}, r"arch=None: "),
        ({}, {"size": None}, r"size=unset: "),
        ({}, {"mean": ()}, r"mean=unset: the network in .* takes images of 1 channels; expected a number for each"),
        ({}, {"std": (1, 1, 1)}, r"std=1 1 1: the network in"),
        ({}, {"std": (0.0,)}, r"std=0\.0: expected numbers greater than 0 to 1"),
        ({}, {"std": (58.4,)}, r"std=58\.4: .* for pixels in \[0, 1\]; divide by 255"),
        ({}, {"std": (float("nan"),)}, r"std=nan: "),
        ({}, {"mean": (123.7,)}, r"mean=123\.7: expected numbers from 0 to 1, for pixels in \[0, 1\]; divide by 255"),
        ({}, {"mean": (-0.1,)}, r"mean=-0\.1: "),
        ({}, {"mean": (float("nan"),)}, r"mean=nan: "),
        ({"conv1.weight": torch.zeros(4, 5, 3, 3)}, {}, r"takes images of 5 channels; accepted are 1 and 3"),
        ({"conv1.weight": torch.zeros(6, 1, 3, 3)}, {}, r"model\.width=6: "),
        ({"conv1.weight": None}, {}, r"holds no resnet18 with weights conv1\.weight, .*; it holds bn1\.weight, "),
    ],
)
def test_what_does_not_fit_is_named(
    plain: tuple[Encoder, dict[str, Tensor]], tmp_path: Path, change: dict, told: dict, message: str
) -> None:
    weights = {name: w for name, w in (plain[1] | change).items() if w is not None}
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(SettingError, match=message):
        load_weights(tmp_path / "w.pth", **{"arch": "resnet18", "size": 8} | HALF | told)


class Malicious:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("owned"),)


def test_files_that_cannot_be_read(
    plain: tuple[Encoder, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": plain[1], "more": Malicious()}, "bad.pth")
    Path("pickle.pth").write_bytes(pickle.dumps(Malicious()))
    Path("text.safetensors").write_text("no tensors")
    Path("empty.pt").touch()
    torch.save(plain[1] | {"bn1.bias": torch.full((4,), torch.nan)}, "nan.pth")
    for name, message in {
        "bad.pth": r"cannot be read: .*weights_only=True",
        "pickle.pth": "cannot be read",
        "text.safetensors": "cannot be read",
        "empty.pt": "cannot be read",
        "none.pth": "there is no such file",
        "nan.pth": r"not all numbers are finite in bn1\.bias",
    }.items():
        with pytest.raises(RunError, match=message):
            load_weights(name, "resnet18", 8, **HALF)
    assert not Path("owned").exists()
    Path("torchvision.json").write_text("{}")
    save_file(plain[1], "torchvision.safetensors")
    with pytest.raises(RunError, match=r"torchvision\.json cannot be read"):
        load_weights("torchvision.safetensors")


def test_what_says_itself_what_it_is_takes_no_arch(tmp_path: Path) -> None:
    encoder = Encoder(ModelSettings(width=4), 1, 8)
    encoder.save(tmp_path, {})
    assert open_encoder(tmp_path / "encoder.safetensors").features == encoder.features
    with pytest.raises(SettingError, match="arch: is for files of weights of others"):
        open_encoder(tmp_path / "encoder.safetensors", arch="resnet18")
    with pytest.raises(RunError, match="there is no such file or folder"):
        open_encoder(tmp_path / "nowhere", arch="resnet18")
    with pytest.raises(RunError, match="is not a run"):
        open_encoder(tmp_path / "nowhere")
