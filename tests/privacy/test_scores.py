"""SSIM beside its definition with scipy's Gaussian filter; the other scores by hand."""

import math

import pytest
import torch
from scipy.ndimage import gaussian_filter

from mocosfl.privacy.scores import identified, mse, psnr, ssim


def by_definition(x, y):
    """Wang et al. (2004) for one channel: Gaussian window of 11 pixels and sigma 1.5, wholly inside the image."""

    def local(values):
        return gaussian_filter(values, 1.5, truncate=3.5)[5:-5, 5:-5]

    mx, my = local(x), local(y)
    vx, vy, cov = local(x * x) - mx**2, local(y * y) - my**2, local(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return (((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()


def test_ssim_is_that_of_the_definition(photos):
    x = photos(4, 24).double()
    y = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
    expected = [sum(by_definition(*(t[i, c].numpy() for t in (x, y))) for c in range(3)) / 3 for i in range(4)]
    assert ssim(x, y).tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.allclose(ssim(x, x), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("size", [4, 7, 8, 11, 13])
def test_ssim_of_small_images(size):
    x = torch.rand(3, 1, size, size)
    assert torch.allclose(ssim(x, x), torch.ones(3))
    assert (ssim(x, torch.rand_like(x)) < 0.9).all()


def test_gradient_of_ssim():
    x, y = torch.rand(2, 1, 12, 12, dtype=torch.float64), torch.rand(2, 1, 12, 12, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: ssim(t, y), x.requires_grad_())


def test_mse_and_psnr():
    x = torch.full((2, 1, 4, 4), 0.5)
    y = x + torch.tensor([0.1, 0.0]).view(2, 1, 1, 1)
    assert mse(x, y).tolist() == pytest.approx([0.01, 0])
    assert psnr(x, y).tolist() == [pytest.approx(20, abs=1e-4), math.inf]


def test_shapes_must_agree():
    for score in (ssim, mse, psnr):
        with pytest.raises(ValueError, match="one shape"):
            score(torch.rand(2, 3, 8, 8), torch.rand(2, 1, 8, 8))


def test_identified(photos):
    gallery = photos(40, 16)
    truth = torch.tensor([3, 30])
    dark = 0.4 * gallery[truth]  # of the wrong brightness and contrast, and still the right image
    assert identified(gallery[truth], gallery, truth).all()
    assert identified(dark, gallery, truth).all()
    assert not identified(gallery[[5, 6]], gallery, truth).any()
    constant = gallery.mean(dim=0).expand(40, -1, -1, -1)
    assert identified(constant, gallery, torch.arange(40)).sum() <= 2  # one guess for all, in either way of comparing
