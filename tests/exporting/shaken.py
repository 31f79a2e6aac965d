"""Encoders to export, and the type of the fixture that makes runs of them."""

from collections.abc import Callable

import torch

from mocosfl.encoder import Encoder
from mocosfl.run import Run

Finished = Callable[..., Run]


def shaken(encoder: Encoder) -> Encoder:
    """Norms that do nothing, and a normalisation that does nothing, would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in encoder.state_dict().items():
            if tensor.ndim == 1 and tensor.is_floating_point():
                tensor.add_(0.2 * torch.rand(tensor.shape, generator=generator) + ("std" in name) * -0.7)
    return encoder.eval()
