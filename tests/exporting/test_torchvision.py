"""State dicts for others' ResNets, held to a plain ResNet with their names for everything."""

import json

import pytest
import torch
from safetensors.torch import load, save
from shaken import shaken
from torch import Tensor, nn

from mocosfl.config import ModelSettings
from mocosfl.encoder import Encoder
from mocosfl.errors import SettingError
from mocosfl.exporting.torchvision import torchvision_weights


class Block(nn.Module):
    def __init__(self, inputs: int, planes: int, stride: int, wide: bool) -> None:
        super().__init__()
        outputs = 4 * planes if wide else planes
        kernels = [(inputs, planes, 1, 1), (planes, planes, 3, stride), (planes, outputs, 1, 1)]
        if not wide:
            kernels = [(inputs, planes, 3, stride), (planes, planes, 3, 1)]
        for number, (a, b, kernel, step) in enumerate(kernels, start=1):
            setattr(self, f"conv{number}", nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False))
            setattr(self, f"bn{number}", nn.BatchNorm2d(b))
        self.convolutions = len(kernels)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for number in range(1, self.convolutions + 1):
            y = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(y))
            if number < self.convolutions:
                y = y.relu()
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class PlainResNet(nn.Module):
    """As torchvision has it: 7x7 stem with max-pool, width 64, BatchNorm, and a classifier that is taken away."""

    def __init__(self, depths: tuple[int, ...], wide: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = 64
        for stage, depth in enumerate(depths):
            blocks = []
            for index in range(depth):
                blocks.append(Block(channels, 64 * 2**stage, 2 if stage and not index else 1, wide))
                channels = 64 * 2**stage * (4 if wide else 1)
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return x.mean(dim=(2, 3))


SHAPES = {"resnet18": ((2, 2, 2, 2), False), "resnet34": ((3, 4, 6, 3), False), "resnet50": ((3, 4, 6, 3), True)}


@pytest.mark.parametrize(
    ("backbone", "stem", "cut", "client_norm", "server_norm", "channels"),
    [
        ("resnet18", "224", 1, "group", "group", 3),
        ("resnet18", "32", 3, "group", "batch", 1),
        ("resnet34", "64", 5, "batch", "batch", 3),
        ("resnet50", "224", 4, "batch", "batch", 3),
    ],
)
def test_a_plain_resnet_computes_the_same(
    backbone: str, stem: str, cut: int, client_norm: str, server_norm: str, channels: int
) -> None:
    settings = ModelSettings(backbone=backbone, stem=stem, cut=cut, client_norm=client_norm, server_norm=server_norm)
    encoder = shaken(Encoder(settings, channels, 32))
    weights, facts = torchvision_weights(encoder)
    weights, facts = load(save(weights)), json.loads(json.dumps(facts))

    model = PlainResNet(*SHAPES[facts["model"]])
    model.conv1 = nn.Conv2d(**facts["conv1"])
    if not facts["maxpool"]:
        model.maxpool = nn.Identity()
    for name, (groups, of) in facts["group_norm"].items():
        model.set_submodule(name, nn.GroupNorm(groups, of))
    model.load_state_dict(weights)
    mean, std = (torch.tensor(facts[name])[:, None, None] for name in ("mean", "std"))
    images = torch.rand(2, channels, 32, 32)
    with torch.inference_mode():
        expected = encoder(images)
        found = model.eval()((images - mean) / std)
    assert expected.std(dim=0).mean() > 1e-3  # features tell the images apart
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_network_of_their_shape_needs_no_change() -> None:
    encoder = Encoder(ModelSettings(client_norm="batch", server_norm="batch"), 3, 224)
    weights, facts = torchvision_weights(encoder)
    theirs = PlainResNet(*SHAPES["resnet18"]).state_dict()
    assert {name: tensor.shape for name, tensor in weights.items()} == {n: t.shape for n, t in theirs.items()}
    assert facts["maxpool"]
    assert not facts["group_norm"]
    assert {"conv1.weight", "bn1.running_var", "layer1.0.conv1.weight", "layer2.0.downsample.1.bias"} <= weights.keys()


def test_what_no_such_resnet_can_be_is_said() -> None:
    with pytest.raises(SettingError, match=r"model\.width=16: theirs have 64; model\.bottleneck=C4S2: theirs have no"):
        torchvision_weights(Encoder(ModelSettings(width=16, bottleneck="C4S2"), 3, 32))
