"""The server's queue of keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KeyQueue(nn.Module):
    """Ring buffer of the latest keys (He et al., MoCo, CVPR 2020).

    With feature sharing there is one ring for all clients; without, one ring a client. It starts full of random unit
    vectors, as MoCo's does.

    Args:
        size: K, keys in a ring.
        dim: D, width of a key.
        rings: 1, or the number of clients.
        seed: of the first keys.

    Attributes:
        keys: (rings, K, D) float32 buffer, unit vectors.
        next: (rings,) int64 buffer, where each ring is written next.
    """

    keys: Tensor
    next: Tensor

    def __init__(self, size: int, dim: int, rings: int = 1, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        keys = torch.randn(rings, size, dim, generator=generator)
        self.register_buffer("keys", F.normalize(keys, dim=2))
        self.register_buffer("next", torch.zeros(rings, dtype=torch.int64))

    @property
    def size(self) -> int:
        """K."""
        return self.keys.shape[1]

    @torch.no_grad()
    def push(self, keys: Tensor, rings: Tensor | None = None) -> None:
        """Append keys; the oldest leave. Of more keys than a ring holds, the last K stay.

        Args:
            keys: (P, n, D), n keys for each of P rings, oldest first; P = 1 with a shared queue.
            rings: (P,) int64, distinct: the rings to write. Unset: all, in order.
        """
        count = min(keys.shape[1], self.size)
        if rings is None:
            rings = torch.arange(keys.shape[0], device=keys.device)
        skipped = keys.shape[1] - count
        slots = (self.next[rings, None] + skipped + torch.arange(count, device=keys.device)) % self.size
        self.keys[rings[:, None], slots] = keys[:, skipped:].to(self.keys.dtype)
        self.next[rings] = (self.next[rings] + keys.shape[1]) % self.size
