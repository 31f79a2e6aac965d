"""Every backbone, cut at every place, is the same network."""

import io
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tests.tiny import digits
from torch import Tensor, nn

from mocosfl.cli import main
from mocosfl.config import BACKBONES, CacheSettings, ModelSettings
from mocosfl.errors import SettingError
from mocosfl.exporting.to_onnx import to_onnx
from mocosfl.footprint.backbones import cuts_of
from mocosfl.latent_cache import RecallingCohort, augmented_latents
from mocosfl.models import build
from mocosfl.models.description import describe
from mocosfl.models.layers import GroupNorm, WSConv2d, seeded, with_plain_filters
from mocosfl.models.mobilenet import InvertedResidual
from mocosfl.models.side_by_side import SideBySide
from mocosfl.models.split import SplitModel, backbone_of, split
from mocosfl.models.vgg import vgg
from mocosfl.models.vit import Block, PatchEmbedding
from mocosfl.privacy.decoder import Decoder
from mocosfl.reporting.backbones import overview, short, table
from mocosfl_device.randomness import stream

PUBLISHED = {  # at 224 pixels, less the classifier's 1,000 * (features + 1)
    "resnet18": 11_689_512 - 513_000,
    "resnet34": 21_797_672 - 513_000,
    "resnet50": 25_557_032 - 2_049_000,
    "resnet101": 44_549_160 - 2_049_000,
    "resnet152": 60_192_808 - 2_049_000,
    "vgg11": 132_868_840 - 123_642_856,  # three linear layers there
    "vgg13": 133_053_736 - 123_642_856,
    "mobilenetv2": 3_504_872 - 1_281_000,
    "vit_tiny": 5_717_416 - 193_000,
    "vit_small": 22_050_664 - 385_000,
}
MACS = {  # published or torchvision's, in thousands of millions, at 224 pixels, with a classifier of 0.0002 to 0.002
    "resnet18": 1.81,
    "vgg11": 7.48,
    "mobilenetv2": 0.300,
    "vit_tiny": 1.26,
    "vit_small": 4.61,
}


def parameters(*networks: nn.Module) -> list[nn.Parameter]:
    return [p for network in networks for p in network.parameters()]


def gradients(model: SplitModel, images: Tensor, through_the_cut: bool) -> tuple[Tensor, list[Tensor]]:
    """Features, and the gradient of a loss at all weights; with the latents sent, and their gradient sent back."""
    latents = model.client(images)
    received = latents.detach().requires_grad_() if through_the_cut else latents
    features = model.server(received)
    features.square().sum().backward()
    if through_the_cut:
        latents.backward(received.grad)
    return features.detach(), [p.grad for p in parameters(model.client, model.server)]


@pytest.mark.parametrize("name", ["vgg11", "vgg13", "mobilenetv2", "vit_tiny"])
def test_cut_anywhere_it_is_the_uncut_network(name: str) -> None:
    settings = ModelSettings(backbone=name, width=4)
    size = 32 if name.startswith("vgg") else 8
    images = torch.randn(2, 3, size, size)
    with seeded(stream(5, "backbone")):
        whole = backbone_of(settings, 3, size)
    uncut = nn.Sequential(*(piece.module for piece in whole.pieces), *whole.ending.values())
    expected = uncut(images)
    expected.square().sum().backward()
    found = cuts_of(settings, 3, size)
    assert len(found.cuts) == len(whole.pieces)
    for cut in found.cuts:
        ours, theirs = ([piece.module for piece in half] for half in split(whole.pieces, cut.cut, whole.unit))
        with torch.no_grad():
            latents = nn.Sequential(*ours)(images)
            assert torch.equal(nn.Sequential(*theirs, *whole.ending.values())(latents), expected)
        assert latents.shape[1:] == cut.latent_shape
        assert latents[0].numel() == cut.numbers
    for cut in (found.cuts[0], found.cuts[1], found.cuts[5], found.cuts[-1]):
        model = build(settings.model_copy(update={"cut": cut.cut}), 3, size, seed=5)
        features, of_weights = gradients(model, images, through_the_cut=True)
        assert torch.equal(features, expected)
        for ours, theirs in zip(of_weights, uncut.parameters(), strict=True):
            assert torch.equal(ours, theirs.grad)
        assert model.latent_shape == cut.latent_shape
        assert features.shape[1] == model.features == found.features
        assert sum(p.numel() for p in parameters(model.client)) == cut.client_parameters
        assert sum(p.numel() for p in parameters(model.server)) == cut.server_parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_have_their_published_size(name: str) -> None:
    with torch.device("meta"):
        backbone = backbone_of(ModelSettings(backbone=name), 3, 224)
    layers = [*(piece.module for piece in backbone.pieces), *backbone.ending.values()]
    assert sum(p.numel() for p in parameters(*layers)) == PUBLISHED[name]


@pytest.mark.parametrize("name", MACS)
def test_published_networks_compute_as_much_as_published(name: str) -> None:
    found = cuts_of(ModelSettings(backbone=name), 3, 224)
    assert found.macs == pytest.approx(1e9 * MACS[name], rel=0.02)
    assert found.parameters == PUBLISHED[name]
    for before, after in pairwise(found.cuts):
        assert before.client_parameters < after.client_parameters
        assert before.client_macs < after.client_macs
        assert {found.parameters} == {cut.client_parameters + cut.server_parameters for cut in (before, after)}
        assert {found.macs} == {cut.client_macs + cut.server_macs for cut in (before, after)}


def test_existing_networks_keep_their_weights() -> None:
    """Drawn as before, layer after layer, to the bit."""
    for client_norm in ("group", "batch"):
        model = build(ModelSettings(width=8, cut=3, bottleneck="C4S2", client_norm=client_norm), 3, 32, seed=3)
        convs = [m for half in (model.client, model.server) for m in half.modules() if isinstance(m, nn.Conv2d)]
        narrow, last = convs.pop(3), list(model.server.modules())[2]
        assert isinstance(last, nn.ConvTranspose2d)
        with seeded(stream(3, "backbone")):
            for conv in convs:
                shape = (conv.in_channels, conv.out_channels, conv.kernel_size)
                drawn = nn.Conv2d(*shape, bias=False)
                nn.init.kaiming_normal_(drawn.weight, mode="fan_out", nonlinearity="relu")
                assert torch.equal(conv.weight, drawn.weight)
            pair = nn.Conv2d(8, 4, 3), nn.ConvTranspose2d(4, 8, 3)
            for conv, drawn in zip((narrow, last), pair, strict=True):
                nn.init.kaiming_normal_(drawn.weight, nonlinearity="relu")
                assert torch.equal(conv.weight, drawn.weight)


@pytest.mark.parametrize("name", ["vgg11", "mobilenetv2", "vit_tiny"])
@pytest.mark.parametrize(("size", "last"), [(32, 4), (64, 4), (224, 7)])
def test_images_of_all_sizes(name: str, size: int, last: int) -> None:
    found = cuts_of(ModelSettings(backbone=name, width=8), 1, size)
    if name == "vgg11":
        assert found.cuts[-1].latent_shape[1:] == (size // 32, size // 32)
    elif name == "mobilenetv2":
        assert found.cuts[-1].latent_shape[1:] == (last, last)
    else:
        assert found.cuts[-1].latent_shape == (1 + (196 if size == 224 else 64), 24)


def test_a_vision_transformer_computes_what_the_paper_says() -> None:
    """Its attention against one that is spelled out, and pooling."""
    model = build(ModelSettings(backbone="vit_tiny", width=4, cut=1), 3, 8, seed=0)
    block = model.server.get_submodule("block1")
    x = torch.randn(2, 5, 12)
    y = block.norm1(x)
    q, k, v = block.qkv(y).chunk(3, dim=2)
    heads = []
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / 2).softmax(dim=2)  # the root of 4
        heads.append(weights @ v[..., part])
    attended = x + block.projection(torch.cat(heads, dim=2))
    torch.testing.assert_close(block(x), attended + block.mlp(block.norm2(attended)))

    averaged = build(ModelSettings(backbone="vit_tiny", width=4, cut=13, pooling="mean"), 3, 8, seed=0)
    assert model.latent_shape == (5, 12)
    assert averaged.latent_shape == (4, 12)  # no class token
    tokens = torch.randn(2, 4, 12)
    torch.testing.assert_close(averaged.server(tokens), averaged.server.norm(tokens).mean(dim=1))
    last = build(ModelSettings(backbone="vit_tiny", width=4, cut=13), 3, 8, seed=0)
    tokens = torch.randn(2, 5, 12)
    torch.testing.assert_close(last.server(tokens), last.server.norm(tokens[:, 0]))


@pytest.mark.parametrize("name", ["vgg11", "mobilenetv2"])
def test_norms_are_chosen_for_each_half(name: str) -> None:
    model = build(ModelSettings(backbone=name, width=8, cut=3, client_norm="group", server_norm="batch"), 3, 32, 0)
    ours, theirs = ([type(m) for m in half.modules()] for half in (model.client, model.server))
    kinds = {GroupNorm, WSConv2d, nn.BatchNorm2d, nn.Conv2d}
    assert kinds & set(ours) == {GroupNorm, WSConv2d}
    assert kinds & set(theirs) == {nn.BatchNorm2d, nn.Conv2d}
    images = torch.randn(2, 3, 32, 32)
    plain = with_plain_filters(model.client)
    assert not any(isinstance(m, WSConv2d) for m in plain.modules())
    torch.testing.assert_close(plain(images), model.client(images))


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_depthwise_blocks_side_by_side(norm: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(InvertedResidual(8, 8, 1, 2, norm), InvertedResidual(8, 16, 2, 3, norm)).double()
    together = SideBySide(network, [2, 3], torch.device("cpu"))
    for stack in together.weights.values():
        stack.data += 0.1 * torch.randn_like(stack)
    images = torch.randn(1, 5, 8, 6, 6, dtype=torch.float64)
    found = together.forward(images)[0]
    for number, piece in enumerate(images[0].split([2, 3])):
        state = {name: stack.data[number] for name, stack in together.weights.items()}
        network.load_state_dict(state, strict=False)
        torch.testing.assert_close(found[:2] if number == 0 else found[2:], network.train()(piece))


@pytest.mark.parametrize(
    ("settings", "size", "words"),
    [
        ({"backbone": "vgg11", "cut": 9}, 32, "model.cut=9: .* can be cut after 1, 2, 3, 4, 5, 6, 7, 8 convolutions"),
        ({"backbone": "mobilenetv2", "cut": 2}, 32, "model.cut=2: .* after 1, 3, 6, 9, .*, 51, 52 convolutions"),
        ({"backbone": "vit_tiny", "cut": 14}, 32, r"model.cut=14: .* after 1, 2, .*, 13 layers \(the patch embedding"),
        ({"backbone": "resnet18", "cut": "stem"}, 32, "model.cut=stem: .* after 1, 3, 5"),
        ({"cut": 0}, 32, "model.cut=0: input should be greater than or equal to 1"),
        ({"cut": -1}, 32, "model.cut=-1: input should be greater than or equal to 1"),
        ({"cut": 1.5}, 32, "model.cut=1.5: expected"),
        ({"backbone": "vit_small", "bottleneck": "C4S2"}, 32, "model.bottleneck=C4S2: .* 65 tokens of 384 numbers"),
        (
            {"backbone": "vit_small", "client_norm": "batch"},
            32,
            "model.client_norm=batch: vit_small has LayerNorm alone",
        ),
        ({"backbone": "vit_small"}, 30, r"data.size=30: .* 4 pixels a side here \(model.stem=32\)"),
        ({"backbone": "vgg13"}, 31, "data.size=31: vgg13 halves its images 5 times; it takes at least 32 pixels"),
        ({"backbone": "vgg13", "stem": "32"}, 32, "model.stem=32: it means nothing to vgg13; leave it unset"),
        ({"pooling": "mean"}, 32, "model.pooling=mean: it means nothing to resnet18; leave it unset"),
        ({"pretrained": True}, 32, "model.pretrained=True: only hf: backbones have a source; leave it at False"),
        ({"backbone": "python:x"}, 32, "model.backbone=python:x: expected resnet18, "),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict, size: int, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        build(ModelSettings(**settings), 3, size, 0)


def test_a_cut_that_comes_as_text_is_a_number() -> None:
    assert ModelSettings(cut="3") == ModelSettings(cut=3)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vgg11", "stage1_0.2: MaxPool2d cannot be computed without PyTorch"),
        ("mobilenetv2", "stem.1: ReLU6 cannot be computed without PyTorch"),
        ("vit_tiny", "embedding: PatchEmbedding cannot be computed without PyTorch"),
    ],
)
def test_clients_without_pytorch_say_what_they_cannot_compute(name: str, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        describe(build(ModelSettings(backbone=name, width=8), 3, 32, 0).client)


def test_the_page_shows_what_the_command_prints() -> None:
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\$ (mocosfl models.*)\n((?:(?!```).*\n)+)", text, re.MULTILINE))
    few = [cuts_of(ModelSettings(backbone=name), 3, 32) for name in ("vgg11", "mobilenetv2", "vit_tiny")]
    tables = {
        "mocosfl models": overview(few),
        "mocosfl models resnet18 --bottleneck C4S2": table(cuts_of(ModelSettings(bottleneck="C4S2"), 3, 32)),
    }
    assert shown.keys() == tables.keys()
    for command, made in tables.items():
        console = Console(width=120, file=io.StringIO())
        console.print(made)
        rows = [line.split() for line in console.file.getvalue().splitlines() if line.strip()]
        rows = [row for row in rows if "─" not in row[0]]
        assert len(rows) > 4
        page = [line.split() for line in shown[command].splitlines()]
        for row in rows:
            assert row in page
    assert [row[0] for row in map(str.split, shown["mocosfl models"].splitlines()) if row and row[0] in BACKBONES] == [
        *BACKBONES
    ]


def test_models_prints_and_writes_what_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "figures" / "vgg.json"
    assert main(["models", "vgg11", "--width", "8", "--bottleneck", "C4S2", "--json", str(out)]) == 0
    written, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert [cut["cut"] for cut in written["cuts"]] == [1, 2, 3, 4, 5, 6, 7]  # one pixel after the last
    model = build(ModelSettings(backbone="vgg11", width=8, bottleneck="C4S2"), 3, 32, 0)
    first = written["cuts"][0]
    assert tuple(first["latent_shape"]) == model.latent_shape == (4, 8, 8)
    assert (first["numbers"], first["latent_bytes"]) == (256, 1024)
    assert first["client_parameters"] == sum(p.numel() for p in parameters(model.client))
    assert first["server_parameters"] == sum(p.numel() for p in parameters(model.server))
    assert first["client_macs"] == 32 * 32 * 27 * 8 + 8 * 8 * 72 * 4
    assert short(first["server_parameters"]) in printed
    assert "4x8x8" in printed

    assert main(["models", "vit_tiny", "--bottleneck", "C4S2"]) == 1
    assert main(["models", "resnet"]) == 1
    assert main(["models", "--stem", "64"]) == 1
    assert "expected resnet18" in capsys.readouterr().err
    for size, limit in (("3", "greater than or equal to 4"), ("600", "less than or equal to 512")):
        assert main(["models", "--size", size]) == 1
        assert capsys.readouterr().err == f"error: data.size={size}: input should be {limit}\n"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1 k"),
        (1856, "1.86 k"),
        (42_490_624, "42.5 M"),
        (999_499, "999 k"),
        (999_999, "1 M"),
        (262_144_000_000, "262 G"),
        (5_000_000_000_000, "5 T"),
    ],
)
def test_numbers_in_three_digits(number: int, text: str) -> None:
    assert short(number) == text


@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet152", 512), ("vgg13", 512), ("mobilenetv2", 512), ("vit_small", 224)],
)
def test_tables_fit_narrow_terminals(name: str, size: int) -> None:
    """No figure is cut off, folded or left out."""
    found = cuts_of(ModelSettings(backbone=name), 3, size)
    console = Console(width=60, file=io.StringIO())
    console.print(table(found))
    console.print(overview([found]))
    printed = console.file.getvalue()
    assert "…" not in printed
    lines = [line.split() for line in printed.splitlines()]
    for cut in found.cuts:
        counts = (cut.client_parameters, cut.server_parameters, 2 * cut.client_macs, 2 * cut.server_macs)
        figures = " ".join(map(short, counts)).split()
        latent = "x".join(map(str, cut.latent_shape))
        assert [str(cut.cut), cut.after, *figures, latent, *short(4 * cut.numbers).split()] in lines
    assert lines[-1][0] == name
    assert lines[-1][-1] == latent


@pytest.mark.soak
def test_their_pieces_become_onnx() -> None:
    """One of each kind, one after another."""
    with seeded(0):
        network = nn.Sequential(
            vgg("vgg11", 8, 3, 32, 8, "group", "group")[0].module,  # to 8 channels of 16x16
            InvertedResidual(8, 8, 1, 2, "group"),
            nn.ReLU6(),
            PatchEmbedding(8, 16, 4, 12, class_token=True),
            Block(12, 3),
        )
    file, difference = to_onnx(with_plain_filters(network), (3, 32, 32), "latents")
    assert len(file) > 1000
    assert difference < 1e-4


@pytest.mark.parametrize("shape", [(17, 6), (18, 6), (16, 6), (9,)], ids=str)
def test_latents_of_other_shapes_can_be_attacked_and_kept(shape: tuple[int, ...]) -> None:
    decoder = Decoder(shape, (1, 8, 8), 1, 4, 0).eval()
    latents = torch.randn(3, *shape)
    assert decoder(latents).shape == (3, 1, 8, 8)
    if shape == (18, 6):  # the two tokens before the patches say nothing of a place
        other = latents.clone()
        other[:, :2] += 1
        assert torch.equal(decoder(other), decoder(latents))
        swapped = latents[:, [0, 1, 6, *range(3, 6), 2, *range(7, 18)]]  # the first patches of two rows
        assert not torch.allclose(decoder(swapped), decoder(latents))

    pair = torch.ones(2, 3, *shape)
    pair[:, 1] *= 10
    ids = np.arange(3)
    noise = augmented_latents(pair, CacheSettings(noise=0.1), 0, ids, ids, 0) - pair
    sizes = noise.flatten(2).square().mean(dim=2).sqrt()
    assert ((sizes / torch.tensor([0.1, 1.0, 0.1]) - 1).abs() < 0.9).all()  # of each latent's own size
    frozen = digits(**{"clients.frozen": True, "cache.views": 2, "cache.flip": 0.5, "train.epochs": 2})
    with pytest.raises(SettingError, match=r"cache.flip=0.5: latents of .* have no pixels to move"):
        RecallingCohort(None, frozen, np.full(3, 4), shape, torch.device("cpu"))
