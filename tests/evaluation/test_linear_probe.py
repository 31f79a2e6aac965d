import math

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from mocosfl.evaluation import linear_probe
from mocosfl.evaluation.linear_probe import BATCH, MOMENTUM, fit


def blobs(number, spread, classes=3, dimensions=6, seed=0):
    """Classes around the axes. Small spread: linearly separable."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % classes
    return torch.eye(dimensions)[labels] + spread * torch.randn(number, dimensions, generator=generator), labels


@pytest.fixture(scope="module")
def digits():
    """Pixels of scikit-learn's handwritten digits: 1,297 to train on, 500 to test on."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    pixels, labels = torch.from_numpy(data.data)[order], torch.from_numpy(data.target)[order]
    return pixels[:1297], labels[:1297], pixels[1297:], labels[1297:]


def test_separable_data_gives_100():
    result = linear_probe(*blobs(200, 0.1), *blobs(100, 0.1, seed=1), classes=3, epochs=20)
    assert (result.accuracy, result.train_accuracy) == (100, 100)


def test_close_to_logistic_regression_on_digits(digits):
    train, train_labels, test, test_labels = digits
    std, mean = torch.std_mean(train, dim=0, correction=0)
    std[std == 0] = 1
    reference = LogisticRegression(max_iter=1000).fit((train - mean) / std, train_labels)
    expected = 100 * reference.score((test - mean) / std, test_labels)
    result = linear_probe(train, train_labels, test, test_labels, classes=10)
    # One image of 500 is 0.2; the standard error of either accuracy is 0.9.
    assert result.accuracy == pytest.approx(expected, abs=1)
    assert result.accuracy > 95


def test_improves_with_epochs(digits):
    one, ten, hundred = (linear_probe(*digits, classes=10, epochs=epochs).train_accuracy for epochs in (1, 10, 100))
    assert one < ten < hundred


def test_the_scale_of_features_does_not_matter(digits):
    train, train_labels, test, test_labels = digits
    scale = torch.logspace(-6, 6, train.shape[1], base=2).round().clamp_min(0.125)
    plain = linear_probe(*digits, classes=10, epochs=10)
    scaled = linear_probe(train * scale, train_labels, test * scale, test_labels, classes=10, epochs=10)
    assert scaled.accuracy == pytest.approx(plain.accuracy, abs=0.5)


def test_a_feature_constant_in_training_cannot_spoil_the_test():
    train, train_labels = blobs(300, 0.1)
    test, test_labels = blobs(100, 0.1, seed=1)
    train, test = F.pad(train, (0, 2), value=0.1), F.pad(test, (0, 2), value=50.0)
    assert linear_probe(train, train_labels, test, test_labels, classes=3, epochs=20).accuracy == 100


@pytest.mark.parametrize("number", [5, BATCH, 2 * BATCH + 1])
def test_fit_equals_autograd_and_torch_sgd_after_the_last_epoch(number):
    x, y = blobs(number, 1.0)
    epochs, lr, seed = 7, 0.1, 3
    weight, bias = torch.zeros(3, 6, requires_grad=True), torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr, momentum=MOMENTUM)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * math.ceil(number / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for batch in torch.randperm(number, generator=generator).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(F.linear(x[batch], weight, bias), y[batch]).backward()
            optimizer.step()
            schedule.step()
    found = fit(x, y, 3, epochs, lr, seed)
    torch.testing.assert_close(found[0], weight.detach().T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], bias.detach(), rtol=1e-4, atol=1e-5)


def test_one_seed_one_result_and_global_randomness_left_alone():
    x, y = blobs(600, 1.0)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = fit(x, y, 3, 3, 0.1, seed=5)
    scored = linear_probe(x, y, x, y, classes=3, epochs=3, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, fit(x, y, 3, 3, 0.1, seed=5), strict=True))
    assert linear_probe(x, y, x, y, classes=3, epochs=3, seed=5) == scored
    assert not torch.equal(first[0], fit(x, y, 3, 3, 0.1, seed=6)[0])


def test_nothing_is_chosen_on_the_test_labels():
    # With two classes, the accuracy on some labels and on their opposites adds up to 100 for one and the same
    # classifier; the best of several epochs would add up to more.
    x, y = blobs(200, 2.0, classes=2)
    test, labels = blobs(101, 2.0, classes=2, seed=1)
    one = linear_probe(x, y, test, labels, classes=2, epochs=20)
    opposite = linear_probe(x, y, test, 1 - labels, classes=2, epochs=20)
    assert one.accuracy + opposite.accuracy == pytest.approx(100)
    assert one.train_accuracy == opposite.train_accuracy


def test_takes_half_precision_and_inference_tensors():
    train, train_labels = blobs(300, 0.1)
    with torch.inference_mode():
        train = train.bfloat16()
    labels = train_labels.to(torch.uint8)
    assert linear_probe(train, labels, train, labels, classes=3, epochs=20).accuracy == 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"train": torch.zeros(0, 3), "train_labels": torch.zeros(0, dtype=torch.long)},
            r"train of shape \(0, 3\)",
        ),
        ({"train_labels": torch.zeros(3, dtype=torch.long)}, "train labels"),
        ({"test": torch.ones(2, 5)}, r"test of shape \(2, 5\): expected \(M, 3\)"),
        (
            {"test": torch.zeros(0, 3), "test_labels": torch.zeros(0, dtype=torch.long)},
            r"test of shape \(0, 3\)",
        ),
        ({"test_labels": torch.zeros(2)}, "test labels"),
        ({"train_labels": torch.tensor([0, 1, 2, 0])}, "train labels from 0 to 2: expected 0 to 1"),
        ({"test_labels": torch.tensor([-1, 0])}, "test labels from -1 to 0: expected 0 to 1"),
        ({"epochs": 0}, "epochs=0"),
    ],
)
def test_rejects(change, message):
    arguments = {
        "train": torch.ones(4, 3),
        "train_labels": torch.tensor([0, 1, 0, 1]),
        "test": torch.ones(2, 3),
        "test_labels": torch.tensor([0, 1]),
        "classes": 2,
    }
    with pytest.raises(ValueError, match=message):
        linear_probe(**{**arguments, **change})
