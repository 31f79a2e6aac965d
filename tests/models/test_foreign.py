"""Networks of transformers and of the user, cut at a layer's name."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tests.tiny import digits
from torch import Tensor, nn
from transformers import AutoModel, ResNetConfig, SwinConfig, ViTConfig

import mocosfl
from mocosfl import trust
from mocosfl.cli import main
from mocosfl.config import Config, ModelSettings
from mocosfl.encoder import Encoder
from mocosfl.errors import MocosflError, SettingError
from mocosfl.experiment import networks
from mocosfl.models import build
from mocosfl.models.foreign import settled, without_paths
from mocosfl.models.layers import seeded
from mocosfl.models.split import backbone_of
from mocosfl_device.randomness import stream

CONFIGS = {
    "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic"),
    "vit": ViTConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, patch_size=4, image_size=16
    ),
    "swin": SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2, patch_size=2, drop_path_rate=0.0),
}
"""One of convolutions; one with a class token; one whose layers take more than a tensor and have buffers of indices."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A vision transformer as transformers saves it, for images of 16 pixels."""
    with seeded(7):
        AutoModel.from_config(CONFIGS["vit"]).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def settings_of(kind: str, **changes: object) -> ModelSettings:
    return ModelSettings(backbone="hf:somewhere", architecture=json.dumps(CONFIGS[kind].to_dict()), **changes)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_of_transformers_cut_at_every_layer_is_the_whole_one(kind: str) -> None:
    settings = settings_of(kind, cut="unknown")
    with seeded(stream(3, "backbone")):
        config = type(CONFIGS[kind]).from_dict(CONFIGS[kind].to_dict() | {"image_size": 16})
        whole = AutoModel.from_config(config).train()
        names = [piece.name for piece in backbone_of(settings, 3, 16).pieces]
    images = torch.randn(2, 3, 16, 16)
    hidden = whole(images).last_hidden_state
    expected = {"resnet": lambda: hidden.mean(dim=(2, 3)), "vit": lambda: hidden[:, 0], "swin": lambda: hidden.mean(1)}[
        kind
    ]()
    expected.square().sum().backward()
    theirs = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    with pytest.raises(SettingError, match=rf"model.cut=unknown: .* after one of its layers: {', '.join(names)}"):
        build(settings, 3, 16, 3)

    for number, cut in enumerate(names):
        model = build(settings.model_copy(update={"cut": cut}), 3, 16, 3)
        latents = model.client(images)
        assert latents.shape[1:] == model.latent_shape
        received = latents.detach().requires_grad_()
        features = model.server(received)
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
        assert features.shape == (2, model.features)
        features.square().sum().backward()
        latents.backward(received.grad)
        ours = [p.grad for half in (model.client, model.server) for p in half.parameters() if p.grad is not None]
        assert len(ours) == len(theirs)  # the pooler, which the output does not need, is in neither
        for found, gradient in zip(ours, theirs.values(), strict=True):
            torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-5)
        assert len(list(model.client.children())) == number + 1


def test_layers_may_be_named_by_what_they_are_in() -> None:
    model = build(settings_of("resnet", cut="encoder.stages.0", bottleneck="C4S2"), 3, 16, 0)
    names = [name for name, _ in model.client.named_children()]
    assert names[-2:] == ["encoder_stages_0_layers_0", "bottleneck"]
    assert model.latent_shape == (4, 2, 2)
    assert model.server(model.client(torch.randn(2, 3, 16, 16))).shape == (2, 16)
    with pytest.raises(SettingError, match=r"model.bottleneck=C4S2: .* 17 tokens of 12 numbers"):
        build(settings_of("vit", cut="embeddings", bottleneck="C4S2"), 3, 16, 0)


def test_a_run_is_loaded_again_when_the_source_is_gone(folder: Path, tmp_path: Path) -> None:
    changes = {"data.size": 16, "model.backbone": f"hf:{folder}", "model.cut": "layers.0", "model.width": 64}
    config = digits(**changes, **{"train.epochs": 0.02, "sync.every": 1})
    assert settled(config.model).architecture is not None
    shutil.move(folder, tmp_path / "elsewhere")
    with pytest.raises(SettingError, match="there is no such folder"):
        settled(config.model)
    shutil.move(tmp_path / "elsewhere", folder)
    # one client, so that nothing but the encoder is tried here
    result = mocosfl.train(config.updated({"clients.number": 1}), tmp_path / "run")
    shutil.rmtree(folder)
    again = mocosfl.load_encoder(tmp_path / "run")
    images = torch.rand(3, 1, 16, 16)
    torch.testing.assert_close(again(images), result.encoder.cpu()(images))
    assert Config.from_yaml(tmp_path / "run" / "config.yaml").model == again.settings
    assert main(["export", str(tmp_path / "run"), "--formats", "huggingface"]) == 0
    exported = Encoder.from_pretrained(tmp_path / "run" / "export")
    assert torch.equal(exported(images), again(images))


def test_what_others_see_names_no_path(folder: Path) -> None:
    public = without_paths(ModelSettings(backbone=f"hf:{folder}", cut="layers.0"))
    assert public.backbone == "hf:vit"
    assert str(folder) not in public.model_dump_json()
    assert build(public, 3, 16, 0).latent_shape == (17, 12)


def test_a_pre_trained_model_is_started_from(folder: Path) -> None:
    config = digits(
        **{"model.backbone": f"hf:{folder}", "model.cut": "layers.0", "model.pretrained": True, "model.width": 64}
    )
    trained = AutoModel.from_pretrained(folder).eval()
    images = torch.rand(2, 3, 16, 16)
    encoder, _ = networks(config, 3, 16, fresh=True)
    torch.testing.assert_close(encoder.eval()(images), trained(images).last_hidden_state[:, 0])
    other, _ = networks(config, 3, 16, fresh=False)  # a checkpoint follows
    assert not torch.allclose(other.eval()(images), encoder(images))
    with pytest.raises(SettingError, match=r"weights may be for images of another size: set data.size"):
        networks(config, 3, 32, fresh=True)


def test_code_that_comes_with_a_model_is_not_run(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    values["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
    values["_attn_implementation"] = "someone/kernel"
    (folder / "evil.py").write_text("raise SystemExit('run')\n")
    (folder / "config.json").write_text(json.dumps(values))
    settings = ModelSettings(backbone=f"hf:{folder}", cut="embeddings")
    assert build(settings, 3, 16, 0).latent_shape == (17, 12)
    assert "evil" not in (settled(settings).architecture or "")
    (folder / "config.json").write_text(json.dumps(values | {"model_type": "evil"}))
    with pytest.raises(SettingError, match="no models of type evil; code that comes with a model is not run"):
        build(settings, 3, 16, 0)


TIMM = {"model_type": "timm_backbone", "backbone": "resnet18"}


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (TIMM, "model_type=timm_backbone"),
        ({"model_type": "timm_wrapper", "architecture": "resnet18"}, "model_type=timm_wrapper"),
        ({"model_type": "upernet", "backbone_config": TIMM}, "model_type=timm_backbone"),
        (
            {"model_type": "llava", "vision_config": {"model_type": "dpt", "backbone_config": TIMM}},
            "model_type=timm_ba",
        ),
        ({"model_type": "vit", "several": [{"one": TIMM}]}, "model_type=timm_backbone"),
        ({"model_type": "detr", "use_timm_backbone": True}, "use_timm_backbone=True"),
        ({"model_type": "upernet", "backbone": "someone/model"}, "backbone=someone/model"),
        (
            {"model_type": "llava", "vision_config": {"model_type": "dpt", "backbone": "someone/model"}},
            "backbone=someone",
        ),
        ({"model_type": "detr"}, "backbone=resnet50|model_type=timm_backbone"),  # by default
    ],
)
def test_a_configuration_that_has_a_network_fetched_is_refused(
    values: dict, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *address, **_: asked.append(address) or [])
    for pretrained in (False, True):
        with pytest.raises(SettingError, match=rf"model.backbone=hf:somewhere: its configuration has ({found})"):
            build(ModelSettings(backbone="hf:somewhere", architecture=json.dumps(values)), 3, 32, 0, pretrained)
    assert not asked


def test_a_configuration_that_asks_for_nothing_elsewhere_is_accepted() -> None:
    inner = CONFIGS["resnet"].to_dict()
    values = CONFIGS["vit"].to_dict() | {"backbone": None, "use_timm_backbone": False, "backbone_config": inner}
    model = build(ModelSettings(backbone="hf:somewhere", architecture=json.dumps(values), cut="embeddings"), 3, 16, 0)
    assert model.latent_shape == (17, 12)


def test_batch_norm_on_a_client_with_one_image_is_refused(tmp_path: Path) -> None:
    CONFIGS["resnet"].save_pretrained(tmp_path)
    config = digits(
        **{"model.backbone": f"hf:{tmp_path}", "model.cut": "embedder", "model.width": 64, "clients.batch": 1}
    )
    with pytest.raises(SettingError, match=r"clients.batch=1: the client half of .* has BatchNorm"):
        networks(config, 1, 8, fresh=True)


# The user's own


class Sum(nn.Module):
    """A residual block whose sum is made in place, between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y += x
        return self.act(y)


class Flat(nn.Module):
    """What is made of the pool's output is made between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.pool, self.fc = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(self.body(x)), 1))


class Across(nn.Module):
    """A sum over all layers but the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(self.b(x) + x)


def own(channels: int, size: int) -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(inplace=True)), Sum(), nn.Dropout(0.5)
    )


def shared(channels: int, size: int) -> nn.Module:
    block = Sum()
    return nn.Sequential(nn.Conv2d(channels, 4, 3), block, block)


class Tied(nn.Module):
    """A residual block that goes by two names through one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.a = self.b = layer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x))


def tied(channels: int, size: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 4, 3), Tied(nn.Conv2d(4, 4, 1)))


def tied_statistics(channels: int, size: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 4, 3), Tied(nn.BatchNorm2d(4, affine=False)))


def tied_nothing(channels: int, size: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 4, 3), Tied(nn.ReLU()))


def flat(channels: int, size: int) -> nn.Module:
    return Flat()


def across(channels: int, size: int) -> nn.Module:
    return Across()


class Named(nn.Module):
    """Its layers have the names of those that a cut adds."""

    def __init__(self) -> None:
        super().__init__()
        self.bottleneck, self.pool, self.pool_ = nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(4, 6, 1)
        self.flatten = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.flatten(self.pool_(self.pool(self.bottleneck(x))))


def named(channels: int, size: int) -> nn.Module:
    return Named()


def nothing(channels: int, size: int) -> None:
    return None


def wrong(channels: int, size: int) -> nn.Module:
    return nn.Conv2d(channels + 1, 4, 3)


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """All functions of this file."""
    monkeypatch.setitem(sys.modules, "own_networks", sys.modules[__name__])
    names = ("own", "shared", "flat", "across", "named", "nothing", "wrong", "none")
    names += ("tied", "tied_statistics", "tied_nothing")
    monkeypatch.setenv(trust.VARIABLE, ",".join(f"own_networks:{name}" for name in names))


@pytest.mark.usefixtures("trusted")
def test_a_network_of_the_user_is_cut_between_its_layers() -> None:
    settings = ModelSettings(backbone="python:own_networks:own", cut="9")
    with pytest.raises(SettingError, match=r"model.cut=9: .* after one of its layers: 0.0, 0.1, 1, 2$"):
        build(settings, 3, 8, 0)
    model = build(settings.model_copy(update={"cut": "0"}), 3, 8, 0)
    with seeded(stream(0, "backbone")):
        whole = own(3, 8).eval()
    images = torch.randn(2, 3, 8, 8)
    assert model.latent_shape == (4, 8, 8)
    assert torch.equal(model.client(images), whole[0](images))
    assert torch.equal(model.server.eval()(model.client(images)), whole(images).mean(dim=(2, 3)))
    assert model.server.train().get_submodule("2.layer").training  # a layer that does nothing in eval mode is kept


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("cut", ["bottleneck", "pool", "pool_", "flatten"])
def test_layers_may_have_the_names_of_those_that_a_cut_adds(cut: str) -> None:
    with seeded(stream(0, "backbone")):
        whole = Named()
    images = torch.randn(2, 3, 8, 8)
    settings = ModelSettings(backbone="python:own_networks:named", cut=cut)
    model = build(settings, 3, 8, 0)
    assert torch.equal(model.server(model.client(images)), whole(images).mean(dim=(2, 3)))
    # with a bottleneck every layer is there beside its pair
    narrowed = build(settings.model_copy(update={"bottleneck": "C2S1"}), 3, 8, 0)
    latents = narrowed.client(images)
    narrow, widen = narrowed.client[-1], narrowed.server[0]
    assert torch.equal(latents, narrow(model.client(images)))
    assert torch.equal(narrowed.server(latents), model.server(widen(latents)))


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("flat", "it is no sequence of layers, .* it is one up to pool"),
        ("across", "it is no sequence of layers, .* it is one up to b"),
        ("shared", "1 and 1_2 share weights"),
        ("tied", "in its layer 1 a.weight and b.weight are the same weights"),
        ("tied_statistics", "in its layer 1 a.running_mean and b.running_mean are the same weights"),
        ("nothing", "made no torch.nn.Module but NoneType"),
        ("wrong", "cannot be run on images of 3x8x8: RuntimeError"),
        ("none", "has no attribute 'none'"),
    ],
)
def test_what_cannot_be_cut_is_refused(name: str, words: str) -> None:
    with pytest.raises(SettingError, match=f"model.backbone=python:own_networks:{name}: .*{words}"):
        build(ModelSettings(backbone=f"python:own_networks:{name}", cut="0"), 3, 8, 0)


FAULTY = """
import torch
from torch import nn

def no_size(channels):
    return nn.Conv2d(channels, 4, 3)

def fails(channels, size):
    return {}["layers"]

class Two(nn.Module):
    def forward(self, x):
        return x.view(2, *x.shape[1:])

def two(channels, size):
    return nn.Sequential(Two())

class Reads(nn.Module):
    def forward(self, x):
        return x * float(x.new_ones(1).sum())

def reads(channels, size):
    return nn.Sequential(nn.Conv2d(channels, 4, 3), Reads())
"""


@pytest.mark.parametrize(
    ("function", "words", "kind"),
    [
        ("faulty_networks:no_size", r"no_size\(3, 8\), called with .*: TypeError: no_size\(\) takes 1", TypeError),
        ("faulty_networks:fails", r"fails\(3, 8\), called with .*: KeyError: 'layers'", KeyError),
        ("faulty_networks:two", "cannot be run on another number of images of 3x8x8: RuntimeError: ", RuntimeError),
        ("faulty_networks:reads", r"tensors without numbers \(device meta\): \w+Error: ", Exception),
        (
            "no_python:net",
            r"net of the module no_python cannot be had: SyntaxError: .*no_python\.py, line 1",
            SyntaxError,
        ),
        ("divides:net", "net of the module divides cannot be had: ZeroDivisionError: ", ZeroDivisionError),
        ("ends:net", "net of the module ends cannot be had: SystemExit: 3", SystemExit),
        ("nowhere_at_all:net", "ModuleNotFoundError: No module named 'nowhere_at_all'", ModuleNotFoundError),
    ],
)
def test_whatever_code_of_the_user_raises_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, words: str, kind: type[BaseException]
) -> None:
    monkeypatch.setenv(trust.VARIABLE, function)
    monkeypatch.syspath_prepend(tmp_path)
    texts = {"faulty_networks": FAULTY, "no_python": "def :", "divides": "1 / 0", "ends": "raise SystemExit(3)"}
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(SettingError, match=f"^model.backbone=python:{function}: .*{words}") as caught:
        build(ModelSettings(backbone=f"python:{function}", cut="0"), 3, 8, 0)
    assert isinstance(caught.value.__cause__, kind)


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("{bad", "^model.architecture={bad: is no JSON: "),
        ("[1]", r"^model.architecture=\[1\]: expected the configuration of a model of transformers"),
        ('{"model_type": ["vit"]}', "^model.architecture=.*: expected the configuration .*, with its model_type"),
        ('{"model_type": "vit", "hidden_size": "many"}', r"^model.backbone=hf:somewhere: it cannot be built: \w+: "),
        ('{"model_type": "vit", "hidden_act": "none"}', "^model.backbone=hf:somewhere: it cannot be built: KeyError: "),
    ],
)
def test_configurations_of_which_nothing_can_be_built(architecture: str, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        build(ModelSettings(backbone="hf:somewhere", architecture=architecture, cut="embeddings"), 3, 8, 0)


@pytest.mark.usefixtures("trusted")
def test_a_layer_without_weights_may_have_two_names() -> None:
    assert build(ModelSettings(backbone="python:own_networks:tied_nothing", cut="0"), 3, 8, 0).features == 4


NETWORK = """
from torch import nn
def net(channels, size):
    open("was-run", "a").close()
    return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 8, 3))
"""


def test_a_folder_runs_code_only_where_that_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trust, "_trusted", set())
    monkeypatch.delenv(trust.VARIABLE, raising=False)
    Path("my_network.py").write_text(NETWORK)
    ran = Path("was-run")
    changes = {"model.backbone": "python:my_network:net", "model.cut": "0", "model.width": 64, "train.epochs": 0.02}
    config = digits(**changes)
    with pytest.raises(MocosflError, match=r"nobody has allowed here; .* MOCOSFL_TRUST_CODE=my_network:net"):
        mocosfl.train(config, "run")
    assert not ran.exists()
    monkeypatch.setattr(sys, "path", list(sys.path))
    mocosfl.trust_code("my_network:net")
    result = mocosfl.train(config, "run")
    assert ran.exists()
    ran.unlink()

    monkeypatch.setattr(trust, "_trusted", set())
    for refused in (
        lambda: mocosfl.load_encoder("run"),
        lambda: mocosfl.train(Config.from_yaml("run/config.yaml"), "run", resume=True),
        lambda: mocosfl.evaluate("run"),
    ):
        with pytest.raises(MocosflError, match="nobody has allowed here"):
            refused()
    assert main(["evaluate", "run"]) == 1
    assert not ran.exists()
    monkeypatch.setenv(trust.VARIABLE, "other:net,my_network:net")
    images = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(mocosfl.load_encoder("run")(images), result.encoder.cpu()(images))


def test_what_is_typed_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trust, "_trusted", set())
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("typed_network.py").write_text(NETWORK)
    assert main(["models", "python:typed_network:net", "--size", "8"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines if line and line[0].isdigit()] == ["0", "1", "2", "3"]
