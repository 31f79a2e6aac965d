"""What defences do to latents and gradients."""

import copy

import numpy as np
import pytest
import torch

from mocosfl.config import Config, ResSFLSettings
from mocosfl.privacy.defences import Defence, Dropout, Noise, NoPeek, ResSFL, defence_of, distance_correlation
from mocosfl.privacy.scores import ssim

CPU = torch.device("cpu")


def ressfl(**settings) -> ResSFL:
    values = {"warmup": 0, "blocks": 1, "channels": 8, "ssim_target": 0.0, "weight": 1.5} | settings
    return ResSFL(ResSFLSettings(**values), (4, 8, 8), (3, 16, 16), 0, CPU)


@pytest.fixture
def parts(photos):
    """Latents, images, the images' weights, and gradients of the contrast."""

    def make(count=6):
        latents, contrast = torch.randn(2, count, 4, 8, 8)
        return latents, photos(count, 16), torch.full((count,), 1 / count), contrast

    return make


def test_the_gradient_of_ressfl_is_that_of_finite_differences(parts):
    defence = ressfl(lr=1e-9)
    defence.decoder.double()
    latents, images, shares, contrast = (t.double() for t in parts(3))
    gradient = defence.gradient(latents, images, shares, contrast)

    def loss(z):
        with torch.no_grad():
            return 1.5 * (shares * (ssim(defence.decoder(z), images) - 0.0).clamp(min=0)).sum()

    assert (ssim(defence.decoder(latents), images) > 0.001).any()  # there is something to hide
    for _ in range(4):
        direction, step = torch.randn_like(latents), 1e-6
        slope = (loss(latents + step * direction) - loss(latents - step * direction)) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-4, abs=1e-9)


def test_nothing_to_hide_costs_nothing(parts):
    gradient = ressfl(ssim_target=1.0).gradient(*parts())
    assert (gradient == 0).all()


def test_only_images_above_the_target_are_pushed(parts):
    defence = ressfl(lr=1e-9)
    latents, images, shares, contrast = parts(16)
    similarity = ssim(defence.decoder(latents), images).detach()
    target = float(similarity.median())
    defence.settings = defence.settings.model_copy(update={"ssim_target": target})
    defence.decoder.eval()  # in training, BatchNorm lets one image's latents matter to another
    gradient = defence.gradient(latents, images, shares, contrast)
    similarity = ssim(defence.decoder(latents), images).detach()
    assert torch.equal(gradient.flatten(1).norm(dim=1) > 0, similarity > target)


def test_the_decoder_learns_and_latents_escape_it(parts):
    torch.manual_seed(0)
    defence = ressfl(lr=5e-3)
    latents, images, shares, contrast = parts(16)
    seen = []
    for _ in range(60):
        defence.gradient(latents, images, shares, contrast)
        seen.append(float(defence.metrics["attacker_ssim"]))
    assert np.mean(seen[-5:]) > np.mean(seen[:5]) + 0.1
    defence.settings = defence.settings.model_copy(update={"lr": 1e-9})
    for group in defence.optimizer.param_groups:
        group["lr"] = 0.0
    for _ in range(20):
        latents = latents - 300 * defence.gradient(latents, images, shares, contrast)
    assert float(defence.metrics["attacker_ssim"]) < np.mean(seen[-5:]) - 0.1


def test_warm_up_and_clip(parts):
    given = parts()
    full = ressfl().gradient(*given)
    assert torch.allclose(ressfl(warmup=4).gradient(*given), full / 4)
    clipped = ressfl(clip=1e-4).gradient(*given)
    norms, limit = clipped.flatten(1).norm(dim=1), 1e-4 * given[3].flatten(1).norm(dim=1)
    assert (norms <= limit * 1.001).all()
    assert (norms > 0).any()


def test_ressfl_resumes(parts):
    given, first = parts(), ressfl(warmup=5)
    first.gradient(*given)
    second = ressfl(warmup=5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert torch.equal(first.gradient(*given), second.gradient(*given))


@pytest.mark.parametrize("defence", [Noise(0.5), Dropout(0.3)])
def test_random_defences_are_functions_of_their_seed(defence):
    latents = torch.randn(4, 8, 6, 6)
    assert torch.equal(defence.protect(latents, 1), defence.protect(latents, 1))
    assert not torch.equal(defence.protect(latents, 1), defence.protect(latents, 2))


def test_noise_is_relative_to_the_latents():
    latents = torch.full((2, 8, 32, 32), 3.0)
    noise = Noise(0.5).protect(latents, 0) - latents
    assert float(noise.std()) == pytest.approx(1.5, rel=0.05)
    assert abs(float(noise.mean())) < 0.05


def test_dropout_keeps_the_mean():
    dropped = Dropout(0.3).protect(torch.ones(2, 8, 32, 32), 0)
    assert float((dropped == 0).float().mean()) == pytest.approx(0.3, abs=0.02)
    assert float(dropped.mean()) == pytest.approx(1, abs=0.02)


def test_distance_correlation():
    def reference(x, y):  # by its definition, in numpy
        def centred(points):
            d = np.linalg.norm(points[:, None] - points[None], axis=2)
            return d - d.mean(axis=0) - d.mean(axis=1, keepdims=True) + d.mean()

        a, b = centred(x), centred(y)
        return np.sqrt((a * b).mean() / np.sqrt((a * a).mean() * (b * b).mean()))

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 5)), rng.normal(size=(30, 3))
    y[:, 0] += x[:, 0]
    assert float(distance_correlation(*map(torch.from_numpy, (x, y)))) == pytest.approx(reference(x, y), abs=1e-5)
    assert float(distance_correlation(*map(torch.from_numpy, (x, 2 * x + 1)))) == pytest.approx(1, abs=1e-5)


def test_nopeek_lowers_the_distance_correlation(parts):
    latents, images, shares, contrast = parts(32)
    latents = torch.nn.functional.interpolate(images.mean(1, keepdim=True), (8, 8)).repeat(1, 4, 1, 1) + 0.1 * latents
    defence, seen = NoPeek(1.0), []
    for _ in range(30):
        gradient = defence.gradient(latents, images, shares, contrast)
        seen.append(float(defence.metrics["distance_correlation"]))
        latents = latents - 1000 * gradient
    assert seen[-1] < seen[0] - 0.1


@pytest.mark.parametrize(
    ("kind", "made"),
    [("none", Defence), ("noise", Noise), ("dropout", Dropout), ("nopeek", NoPeek), ("ressfl", ResSFL)],
)
def test_the_kind_chooses(kind, made):
    config = Config().updated({"defence.kind": kind, "ressfl.channels": 8})
    assert type(defence_of(config, (4, 8, 8), (3, 16, 16), CPU)) is made
