"""Features of a frozen encoder, computed once and kept."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mocosfl.data.images import ImageSet


def extract(encoder: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """Run an encoder in eval mode, without gradients, over batches of images.

    Every sub-module has its own training flag back afterwards, also when the encoder or the batches fail.

    Args:
        encoder: maps images (n, C, H, W) to features (n, D).
        batches: floating-point images (n, C, H, W), scaled as the encoder expects them, on any device. n may
            vary.

    Returns:
        Features, in the order of the images. Shape (N, D), float32, on the encoder's device. Not an inference
        tensor: autograd accepts it.

    Raises:
        ValueError: there is no batch, or the encoder does not return one vector an image.
    """
    weight = next(chain(encoder.parameters(), encoder.buffers()), None)
    modes = [(module, module.training) for module in encoder.modules()]
    features = []
    encoder.eval()
    try:
        for batch in batches:
            # Around the encoder alone: what the source of the batches makes and keeps stays fit for autograd.
            with torch.inference_mode():
                output = encoder(batch if weight is None else batch.to(weight.device, non_blocking=True))
            if output.ndim != 2 or len(output) != len(batch):
                raise ValueError(
                    f"encoder output of shape {tuple(output.shape)} for {len(batch)} images: expected (n, D)"
                )
            features.append(output.float())
    finally:
        for module, mode in modes:
            module.training = mode
    if not features:
        raise ValueError("batches: there are no images to extract features from")
    return torch.cat(features)


def extract_from(encoder: nn.Module, images: ImageSet, rows: NDArray[np.int64], batch: int) -> Tensor:
    """``extract`` for some images of a set.

    Args:
        encoder: maps images in [0, 1], (n, C, S, S) float32, to features (n, D).
        images: the set.
        rows: (N,) int64, N at least 1.
        batch: images of a forward pass.

    Returns:
        (N, D) float32 on the encoder's device.
    """
    device = next(chain(encoder.parameters(), encoder.buffers())).device
    parts = (rows[start : start + batch] for start in range(0, len(rows), batch))
    return extract(encoder, (images.take(part, device).float() / 255 for part in parts))


def check_labelled(name: str, features: Tensor, labels: Tensor) -> None:
    """Require at least one feature vector, and one label for each.

    Args:
        name: what the message calls the features.
        features: shape (N, D), any floating-point type.
        labels: shape (N,), any integer type.

    Raises:
        ValueError: wrong number of dimensions, N = 0, labels that are not integers, or not N of them.
    """
    if features.ndim != 2 or not len(features):
        raise ValueError(f"{name} of shape {tuple(features.shape)}: expected (N, D) with N at least 1")
    if labels.shape != features.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"{name} labels of shape {tuple(labels.shape)} and type {labels.dtype}: "
            f"expected one integer for each of the {len(features)} feature vectors"
        )


def doubled(tensor: Tensor) -> Tensor:
    """A tensor in float64; on the CPU where its device (MPS) has no such numbers."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
