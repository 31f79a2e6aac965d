"""Decoders: networks that turn latents back into images."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mocosfl.models.layers import BasicBlock, seeded


class Decoder(nn.Module):
    """Residual blocks at the latents' resolution, then transposed convolutions up to the images'.

    Four blocks of 64 channels are the architecture that the paper attacks with.

    Tokens are laid out as the patches that they stand for; those before them, such as a class token, are left out.

    Args:
        latent_shape: (C', H', W') of one latent, or (tokens, width), or (numbers,).
        image_shape: (C, H, W) of one image.
        blocks: residual blocks.
        channels: their channels, a multiple of 4.
        seed: of the initial weights; the global generator is left as it was.

    Shape: (n, *latent_shape) to (n, *image_shape) in [0, 1].
    """

    def __init__(
        self, latent_shape: tuple[int, ...], image_shape: tuple[int, ...], blocks: int, channels: int, seed: int
    ) -> None:
        super().__init__()
        self.size = image_shape[1:]
        self.tokens = latent_shape[0] if len(latent_shape) == 2 else 0
        if self.tokens:
            side = math.isqrt(self.tokens)
            latent_shape = (latent_shape[1], side, side)
        elif len(latent_shape) == 1:
            latent_shape = (latent_shape[0], 1, 1)
        with seeded(seed):
            body: list[nn.Module] = [nn.Conv2d(latent_shape[0], channels, 3, padding=1), nn.ReLU(inplace=True)]
            body += [BasicBlock(channels, channels, 1, "batch") for _ in range(blocks)]
            side = latent_shape[1]
            while 2 * side <= image_shape[1]:
                body += [nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1), nn.ReLU(inplace=True)]
                side *= 2
            self.body = nn.Sequential(*body, nn.Conv2d(channels, image_shape[0], 3, padding=1))

    def forward(self, latents: Tensor) -> Tensor:
        if self.tokens:
            side = math.isqrt(self.tokens)
            latents = latents[:, self.tokens - side**2 :].transpose(1, 2).unflatten(2, (side, side))
        elif latents.ndim == 2:
            latents = latents[:, :, None, None]
        images = self.body(latents)
        images = images.to(torch.promote_types(images.dtype, torch.float32)).sigmoid()
        if images.shape[2:] != self.size:  # the latents' sides are no power of two below the images'
            images = F.interpolate(images, self.size, mode="bilinear", align_corners=False)
        return images
