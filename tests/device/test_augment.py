"""Views that a client without PyTorch makes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mocosfl.config import AugmentSettings
from mocosfl.data.augment import augment, policy_of
from mocosfl_device.augment import AugmentParameters, augmented

SETTINGS = {
    "v1": AugmentSettings(policy="v1"),
    "v2": AugmentSettings(),
    "all": AugmentSettings(jitter_p=1, blur_p=1, hue=0.5, brightness=1.5, contrast=2, saturation=3),
    "nothing": AugmentSettings(crop_scale=(1, 1), jitter_p=0, grey_p=0, blur_p=0, flip_p=0),
}


def pixels(n: int, channels: int, size: int) -> np.ndarray:
    """Noise, and images with areas of one colour, where hue and chroma are borders of their definitions."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, channels, size, size), dtype=np.uint8)
    images[::3] = rng.choice(np.array([0, 128, 255], np.uint8), (len(images[::3]), channels, 1, 1))
    return images


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", SETTINGS)
def test_views_are_those_of_the_simulator(name: str, channels: int) -> None:
    policy, n, size = policy_of(SETTINGS[name]), 300, 20
    parameters = AugmentParameters.draw(policy, size, seed=3, client=7, draw=np.arange(n), view=1)
    images = pixels(n, channels, size)
    ours = augmented(images, parameters, policy)
    assert ours.shape == images.shape
    assert ours.dtype == np.float32
    theirs = augment(torch.from_numpy(images), parameters, policy).numpy()
    # a colour near grey has no stable hue: the least rounding error before a large saturation turns it
    apart = np.abs(ours - theirs)
    assert np.quantile(apart, 0.999) < 1e-5
    assert apart.max() < 1e-3


def test_an_augmentation_that_does_nothing_returns_the_image() -> None:
    policy = policy_of(SETTINGS["nothing"])
    parameters = AugmentParameters.draw(policy, 8, seed=0, client=0, draw=np.arange(9), view=0)
    images = pixels(9, 3, 8)
    np.testing.assert_allclose(augmented(images, parameters, policy), images / np.float32(255), atol=1e-6)
