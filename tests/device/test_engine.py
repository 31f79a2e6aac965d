"""The half in numpy computes what PyTorch computes, forward and backward."""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn

from mocosfl.config import ModelSettings
from mocosfl.models import build
from mocosfl.models.description import describe
from mocosfl_device.engine import built


def numbers(network: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy().copy() for name, p in network.named_parameters()}


@pytest.mark.parametrize(
    ("backbone", "cut", "bottleneck", "size"),
    [
        ("resnet18", 1, "none", 8),
        ("resnet18", 1, "C4S2", 8),
        ("resnet18", 1, "C3S4", 32),  # in slices, as all with a bottleneck at cut 1
        ("resnet18", 3, "C4S2", 8),
        ("resnet18", 7, "C4S2", 16),
        ("resnet50", 4, "C4S2", 16),
    ],
)
@pytest.mark.parametrize("stem", ["32", "64"])
def test_equals_autograd(backbone: str, cut: int, bottleneck: str, size: int, stem: str) -> None:
    settings = ModelSettings(backbone=backbone, width=12, cut=cut, bottleneck=bottleneck, stem=stem)
    half = build(settings, 3, size, seed=1).client
    with torch.no_grad():
        for parameter in half.parameters():  # norms that do nothing would hide mistakes
            parameter.add_(0.3 * torch.randn_like(parameter))
    ours = built(json.loads(json.dumps(describe(half))))
    x = torch.randn(2, 3, size, size, requires_grad=True)
    y = half(x)
    gradient = torch.randn_like(y)
    y.backward(gradient)

    weights, image = numbers(half), x.detach().numpy()
    np.testing.assert_allclose(ours.forward(image, weights, learns=False), y.detach().numpy(), atol=1e-4)
    np.testing.assert_allclose(ours.forward(image, weights, learns=True), y.detach().numpy(), atol=1e-4)
    into = {name: np.zeros_like(w) for name, w in weights.items()}
    of_x = ours.backward(gradient.numpy(), weights, into, wanted=True)
    assert x.grad is not None
    np.testing.assert_allclose(of_x, x.grad.numpy(), atol=1e-4)
    for name, parameter in half.named_parameters():
        assert parameter.grad is not None
        scale = max(1.0, float(parameter.grad.abs().max()))
        np.testing.assert_allclose(into[name] / scale, parameter.grad.numpy() / scale, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 2, 1), (3, 1, 1), (1, 2, 0), (1, 1, 0), (7, 2, 3), (5, 4, 2)]
)
def test_a_convolution_of_a_small_map(kernel: int, stride: int, padding: int, size: int) -> None:
    """Places of the kernel that see no pixel, too."""
    conv = nn.Conv2d(3, 4, kernel, stride, padding)
    x = torch.randn(2, 3, size, size, requires_grad=True)
    y = conv(x)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    ours, weights = built(describe(nn.Sequential(conv))), {f"0.{name}": w for name, w in numbers(conv).items()}
    image = x.detach().numpy()
    np.testing.assert_allclose(ours.forward(image, weights, learns=True), y.detach().numpy(), atol=1e-5)
    into = {name: np.zeros_like(w) for name, w in weights.items()}
    np.testing.assert_allclose(ours.backward(gradient.numpy(), weights, into, True), x.grad.numpy(), atol=1e-5)
    for name, parameter in conv.named_parameters():
        np.testing.assert_allclose(into[f"0.{name}"], parameter.grad.numpy(), atol=1e-4)


def test_a_client_at_width_64_holds_little() -> None:
    """Tensors of a step at batch 1, besides the weights: by numpy's own account of its memory."""
    half = build(ModelSettings(bottleneck="C4S2"), 3, 32, seed=0).client
    ours, weights = built(describe(half)), numbers(half)
    into = {name: np.zeros_like(w) for name, w in weights.items()}
    image, gradient = np.zeros((1, 3, 32, 32), np.float32), np.ones((1, 4, 16, 16), np.float32)
    tracemalloc.start()
    ours.forward(image, weights, learns=True)
    ours.backward(gradient, weights, into, wanted=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    held = 4 * sum(w.nbytes for w in weights.values())  # both halves, the optimiser, the gradient
    assert peak + held < 500_000


def test_input_is_left_alone_and_gradients_add_up() -> None:
    half = build(ModelSettings(width=8, bottleneck="C4S2"), 3, 8, seed=0).client
    ours, weights = built(describe(half)), numbers(half)
    image = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    before = image.copy()
    once, twice = ({name: np.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    for into, times in ((once, 1), (twice, 2)):
        for _ in range(times):
            y = ours.forward(image, weights, learns=True)
            ours.backward(np.ones_like(y), weights, into, wanted=False)
    assert np.array_equal(image, before)
    for name in weights:
        np.testing.assert_allclose(twice[name], 2 * once[name], rtol=1e-5, atol=1e-5)


def test_what_cannot_be_computed_is_named() -> None:
    with pytest.raises(TypeError, match=r"1\.0: BatchNorm2d cannot be computed without PyTorch"):
        describe(nn.Sequential(nn.ReLU(), nn.Sequential(nn.BatchNorm2d(4))))
    with pytest.raises(TypeError, match="0: Conv2d in groups cannot"):
        describe(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)))
    with pytest.raises(ValueError, match="a layer of unknown kind 'attention'"):
        built([{"kind": "attention"}])
