"""Every attack where it must succeed, and where there is nothing to find."""

import pytest
import torch
from torch import Tensor, nn

from mocosfl.config import AugmentSettings, ModelSettings
from mocosfl.data.augment import policy_of
from mocosfl.models import build
from mocosfl.privacy.attacks import Training, Victim, decode, fuse_views, optimise, train_decoder
from mocosfl.privacy.decoder import Decoder
from mocosfl.privacy.defences import Noise
from mocosfl.privacy.scores import identified, ssim

SIZE, COUNT = 16, 8
MEAN, STD = torch.full((3,), 0.5), torch.full((3,), 0.25)
POLICY = policy_of(AugmentSettings(crop_scale=(0.2, 1.0), blur_p=0))
SMALL = Training(blocks=1, channels=16, steps=300, batch=16, lr=3e-3)
STRONG = Training(blocks=1, channels=16, steps=250, batch=32, lr=5e-3, loss="both", views=True)


class Silent(nn.Module):
    """A client half that tells nothing."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :1] * 0 + 0.7


def undefended() -> Victim:
    half = build(ModelSettings(width=16), 3, SIZE, 0).client
    return Victim(half, MEAN, STD, POLICY)


def reconstructions(victim: Victim, known: Tensor, images: Tensor) -> dict[str, Tensor]:
    sent, strong = victim.send(images), train_decoder(victim, known, STRONG, 0)
    return {
        "decoder": decode(train_decoder(victim, known, SMALL, 0), sent),
        "strong": decode(strong, sent),
        "whitebox": optimise(victim, sent, tuple(images.shape[1:]), 2, 600, 0, 0.03),
        "views": fuse_views(victim, strong, images, 16, 200),
    }


def test_attacks_invert_an_undefended_stem(photos):
    made = reconstructions(undefended(), photos(200, SIZE), photos(COUNT, SIZE, seed=1))
    images = photos(COUNT, SIZE, seed=1)
    found = {name: float(ssim(images, pictures).mean()) for name, pictures in made.items()}
    assert min(found.values()) > 0.8, found


@pytest.mark.soak
def test_attacks_find_nothing_where_there_is_nothing(photos):
    images = photos(COUNT, SIZE, seed=1)
    gallery = torch.cat([images, photos(60, SIZE, seed=2)])
    for name, made in reconstructions(Victim(Silent(), MEAN, STD, POLICY), photos(60, SIZE), images).items():
        assert float(ssim(images, made).mean()) < 0.35, name
        assert int(identified(made, gallery, torch.arange(COUNT)).sum()) <= 2, name


def test_auxiliary_images_do_where_there_is_no_defence(photos):
    """A decoder that has seen the photographs upside down alone."""
    victim, images = undefended(), photos(COUNT, SIZE, seed=1)
    decoder = train_decoder(victim, photos(200, SIZE).flip(2), STRONG, 0)
    assert float(ssim(images, decode(decoder, victim.send(images))).mean()) > 0.8


def test_one_seed_one_result(photos):
    images = photos(20, SIZE)
    few = Training(blocks=1, channels=8, steps=5, batch=8, views=True, loss="both")

    def outcome(seed: int) -> list[Tensor]:
        victim = Victim(build(ModelSettings(width=8), 3, SIZE, 0).client, MEAN, STD, POLICY, Noise(0.1))
        decoder, sent = train_decoder(victim, images, few, seed), victim.send(images)
        return [decode(decoder, sent), optimise(victim, sent, (3, SIZE, SIZE), 2, 5, seed)]

    torch.manual_seed(1)
    first = outcome(0)
    torch.manual_seed(2)
    for one, other in zip(first, outcome(0), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(first, outcome(1), strict=True):
        assert not torch.equal(one, other)


def test_the_attacker_sees_what_is_sent(photos):
    """With a defence that draws noise, two messages about one image differ, and both differ from the clean latents."""
    images = photos(4, SIZE)
    clean, victim = undefended(), Victim(undefended().half, MEAN, STD, POLICY, Noise(0.5))
    first, second = victim.send(images), victim.send(images)
    assert not torch.equal(first, second)
    error = (first - clean.send(images)).flatten(1).norm(dim=1) / clean.send(images).flatten(1).norm(dim=1)
    assert error.tolist() == pytest.approx([0.5] * 4, rel=0.1)


@pytest.mark.parametrize(("latent", "image"), [((4, 16, 16), 32), ((8, 4, 4), 32), ((8, 8, 8), 8), ((4, 3, 3), 20)])
def test_a_decoder_makes_images_of_their_size(latent, image):
    made = Decoder(latent, (3, image, image), 1, 8, 0)(torch.randn(2, *latent)).detach()
    assert made.shape == (2, 3, image, image)
    assert float(made.min()) >= 0
    assert float(made.max()) <= 1
