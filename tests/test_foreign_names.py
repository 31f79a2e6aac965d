"""Weights under the names of torchvision, timm and ourselves, of every kind of backbone, give the features they gave.

The networks of others are written here once more, with their names and without ours.
"""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mocosfl.config import ModelSettings
from mocosfl.encoder import Encoder
from mocosfl.errors import SettingError
from mocosfl.foreign import load_weights, open_encoder

sys.path.insert(0, str(Path(__file__).parent / "exporting"))
from shaken import shaken

RGB = {"mean": (0.5, 0.25, 0.375), "std": (0.25, 0.5, 0.125)}


class Vgg(nn.Module):
    """torchvision's vgg11_bn and vgg13_bn."""

    def __init__(self, plan: str, width: int, norm: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for stage, convolutions in enumerate(map(int, plan)):
            for _ in range(convolutions):
                planes = width * min(2**stage, 8)
                layers.append(nn.Conv2d(channels, planes, 3, padding=1))
                layers += [nn.BatchNorm2d(planes)] if norm else []
                layers.append(nn.ReLU())
                channels = planes
            layers.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).mean(dim=(2, 3))


def conv_bn_relu(inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())


class Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        self.residual = stride == 1 and inputs == outputs
        hidden = expansion * inputs
        layers = [] if expansion == 1 else [conv_bn_relu(inputs, hidden, 1, 1)]
        layers += [conv_bn_relu(hidden, hidden, 3, stride, hidden)]
        self.conv = nn.Sequential(*layers, nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNet(nn.Module):
    """torchvision's mobilenet_v2 with the width multiplier 1/4; ``strides`` of the stem and the second stage."""

    def __init__(self, strides: tuple[int, int] = (2, 2)) -> None:
        super().__init__()
        stages = [(1, 8, 1, 1), (6, 8, 2, strides[1]), (6, 8, 3, 2), (6, 16, 4, 2)]
        stages += [(6, 24, 3, 1), (6, 40, 3, 2), (6, 80, 1, 1)]
        layers: list[nn.Module] = [conv_bn_relu(3, 8, 3, strides[0])]
        channels = 8
        for expansion, planes, depth, stride in stages:
            for number in range(depth):
                layers.append(Inverted(channels, planes, stride if number == 0 else 1, expansion))
                channels = planes
        self.features = nn.Sequential(*layers, conv_bn_relu(80, 1280, 1, 1))
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(1280, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).mean(dim=(2, 3))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for q, k, v in zip(*(part.chunk(self.heads, dim=2) for part in self.qkv(x).chunk(3, dim=2)), strict=True):
            outputs.append((q @ k.transpose(1, 2) / math.sqrt(q.shape[2])).softmax(dim=2) @ v)
        return self.proj(torch.cat(outputs, dim=2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, heads), nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(self.norm2(x))))


class Vit(nn.Module):
    """timm's vit_tiny_patch16_224 and the like."""

    def __init__(self, heads: int, patch: int, size: int, token: bool = True) -> None:
        super().__init__()
        width = 64 * heads
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch, patch)
        if token:
            self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, (size // patch) ** 2 + token, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(12)))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, 2)
        self.token = token

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed.proj(x).flatten(2).mT
        if self.token:
            x = torch.cat([self.cls_token.expand(len(x), 1, -1), x], dim=1)
        x = self.norm(self.blocks(x + self.pos_embed))
        return x[:, 0] if self.token else x.mean(dim=1)


def prepared(network: nn.Module) -> nn.Module:
    """With norms that do something, and weights that let signals through."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.ndim == 1 and tensor.is_floating_point():
                tensor.add_(0.2 * torch.rand(tensor.shape, generator=generator))
            elif tensor.ndim == 4:
                nn.init.kaiming_normal_(tensor, mode="fan_in", generator=generator)
    return network.eval()


THEIRS = {
    "vgg11": lambda: Vgg("11222", 4),
    "vgg13": lambda: Vgg("22222", 4),
    "mobilenetv2": MobileNet,
    "vit_tiny": lambda: Vit(3, 16, 32),
    "vit_small": lambda: Vit(6, 8, 32),
}


@pytest.mark.parametrize(
    ("arch", "make", "told", "prefix"),
    [
        *((arch, make, {}, "") for arch, make in THEIRS.items()),
        ("mobilenetv2", lambda: MobileNet((1, 1)), {"stem": "32"}, "module."),
        ("vit_tiny", lambda: Vit(3, 4, 32, token=False), {}, "backbone."),
        ("vgg11", THEIRS["vgg11"], {}, "module.encoder_q."),
    ],
)
@torch.no_grad()
def test_features_are_theirs(arch: str, make: type, told: dict, prefix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = prepared(make())
    state = {f"{prefix}{name}": w for name, w in theirs.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "w.pth")
    images = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    mean, std = (torch.tensor(RGB[name], dtype=torch.float64)[:, None, None] for name in ("mean", "std"))
    expected = theirs.double()((images - mean) / std)
    assert expected.std(dim=0).mean() > 1e-3  # features tell the images apart
    found = load_weights(tmp_path / "w.pth", arch, 32, **RGB, **told)
    assert not found.training
    torch.testing.assert_close(found.double()(images), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"backbone": "resnet50", "width": 4, "cut": 4}, 8),
        ({"backbone": "resnet18", "width": 4, "cut": 5, "client_norm": "batch"}, 56),  # the stem for 64
        ({"backbone": "vgg13", "width": 4, "cut": 3, "server_norm": "batch"}, 32),
        ({"backbone": "mobilenetv2", "width": 20, "cut": 6}, 16),
        ({"backbone": "vit_tiny", "cut": 2}, 8),
        ({"backbone": "vit_tiny", "cut": 1, "pooling": "mean", "stem": "64"}, 8),
    ],
)
@torch.no_grad()
def test_names_of_ours(settings: dict, size: int, tmp_path: Path) -> None:
    """As an encoder has them, alone and in a network of the user's, and as its halves do one after the other."""
    encoder = shaken(Encoder(ModelSettings(**settings), 3, size))
    images = torch.rand(3, 3, size, size)
    expected = encoder(images)
    assert expected.std(dim=0).mean() > 1e-4
    whole = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(2, 2)})
    halves = nn.Sequential(encoder.client, encoder.server, nn.Linear(2, 2))
    told = {"mean": encoder.mean.tolist(), "std": encoder.std.tolist()}
    for state, given in ((encoder.state_dict(), {}), (whole.state_dict(), {}), (halves[:2].state_dict(), told)):
        torch.save(state, tmp_path / "w.pt")
        found = open_encoder(tmp_path / "w.pt", arch=settings["backbone"], size=size, **given)
        assert torch.equal(found(images), expected)
    torch.save(encoder.state_dict(), tmp_path / "w.pt")
    zero = [0.0] * 3
    given = load_weights(
        tmp_path / "w.pt", settings["backbone"], size, mean=zero, std=RGB["std"]
    )  # what is told counts
    assert given.mean.tolist() == zero
    torch.save(halves[:2].state_dict(), tmp_path / "w.pt")
    with pytest.raises(SettingError, match=r"mean=unset: the network in .* takes images of 3 channels"):
        load_weights(tmp_path / "w.pt", settings["backbone"], size)


def changed(make: type, **changes: Tensor | None) -> dict[str, Tensor]:
    return {name: w for name, w in (make().state_dict() | changes).items() if w is not None}


def ours(settings: dict, size: int = 8) -> dict[str, Tensor]:
    return Encoder(ModelSettings(**settings), 3, size).state_dict()


VGG11, VIT = THEIRS["vgg11"], THEIRS["vit_tiny"]
NORM = torch.zeros(192)


@pytest.mark.parametrize(
    ("arch", "weights", "told", "words"),
    [
        (
            "vgg13",
            lambda: changed(VGG11),
            {},
            r"does not fit vgg13 for 32 pixels: missing are features\.3\.weight, .* and 35 more; unexp",
        ),
        (
            "vgg11",
            lambda: changed(lambda: Vgg("11222", 4, norm=False)),
            {},
            r"holds no vgg11 with .* without BatchNorm",
        ),
        (
            "resnet18",
            lambda: changed(VGG11),
            {},
            r"holds no resnet18 with weights conv1\.weight, .* it holds features\.0\.weight, .* and 55 more; accepted",
        ),
        ("vgg11", lambda: changed(VGG11), {"size": 31}, "data.size=31: vgg11 halves its images 5 times"),
        ("vgg11", lambda: changed(VGG11), {"stem": "32"}, "model.stem=32: it means nothing to vgg11"),
        (
            "vgg11",
            lambda: changed(VGG11, **{"extra.bias": NORM}),
            {},
            r"unexpected are extra\.bias; accepted are vgg11_bn",
        ),
        ("mobilenetv2", lambda: changed(VGG11), {}, "holds no mobilenetv2 with .* timm's names are others"),
        (
            "mobilenetv2",
            lambda: changed(MobileNet, **{"features.18.0.weight": torch.zeros(1280, 448, 1, 1)}),
            {},
            "no multiple of 4 as model.width makes 448 channels",
        ),
        (
            "mobilenetv2",
            lambda: changed(MobileNet, **{"features.18.0.weight": None}),
            {},
            r"missing are features\.18\.0\.weight; of other shapes are .*accepted are mobilenet_v2",
        ),
        ("vit_small", lambda: changed(VIT), {}, "its tokens have 192 numbers, not 384, and how many attention heads"),
        (
            "vit_tiny",
            lambda: changed(VIT),
            {"size": 48},
            r"of other shapes are pos_embed has \(1, 5, 192\), not \(1, 10,",
        ),
        (
            "vit_tiny",
            lambda: changed(VIT, **{"norm.weight": None, "fc_norm.weight": NORM}),
            {},
            r"missing are norm\.weight; unexpected are fc_norm\.weight; accepted are .*with the norm before",
        ),
        ("vit_tiny", lambda: changed(VIT, dist_token=NORM), {}, "unexpected are dist_token"),
        (
            "vit_tiny",
            lambda: changed(VIT, **{"blocks.3.attn.qkv.bias": None}),
            {},
            r"missing are blocks\.3\.attn\.qkv\.bias; accepted",
        ),
        (
            "vit_tiny",
            lambda: changed(VIT, **{"patch_embed.proj.weight": torch.zeros(192, 3, 14, 14)}),
            {},
            "its patches have 14 pixels a side; accepted are 4, 8, 16",
        ),
        (
            "vit_small",
            lambda: {f"module.base_encoder.{name}": w for name, w in changed(VIT).items()},
            {},
            r"module\.base_encoder\.\.\.\. are those of MoCo v3, whose vit_small has 12 attention heads",
        ),
        ("vit_tiny", lambda: ours({"backbone": "vit_tiny", "width": 4}), {}, r"have 12 numbers.*; Encoder\.save\("),
        (
            "resnet18",
            lambda: ours({"width": 4, "bottleneck": "C4S2"}),
            {},
            r"unexpected are bottleneck\.0\.weight, .* without a bottleneck pair",
        ),
        (
            "resnet34",
            lambda: ours({"width": 4}),
            {},
            r"does not fit resnet34 .*missing are stage1_2\.body\.0\.0\.weight",
        ),
    ],
)
def test_what_is_not_the_same_network_is_named(
    arch: str, weights: type, told: dict, words: str, tmp_path: Path
) -> None:
    torch.save(weights(), tmp_path / "w.pth")
    with pytest.raises(SettingError, match=words) as caught:
        load_weights(tmp_path / "w.pth", arch, **{"size": 32} | RGB | told)
    if "data.size" not in words and "model.stem" not in words:
        assert str(tmp_path / "w.pth") in str(caught.value)
        assert arch in str(caught.value)


def test_clients_of_a_list_are_not_taken_for_halves(tmp_path: Path) -> None:
    encoder = Encoder(ModelSettings(width=4), 3, 8)
    clients = nn.ModuleList([Encoder(ModelSettings(width=4), 3, 8).client, encoder.client])
    whole = nn.ModuleDict({"clients": clients, "encoder": encoder})
    torch.save(whole.state_dict(), tmp_path / "w.pt")
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(load_weights(tmp_path / "w.pt", "resnet18", 8)(images), encoder.eval()(images))
    whole = nn.ModuleDict({"0": encoder, "1": Encoder(ModelSettings(width=4), 3, 8, seed=1)})
    torch.save(whole.state_dict(), tmp_path / "w.pt")
    with pytest.raises(SettingError, match=r"holds several networks; choose one of 0\., 1\."):
        load_weights(tmp_path / "w.pt", "resnet18", 8)
    found = load_weights(tmp_path / "w.pt", "resnet18", 8, prefix="0.")
    assert torch.equal(found(images), encoder(images))
