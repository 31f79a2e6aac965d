"""Attacks: what can be made of latents by somebody who wants to see the images.

The attacker is the server or whoever reads its memory. It knows the client half (it hands it out), every setting, the
seed (so it knows how each view was cut out and coloured) and any images of its own; it changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from mocosfl.data.augment import augment, normalise
from mocosfl.privacy.decoder import Decoder
from mocosfl.privacy.defences import Defence
from mocosfl.privacy.scores import mse, ssim
from mocosfl_device.augment import AugmentParameters, Policy
from mocosfl_device.randomness import PROTECT, bits, stream

PIXELS = 2**22
"""Numbers of the images in one pass without gradients."""


def _parts(images: Tensor, times: int = 1) -> tuple[Tensor, ...]:
    """Cut a batch into parts that are small enough, each image being used so many times."""
    return images.split(max(1, PIXELS // (times * images[0].numel())))


class Victim:
    """A client half as the attacker has it, and what clients send.

    Args:
        half: (n, C, S, S) normalised images to (n, *latent_shape) latents.
        mean, std: (C,) of the normalisation.
        policy: how clients augment their images.
        defence: what clients do to their latents before they send them.
        seed: the run's.
        bf16: let decoders be trained under bfloat16 autocast.
    """

    def __init__(
        self,
        half: nn.Module,
        mean: Tensor,
        std: Tensor,
        policy: Policy,
        defence: Defence | None = None,
        seed: int = 0,
        bf16: bool = False,
    ) -> None:
        self.half = half.eval().requires_grad_(False)
        self.mean, self.std, self.policy, self.seed, self.bf16 = mean, std, policy, seed, bf16
        self.defence = defence or Defence()
        self.messages = 0

    def latents(self, images: Tensor) -> Tensor:
        """Latents before any noise, with a way back for gradients: (n, C, S, S) in [0, 1] to (n, ...) float32."""
        return self.half(normalise(images, self.mean, self.std)).float()

    @torch.no_grad()
    def send(self, images: Tensor) -> Tensor:
        """Latents as clients send them; whatever is random in them is drawn anew every time."""
        self.messages += 1
        latents = torch.cat([self.latents(part) for part in _parts(images)])
        return self.defence.protect(latents, int(bits(self.seed, PROTECT, -self.messages) >> np.uint64(1)))

    def augmentation(self, images: Tensor, view: int, first: int = 0) -> AugmentParameters:
        """How a client makes one view of each image, its draws number ``first`` and following."""
        draws = first + np.arange(len(images))
        return AugmentParameters.draw(self.policy, images.shape[-1], self.seed, client=0, draw=draws, view=view)


@dataclass(frozen=True)
class Training:
    """How a decoder is trained.

    Attributes:
        blocks, channels: of the decoder.
        steps: of Adam.
        batch: images of a step.
        lr: learning rate; it falls to zero along a cosine where ``loss`` is both, else it stays.
        loss: mse, or both: ten times the MSE, and 1 - SSIM.
        views: besides each image as it is, mirror it, or cut and colour it as the clients do.
    """

    blocks: int = 4
    channels: int = 64
    steps: int = 1000
    batch: int = 32
    lr: float = 1e-3
    loss: Literal["mse", "both"] = "mse"
    views: bool = False


def train_decoder(victim: Victim, images: Tensor, training: Training, seed: int) -> Decoder:
    """Train a decoder on images that the attacker has, and the latents that it makes of them.

    Args:
        victim: makes the latents.
        images: (m, C, S, S) float32 in [0, 1].
        training: architecture, steps and loss.
        seed: of initial weights, order and views.

    Returns:
        In eval mode: latents to images in [0, 1].
    """
    generator = torch.Generator().manual_seed(stream(seed, "decoder"))
    shape = victim.send(images[:1]).shape[1:]
    decoder = Decoder(tuple(shape), tuple(images.shape[1:]), training.blocks, training.channels, seed)
    decoder.to(images.device).train()
    optimizer = torch.optim.Adam(decoder.parameters(), lr=training.lr)
    ready = None if training.views or victim.defence.draws else victim.send(images)
    for step, rows in zip(range(training.steps), _batches(len(images), training.batch, generator), strict=False):
        if training.loss == "both":
            optimizer.param_groups[0]["lr"] = training.lr * (1 + math.cos(math.pi * step / training.steps)) / 2
        truth = images[rows.to(images.device)]
        if training.views:
            truth = _some_views(victim, truth, step * training.batch)
        latents = victim.send(truth) if ready is None else ready[rows.to(images.device)]
        with torch.autocast(images.device.type, torch.bfloat16, enabled=victim.bf16):
            made = decoder(latents)
        loss = mse(made, truth).mean()
        if training.loss == "both":
            loss = 10 * loss + (1 - ssim(made, truth)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return decoder.eval()


def _batches(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers, epoch after epoch, each in a new order; the last ones of an epoch are left out if too few."""
    batch = min(batch, count)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from (rows for rows in order.split(batch) if len(rows) == batch)


def _some_views(victim: Victim, images: Tensor, first: int) -> Tensor:
    """A quarter of the images as they are, a quarter mirrored, a half augmented as a client does it."""
    whole = len(images) // 2
    images = torch.cat([images[: whole // 2], images[whole // 2 : whole].flip(3), images[whole:]])
    rest = images[whole:]
    return torch.cat([images[:whole], augment(rest, victim.augmentation(rest, -1, first), victim.policy)])


@torch.no_grad()
def decode(decoder: nn.Module, latents: Tensor) -> Tensor:
    """What a decoder makes of latents: (n, ...) to (n, C, S, S) in [0, 1]."""
    return torch.cat([decoder(part) for part in _parts(latents, 4)])


def optimise(
    victim: Victim,
    sent: Tensor,
    shape: tuple[int, ...],
    restarts: int,
    iterations: int,
    seed: int,
    smoothness: float = 0.1,
) -> Tensor:
    """Gradient descent on the images: find those whose latents are the ones that were sent (white box).

    The loss is the squared distance of the latents over their squared norm, and a total-variation prior.

    Args:
        victim: whose half is differentiated.
        sent: (n, ...) latents.
        shape: (C, S, S) of an image.
        restarts: from different noise; of each image the one with the least loss counts.
        iterations: of Adam.
        seed: of the noise.
        smoothness: weight of the mean absolute difference of neighbouring pixels.

    Returns:
        (n, C, S, S) in [0, 1].
    """
    scale = sent.flatten(1).square().sum(dim=1).clamp(min=1e-8)

    def losses(images: Tensor) -> Tensor:
        guess = victim.defence.expected(victim.latents(images), sent)
        wrong = (guess - sent).flatten(1).square().sum(dim=1)
        return wrong / scale + smoothness * _variation(images)

    generator = torch.Generator().manual_seed(stream(seed, "optimise"))
    best, least = torch.zeros(len(sent), *shape, device=sent.device), torch.full((len(sent),), math.inf).to(sent.device)
    for _ in range(restarts):
        start = torch.randn(len(sent), *shape, generator=generator).to(sent.device)
        images = _descend(losses, start, iterations)
        with torch.no_grad():
            loss = losses(images)
            better = loss < least
            best[better], least[better] = images[better], loss[better]
    return best


def tuned_smoothness(victim: Victim, images: Tensor, iterations: int, seed: int) -> float:
    """The weight of the prior of ``optimise`` that serves best on images that the attacker has: (m, C, S, S)."""

    def success(smoothness: float) -> float:
        made = optimise(victim, victim.send(images), tuple(images.shape[1:]), 1, iterations, seed, smoothness)
        return float(ssim(images, made).mean())

    return max((0.01, 0.03, 0.1, 0.3), key=success)


def fuse_views(
    victim: Victim,
    decoder: nn.Module,
    images: Tensor,
    views: int,
    iterations: int,
    smoothness: float = 0.01,
) -> Tensor:
    """See several augmented views of each image: decode every view, then find the image whose views they are.

    A crop is a part of the image at a larger scale, so its latent tells more of that part. How each view was made is
    known to the server: it is a function of the seed.

    Args:
        victim: makes the views' latents; nothing else is read off the images.
        decoder: latents to images.
        images: (n, C, S, S) float32 in [0, 1].
        views: of each image.
        iterations: of Adam.
        smoothness: weight of the mean absolute difference of neighbouring pixels.

    Returns:
        (n, C, S, S) in [0, 1].
    """

    def fused(part: Tensor, first: int) -> Tensor:
        made = [victim.augmentation(part, view, first) for view in range(views)]
        decoded = [decode(decoder, victim.send(augment(part, drawn, victim.policy))) for drawn in made]

        def losses(guess: Tensor) -> Tensor:
            wrong = [mse(augment(guess, drawn, victim.policy), seen) for drawn, seen in zip(made, decoded, strict=True)]
            return torch.stack(wrong).mean(dim=0) + smoothness * _variation(guess)

        return _descend(losses, torch.zeros_like(part), iterations, lr=0.3)

    parts = _parts(images, views)
    return torch.cat([fused(part, place * len(parts[0])) for place, part in enumerate(parts)])


def _descend(losses: Callable[[Tensor], Tensor], start: Tensor, iterations: int, lr: float = 0.1) -> Tensor:
    """Adam on images, kept in [0, 1] by a sigmoid; the rate falls to zero along a cosine."""
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=lr)
    for step in range(iterations):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / iterations)) / 2
        optimizer.zero_grad()
        losses(logits.sigmoid()).sum().backward()
        optimizer.step()
    return logits.detach().sigmoid()


def _variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels: (n, C, H, W) to (n,)."""
    down, along = images.diff(dim=2).abs(), images.diff(dim=3).abs()
    return down.mean(dim=(1, 2, 3)) + along.mean(dim=(1, 2, 3))
