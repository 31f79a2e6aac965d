"""What a client does so that its latents tell less of its images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mocosfl.config import Config, ResSFLSettings
from mocosfl.distributed import World
from mocosfl.models.layers import share_statistics
from mocosfl.privacy.decoder import Decoder
from mocosfl.privacy.scores import ssim
from mocosfl_device.randomness import stream


class Defence:
    """Nothing, and what every defence may do.

    Attributes:
        draws: whether ``protect`` changes anything; it then draws.
        has_loss: whether there is a ``gradient``.
        metrics: what the last ``gradient`` has found out, as tensors that nobody has waited for.
    """

    draws = has_loss = False

    def __init__(self) -> None:
        self.metrics: dict[str, Tensor] = {}

    def protect(self, latents: Tensor, seed: int) -> Tensor:
        """Change latents before they are sent.

        Args:
            latents: (n, ...) of the shape that the client half gives.
            seed: of whatever is drawn; another one for every message.
        """
        return latents

    def expected(self, latents: Tensor, sent: Tensor) -> Tensor:
        """What an attacker expects to be sent for latents, having seen what was sent for the true ones."""
        return latents

    def gradient(self, latents: Tensor, images: Tensor, shares: Tensor, contrast: Tensor) -> Tensor:
        """The gradient of a further loss of the clients at what they have sent.

        Args:
            latents: (n, ...) as sent, detached.
            images: (n, C, S, S) the views that they were made of, in [0, 1].
            shares: (n,) weight of every image in the clients' loss.
            contrast: (n, ...) gradient of the contrastive loss at the same latents.

        Returns:
            (n, ...), of the latents' dtype.
        """
        return torch.zeros_like(latents)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``'s result."""


class Noise(Defence):
    """Gaussian noise.

    Args:
        scale: standard deviation, in multiples of the root mean square of an image's latent.
    """

    draws = True

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def protect(self, latents: Tensor, seed: int) -> Tensor:
        noise = torch.randn(latents.shape, generator=_generator(latents, seed), device=latents.device)
        size = latents.detach().flatten(1).square().mean(dim=1).sqrt()
        return latents + self.scale * size.view(-1, *[1] * (latents.ndim - 1)) * noise.to(latents.dtype)


class Dropout(Defence):
    """Some numbers are zero, the others scaled up.

    Args:
        share: of the numbers that are dropped.
    """

    draws = True

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def protect(self, latents: Tensor, seed: int) -> Tensor:
        kept = torch.rand(latents.shape, generator=_generator(latents, seed), device=latents.device) >= self.share
        return latents * kept / (1 - self.share)

    def expected(self, latents: Tensor, sent: Tensor) -> Tensor:
        return latents * (sent != 0) / (1 - self.share)


def _generator(latents: Tensor, seed: int) -> torch.Generator:
    return torch.Generator(latents.device).manual_seed(seed)


class NoPeek(Defence):
    """Distance correlation of images and latents as a loss (Vepakomma, Singh, Gupta and Raskar, 2020).

    It compares the images of a batch with each other, so the simulator takes it over the concatenated batch (of one
    process); real clients would need several images each.

    Args:
        weight: in the clients' loss.
    """

    has_loss = True

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def gradient(self, latents: Tensor, images: Tensor, shares: Tensor, contrast: Tensor) -> Tensor:
        with torch.enable_grad():
            z = latents.detach().requires_grad_()
            correlation = distance_correlation(images.flatten(1), z.flatten(1))
            (gradient,) = torch.autograd.grad(correlation, z)
        self.metrics = {"distance_correlation": correlation.detach()}
        return gradient * (self.weight * shares.sum())


def distance_correlation(x: Tensor, y: Tensor) -> Tensor:
    """Distance correlation (Szekely, Rizzo and Bakirov, 2007) of n pairs, in [0, 1].

    Args:
        x: (n, D).
        y: (n, E).
    """
    a, b = (_centred_distances(points) for points in (x, y))
    variances = (a * a).mean() * (b * b).mean()
    return ((a * b).mean().clamp(min=0) / variances.clamp(min=1e-12).sqrt()).clamp(min=1e-12).sqrt()


def _centred_distances(points: Tensor) -> Tensor:
    squares = points.square().sum(dim=1)
    distances = (squares[:, None] + squares - 2 * points @ points.T).clamp(min=1e-10).sqrt()
    return distances - distances.mean(dim=0) - distances.mean(dim=1, keepdim=True) + distances.mean()


class ResSFL(Defence):
    """An attacker of one's own: a decoder learns to invert the latents, the clients learn to make it fail.

    The clients' loss is lambda * max(0, SSIM(G(latent), image) - target) for every image (Li et al., ResSFL, CVPR 2022;
    MocoSFL's TAResSFL). G maximises the SSIM, a step or more for one of the clients.

    Where clients train under it, each would hold G and average it with the others; simulated, that is one G that learns
    from all.

    Args:
        settings: of the loss and of G.
        latent_shape: of one latent.
        image_shape: of one image.
        seed: the run's.
        device: where to compute.
        world: the processes of the run.
        bf16: run G under bfloat16 autocast.
    """

    has_loss = True

    def __init__(
        self,
        settings: ResSFLSettings,
        latent_shape: tuple[int, ...],
        image_shape: tuple[int, ...],
        seed: int,
        device: torch.device,
        world: World | None = None,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self.bf16 = bf16
        self.settings, self.world, self.done = settings, world or World(), 0
        decoder = Decoder(latent_shape, image_shape, settings.blocks, settings.channels, stream(seed, "ressfl"))
        self.decoder = decoder.to(device)
        if self.world.size > 1:
            share_statistics(self.decoder, self.world)
        self.optimizer = torch.optim.Adam(self.decoder.parameters(), lr=settings.lr)

    def _similarity(self, latents: Tensor, images: Tensor) -> Tensor:
        # A region of its own for each pass: autocast keeps the weights that it has cast until the region ends.
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=self.bf16):
            made = self.decoder(latents)
        return ssim(made, images)

    @torch.enable_grad()
    def gradient(self, latents: Tensor, images: Tensor, shares: Tensor, contrast: Tensor) -> Tensor:
        settings, latents = self.settings, latents.detach()
        weights = shares / self.world.sum(shares.sum())
        for _ in range(settings.steps):
            loss = (weights * (1 - self._similarity(latents, images))).sum()
            self.optimizer.zero_grad()
            loss.backward()
            self.world.add([p.grad for p in self.decoder.parameters() if p.grad is not None])
            self.optimizer.step()
        self.done += 1
        latents = latents.requires_grad_()
        similarity = self._similarity(latents, images)
        known = (weights * similarity).sum().detach()
        self.world.add([known])
        self.metrics = {"attacker_ssim": known}
        excess = (similarity - settings.ssim_target).clamp(min=0)
        (gradient,) = torch.autograd.grad((shares * excess).sum(), latents)
        gradient = settings.weight * min(1.0, self.done / max(1, settings.warmup)) * gradient
        if settings.clip is not None:
            ours, theirs = (g.flatten(1).norm(dim=1) for g in (gradient, contrast))
            scale = (settings.clip * theirs / ours.clamp(min=1e-12)).clamp(max=1)
            gradient = gradient * scale.view(-1, *[1] * (gradient.ndim - 1))
        return gradient

    def state_dict(self) -> dict[str, Any]:
        return {"decoder": self.decoder.state_dict(), "optimizer": self.optimizer.state_dict(), "done": self.done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.decoder.load_state_dict(state["decoder"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = state["done"]


def defence_of(
    config: Config,
    latent_shape: tuple[int, ...],
    image_shape: tuple[int, ...],
    device: torch.device,
    world: World | None = None,
) -> Defence:
    """The defence that ``defence.kind`` names."""
    settings = config.defence
    match settings.kind:
        case "noise":
            return Noise(settings.noise)
        case "dropout":
            return Dropout(settings.dropout)
        case "nopeek":
            return NoPeek(settings.nopeek)
        case "ressfl":
            bf16 = config.train.precision == "bf16"
            return ResSFL(config.ressfl, latent_shape, image_shape, config.seed, device, world, bf16)
        case _:
            return Defence()
