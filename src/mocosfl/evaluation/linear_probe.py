"""Linear probe: how well a linear classifier tells the classes apart from frozen features."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mocosfl.evaluation.features import check_labelled

BATCH = 256
MOMENTUM = 0.9


@dataclass(frozen=True)
class ProbeResult:
    """Outcome of a linear probe, after its last epoch."""

    accuracy: float
    """Test accuracy in percent."""
    train_accuracy: float
    """Training accuracy in percent."""


def linear_probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    classes: int,
    epochs: int = 100,
    lr: float = 0.1,
    seed: int = 0,
) -> ProbeResult:
    """Train a linear classifier on cached features, and score its state after the last epoch.

    Nothing is chosen on the test features: they are looked at once, at the end. Both sets are standardised
    with mean and standard deviation of the training features. As frozen features do not move, that equals a
    BatchNorm without affine before the classifier, and it makes one learning rate fit encoders whose
    features differ in scale.

    Args:
        train: training features. Shape (N, D), floating point. All four tensors share one device;
            standardised copies of the features are made there.
        train_labels: classes from 0 to classes - 1. Shape (N,), integer.
        test: test features. Shape (M, D), floating point.
        test_labels: classes from 0 to classes - 1. Shape (M,), integer.
        classes: number of classes.
        epochs: passes over the training features, at least 1.
        lr: learning rate at the start; see ``fit``.
        seed: seed of the order of the training features. One seed, one result, whatever was drawn before.

    Returns:
        Accuracy on test and training features.

    Raises:
        ValueError: features are empty, shapes do not agree, or a label or epochs is out of its range.
    """
    check_probed(train, train_labels, test, test_labels, classes)
    if epochs < 1:
        raise ValueError(f"epochs={epochs}: must be at least 1")

    with torch.no_grad():
        train, test = standardised(train, test)
        weight, bias = fit(train, train_labels.long(), classes, epochs, lr, seed)
        return ProbeResult(
            accuracy=accuracy(torch.addmm(bias, test, weight), test_labels),
            train_accuracy=accuracy(torch.addmm(bias, train, weight), train_labels),
        )


def check_probed(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int) -> None:
    """Raises ``ValueError`` where features are empty, shapes do not agree, or a label is out of its range."""
    check_labelled("train", train, train_labels)
    check_labelled("test", test, test_labels)
    if test.shape[1] != train.shape[1]:
        raise ValueError(f"test of shape {tuple(test.shape)}: expected (M, {train.shape[1]}) like train")
    for name, labels in (("train", train_labels), ("test", test_labels)):
        low, high = (int(label) for label in labels.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(f"{name} labels from {low} to {high}: expected 0 to {classes - 1}, classes={classes}")


def standardised(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets of features, float32, with mean and standard deviation of the training features taken out."""
    mean, std = moments(train)
    return (train.float() - mean) / std, (test.float() - mean) / std


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature, (N, D) to (D,) float32 each; 1 for that of a constant one."""
    std, mean = torch.std_mean(features.float(), dim=0, correction=0)
    # What is constant but for rounding must not be blown up to unit variance.
    return mean, torch.where(std > 1e-6 * mean.abs(), std, 1)


def fit(x: Tensor, y: Tensor, classes: int, epochs: int, lr: float, seed: int) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression by SGD from zero weights.

    Batches of 256, momentum 0.9, no weight decay; the learning rate falls from lr to zero along a cosine.

    Args:
        x: standardised features. Shape (N, D), float32.
        y: classes. Shape (N,), int64.
        classes: number of classes.
        epochs: passes over x, each in a new order.
        lr: learning rate at the start.
        seed: seed of the orders.

    Returns:
        Weight (D, classes) and bias (classes,), float32, for ``x @ weight + bias``.
    """
    # On the CPU whatever the device of x, so that every device sees the same order.
    generator = torch.Generator().manual_seed(seed)
    state = x.new_zeros(x.shape[1] + 1, classes)  # weight, and bias in the last row
    velocity = torch.zeros_like(state)
    x = F.pad(x, (0, 1), value=1)
    steps = epochs * math.ceil(len(x) / BATCH)
    step = 0
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator).to(x.device)
        for batch in torch.split(order, BATCH):
            inputs = x[batch]
            # The gradient of softmax cross-entropy in closed form: autograd takes half as long again.
            error = (inputs @ state).softmax(dim=1) - F.one_hot(y[batch], classes)
            velocity.mul_(MOMENTUM).addmm_(inputs.T, error, alpha=1 / len(batch))
            state.sub_(velocity, alpha=lr * (1 + math.cos(math.pi * step / steps)) / 2)
            step += 1
    return state[:-1], state[-1]


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of the images, in percent, whose greatest logit is that of their label: (N, classes), (N,)."""
    return 100 * (logits.argmax(dim=1) == labels).sum().item() / len(labels)
