"""Semi-supervised fine-tuning: the whole encoder learns on, from the few images whose labels are known."""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from mocosfl.config import AugmentSettings
from mocosfl.data.augment import augment, policy_of
from mocosfl.data.images import ImageSet, upload
from mocosfl.data.sources import balanced
from mocosfl.encoder import Encoder
from mocosfl.evaluation.features import extract_from
from mocosfl.evaluation.linear_probe import accuracy, moments
from mocosfl_device.augment import AugmentParameters
from mocosfl_device.randomness import stream

SHARES = (0.1, 0.01)
"""Of the labels, as usual (Chen et al., SimCLR, 2020, section 6)."""

MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4


def labelled_rows(labels: NDArray[np.int64], share: float, seed: int) -> NDArray[np.int64]:
    """Choose which images are labelled: of every class equally many, and at least one.

    A smaller share of the same seed is a part of a larger one.

    Args:
        labels: (N,) int64 class number of every training image.
        share: of the N images.
        seed: of the choice.

    Returns:
        Rows in ascending order, int64. A class that has too few images gives all it has, and the others more.
    """
    count = max(round(share * len(labels)), len(np.unique(labels)))
    return balanced(np.arange(len(labels)), labels, count, np.random.default_rng(stream(seed, "labelled")))


def finetune(
    encoder: Encoder,
    train: ImageSet,
    rows: NDArray[np.int64],
    test: ImageSet,
    classes: int,
    epochs: int = 100,
    lr: float = 0.01,
    batch: int = 64,
    augmentation: AugmentSettings | None = None,
    seed: int = 0,
    test_batch: int = 500,
) -> float:
    """Train encoder and linear classifier together on labelled images, and score the state after the last epoch.

    SGD with momentum 0.9 and weight decay 1e-4; the learning rate falls to zero along a cosine. Images are cropped and
    flipped at random, and keep their colours. The classifier starts from zero weights. It reads features standardised
    by the mean and standard deviation of the labelled images' features before fine-tuning, so that one learning rate
    fits encoders whose features differ in scale. Test images are read once, at the end; nothing is chosen on them.

    Args:
        encoder: where to start, on the device to compute on; it is left as it is.
        train: with labels.
        rows: (n,) int64, the images of ``train`` to learn from; others are not looked at, nor are their labels.
        test: with labels.
        classes: number of classes.
        epochs: passes over the n images.
        lr: learning rate at the start.
        batch: images of a step, at most; a pass is cut into steps of nearly equal size.
        augmentation: of its settings, ``crop_scale`` and ``flip_p`` are used.
        seed: of orders, crops and flips; one seed, one result on one device.
        test_batch: test images of a forward pass.

    Returns:
        Accuracy on the test images, in percent.

    Raises:
        ValueError: there are fewer than two images to learn from, or no labels.
    """
    if len(rows) < 2 or train.labels is None or test.labels is None:
        raise ValueError(f"fine-tuning on {len(rows)} images: expected at least 2, and labels for training and test")
    device = encoder.mean.device
    settings = augmentation or AugmentSettings()
    policy = policy_of(settings.model_copy(update={"jitter_p": 0, "grey_p": 0, "blur_p": 0}))
    mean, std = moments(extract_from(encoder, train, rows, test_batch))
    model = _Classified(copy.deepcopy(encoder), mean, std, classes).to(device)

    steps = epochs * math.ceil(len(rows) / batch)
    optimizer = torch.optim.SGD(model.parameters(), lr, MOMENTUM, weight_decay=WEIGHT_DECAY)
    rng = np.random.default_rng(stream(seed, "fine-tuning"))
    labels = upload(train.labels, device)
    step = drawn = 0
    model.train()
    for _ in range(epochs):
        for part in np.array_split(rng.permutation(rows), math.ceil(len(rows) / batch)):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
            draws = np.arange(drawn, drawn + len(part))
            parameters = AugmentParameters.draw(policy, encoder.size, stream(seed, "fine-tuning"), 0, draws, 0)
            logits = model(augment(train.take(part, device), parameters, policy))
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(logits, labels[upload(part, device)]).backward()
            optimizer.step()
            step, drawn = step + 1, drawn + len(part)
    logits = extract_from(model, test, np.arange(len(test)), test_batch)
    return accuracy(logits, upload(test.labels, device))


class _Classified(nn.Module):
    """An encoder and a linear classifier on its standardised features. Shape: images to (n, classes)."""

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Encoder, mean: Tensor, std: Tensor, classes: int) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.weight = nn.Parameter(torch.zeros(classes, encoder.features))
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, images: Tensor) -> Tensor:
        return F.linear((self.encoder(images) - self.mean) / self.std, self.weight, self.bias)
