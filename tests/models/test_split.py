import itertools

import pytest
import torch
from torch import nn

from mocosfl.config import ModelSettings
from mocosfl.errors import SettingError
from mocosfl.models import Bottleneck, build
from mocosfl.models.layers import GroupNorm, WSConv2d, seeded
from mocosfl.models.resnet import resnet
from mocosfl_device.randomness import stream

CUTS = {
    "resnet18": (1, 3, 5, 7, 9, 11, 13, 15, 17),
    "resnet34": (1, 3, 13, 31),
    "resnet50": (1, 4, 7, 49),
    "resnet101": (43,),
}


@pytest.mark.parametrize(("backbone", "cut"), [(b, c) for b, cuts in CUTS.items() for c in cuts])
def test_halves_composed_equal_the_unsplit_model(backbone: str, cut: int) -> None:
    settings = ModelSettings(backbone=backbone, width=4, cut=cut)
    model = build(settings, channels=3, size=32, seed=5)
    with seeded(stream(5, "backbone")):
        pieces = resnet(backbone, 4, 3, "32", cut, "group", "group")
    whole = nn.Sequential(*(piece.module for piece in pieces), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = torch.randn(2, 3, 32, 32)
    latents = model.client(images)
    assert latents.shape[1:] == model.latent_shape
    features = model.server(latents)
    assert torch.equal(features, whole(images))
    assert features.shape == (2, model.features)


def test_gradient_through_the_cut_equals_the_gradient_of_the_unsplit_network() -> None:
    model = build(ModelSettings(width=8, cut=5, bottleneck="C4S2"), channels=3, size=32, seed=0)
    images = torch.randn(3, 3, 32, 32)
    model.server(model.client(images)).square().sum().backward()
    whole = [p.grad.clone() for p in itertools.chain(model.client.parameters(), model.server.parameters())]
    model.client.zero_grad()
    model.server.zero_grad()

    latents = model.client(images)
    received = latents.detach().requires_grad_()
    model.server(received).square().sum().backward()
    latents.backward(received.grad)
    split = [p.grad for p in itertools.chain(model.client.parameters(), model.server.parameters())]
    for a, b in zip(whole, split, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("size", "stem", "latent"),
    [(32, "32", (8, 32, 32)), (64, "64", (8, 32, 32)), (224, "224", (8, 56, 56)), (8, "32", (8, 8, 8))],
)
def test_the_stem_fits_the_images(size: int, stem: str, latent: tuple[int, ...]) -> None:
    chosen = build(ModelSettings(width=8), channels=3, size=size, seed=0)
    asked = build(ModelSettings(width=8, stem=stem), channels=3, size=size, seed=0)
    assert chosen.latent_shape == asked.latent_shape == latent
    assert chosen.server(chosen.client(torch.randn(1, 3, size, size))).shape == (1, 64)


def test_published_resnet18_has_the_published_size() -> None:
    model = build(ModelSettings(), channels=3, size=32, seed=0)
    assert model.latent_shape == (64, 32, 32)  # 65,536 numbers a view
    assert model.features == 512
    convolutions = [
        m for m in itertools.chain(model.client.modules(), model.server.modules()) if isinstance(m, nn.Conv2d)
    ]
    assert len(convolutions) == 17 + 3  # and three shortcuts
    parameters = sum(p.numel() for half in (model.client, model.server) for p in half.parameters())
    assert parameters == 11_168_832  # the usual ResNet-18 for 32x32 images, without its classifier


def test_bottleneck_of_the_paper_sends_1024_numbers() -> None:
    model = build(ModelSettings(cut=3, bottleneck="C4S2"), channels=3, size=32, seed=0)
    assert model.latent_shape == (4, 16, 16)
    assert (model.client(torch.randn(1, 3, 32, 32)) >= 0).all()  # a ReLU ends the client
    assert model.server(torch.randn(1, 4, 16, 16)).shape == (1, 512)


@pytest.mark.parametrize(("text", "shape"), [("C4S1", (4, 32, 32)), ("c2s4", (2, 8, 8))])
def test_bottlenecks_of_other_strides(text: str, shape: tuple[int, ...]) -> None:
    model = build(ModelSettings(width=8, bottleneck=text), channels=3, size=32, seed=0)
    assert model.latent_shape == shape
    assert model.server(model.client(torch.randn(1, 3, 32, 32))).shape == (1, 64)


def test_norms_are_chosen_for_each_half() -> None:
    model = build(ModelSettings(width=8, cut=3, client_norm="group", server_norm="batch"), 3, 32, 0)
    client, server = list(model.client.modules()), list(model.server.modules())
    assert any(isinstance(m, GroupNorm) for m in client)
    assert all(isinstance(m, WSConv2d) for m in client if isinstance(m, nn.Conv2d))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in client)
    assert any(isinstance(m, nn.BatchNorm2d) for m in server)
    assert not any(isinstance(m, GroupNorm | WSConv2d) for m in server)


def test_weight_standardisation_standardises_each_filter() -> None:
    conv = WSConv2d(3, 5, 3, bias=False)
    seen = conv(torch.eye(27).view(27, 3, 3, 3))[:, :, 0, 0].T  # its effective filters, one a row
    torch.testing.assert_close(seen.mean(dim=1), torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(seen.var(dim=1), torch.ones(5))


def test_seed_makes_the_weights_and_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (build(ModelSettings(width=4), 3, 32, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    weights = [next(model.server.parameters()) for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("cut", [2, 18, 40])
def test_a_cut_that_does_not_exist_is_refused(cut: int) -> None:
    with pytest.raises(SettingError, match=rf"model.cut={cut}: .* can be cut after 1, 3, 5, 7, 9, 11, 13, 15, 17 "):
        build(ModelSettings(width=4, cut=cut), 3, 32, 0)


@pytest.mark.parametrize("text", ["C4", "S2", "4x2", "C0S2", "C4S3", ""])
def test_a_bottleneck_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match="expected none, or CxSy"):
        Bottleneck.parse(text)


def test_a_bottleneck_that_does_not_divide_the_latents_is_refused() -> None:
    with pytest.raises(SettingError, match=r"model\.bottleneck=C4S4: stride 4 does not divide the 6x6 pixels"):
        build(ModelSettings(width=4, bottleneck="C4S4"), 1, 6, 0)
