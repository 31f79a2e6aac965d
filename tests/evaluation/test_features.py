import pytest
import torch
from torch import nn

from mocosfl.evaluation import extract


@pytest.fixture
def encoder() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_equals_direct_calls_in_eval_mode(encoder: nn.Module, images: torch.Tensor) -> None:
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    features = extract(encoder, iter(images.split(3)))
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    with torch.no_grad():
        expected = torch.cat([encoder.eval()(part) for part in images.split(3)])
    assert torch.equal(features, expected)
    assert features.shape == (7, 4)


def test_restores_the_mode_of_every_module(encoder: nn.Module, images: torch.Tensor) -> None:
    encoder.train()
    encoder[1].eval()  # a frozen BatchNorm in a model that trains
    modes = [module.training for module in encoder.modules()]
    extract(encoder, [images])
    assert [module.training for module in encoder.modules()] == modes
    assert len(set(modes)) == 2


def test_restores_the_modes_after_a_failure(encoder: nn.Module, images: torch.Tensor) -> None:
    with pytest.raises(RuntimeError):
        extract(encoder, [images, images[:, :1]])
    assert all(module.training for module in encoder.modules())


def test_features_are_ordinary_float32_tensors(encoder: nn.Module, images: torch.Tensor) -> None:
    for batches in ([images.bfloat16()], list(images.bfloat16().split(3))):
        features = extract(encoder.bfloat16(), batches)
        assert features.dtype == torch.float32
        assert not features.is_inference()
        nn.Linear(4, 2)(features).sum().backward()


def test_the_source_of_the_batches_runs_outside_inference_mode(encoder: nn.Module, images: torch.Tensor) -> None:
    made = []

    def batches():
        for part in images.split(4):
            made.append(part * 2)
            yield made[-1]

    extract(encoder, batches())
    assert not any(tensor.is_inference() for tensor in made)


def test_accepts_a_module_without_parameters(images: torch.Tensor) -> None:
    assert torch.equal(extract(nn.Flatten(), images.split(2)), images.flatten(1))


def test_rejects_no_batches_and_features_that_are_not_vectors(encoder: nn.Module, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="no images"):
        extract(encoder, [])
    with pytest.raises(ValueError, match=r"\(7, 4, 6, 6\).*expected \(n, D\)"):
        extract(encoder[0], [images])
