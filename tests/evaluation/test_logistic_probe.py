"""The logistic probe, held to scikit-learn's logistic regression, which minimises the same loss."""

import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from mocosfl.evaluation import linear_probe, logistic_probe
from mocosfl.evaluation.linear_probe import standardised
from mocosfl.evaluation.logistic_probe import TOLERANCE, minimise

module = sys.modules[logistic_probe.__module__]  # the package has a function of its name


@pytest.fixture(scope="module")
def digits():
    """Pixels of handwritten digits, as features: 1,297 to train on, 500 to test on."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    pixels, labels = torch.from_numpy(data.data)[order].float(), torch.from_numpy(data.target)[order]
    return pixels[:1297], labels[:1297], pixels[1297:], labels[1297:]


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_equals_scikit_learn(digits, l2):
    train, train_labels, test, test_labels = digits
    x, x_test = (features.double().numpy() for features in standardised(train, test))
    theirs = LogisticRegression(C=1 / (len(x) * l2), tol=1e-8, max_iter=5000).fit(x, train_labels)
    # Their loss at their minimum, written out.
    log_p = np.log(theirs.predict_proba(x)[np.arange(len(x)), train_labels])
    loss = -log_p.mean() + l2 / 2 * np.square(theirs.coef_).sum()

    found = logistic_probe(*digits, classes=10, l2=l2)
    assert found.converged
    assert found.loss == pytest.approx(loss, rel=1e-6)
    assert found.accuracy == pytest.approx(100 * theirs.score(x_test, test_labels))
    assert found.train_accuracy == pytest.approx(100 * theirs.score(x, train_labels))
    state, *_ = minimise(torch.from_numpy(x), train_labels, 10, l2)
    np.testing.assert_allclose(
        state[:-1].T, theirs.coef_, atol=1e-3
    )  # where the loss is flat, both searches stop early


def test_loss_and_gradient_are_those_of_autograd():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 4, generator=generator), torch.arange(50) % 3
    state, loss, gradient, _ = minimise(x, y, 3, l2=0.05)
    state = state.clone().requires_grad_()
    expected = F.cross_entropy(x.double() @ state[:-1] + state[-1], y) + 0.05 / 2 * state[:-1].square().sum()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-12)
    (slope,) = torch.autograd.grad(expected, state)
    assert float(slope.abs().max()) == pytest.approx(gradient, abs=1e-12)
    assert gradient <= TOLERANCE


def test_the_result_does_not_depend_on_the_chunk(digits, monkeypatch):
    whole = logistic_probe(*digits, classes=10, l2=0.1)
    monkeypatch.setattr(module, "CHUNK", 100)
    parts = logistic_probe(*digits, classes=10, l2=0.1)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-9)
    assert (parts.accuracy, parts.train_accuracy) == (whole.accuracy, whole.train_accuracy)


def test_it_says_when_the_minimum_was_not_reached(digits, monkeypatch):
    monkeypatch.setattr(module, "ITERATIONS", 2)
    found = logistic_probe(*digits, classes=10)
    assert not found.converged
    assert found.iterations == 2


def test_fits_at_least_as_well_as_sgd(digits):
    assert logistic_probe(*digits, classes=10, l2=1e-4).train_accuracy >= linear_probe(*digits, 10).train_accuracy


def test_a_class_without_training_images_is_never_predicted(digits):
    train, train_labels, test, test_labels = digits
    keep = train_labels != 9
    found = logistic_probe(train[keep], train_labels[keep], test, test_labels, classes=10, l2=0.1)
    assert found.accuracy <= 100 * float((test_labels != 9).double().mean())


def test_randomness_is_left_alone(digits):
    before = torch.get_rng_state()
    one, other = (logistic_probe(*digits, classes=10, l2=0.1) for _ in range(2))
    assert one == other
    assert torch.equal(torch.get_rng_state(), before)


def test_rejects(digits):
    train, train_labels, test, test_labels = digits
    with pytest.raises(ValueError, match=r"l2=0: must be greater than 0"):
        logistic_probe(*digits, classes=10, l2=0)
    with pytest.raises(ValueError, match="train labels from 0 to 9: expected 0 to 8"):
        logistic_probe(*digits, classes=9)
    with pytest.raises(ValueError, match=r"expected \(M, 64\) like train"):
        logistic_probe(train, train_labels, test[:, :3], test_labels, classes=10)
