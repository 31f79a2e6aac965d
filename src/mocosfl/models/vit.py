"""Vision transformers (Dosovitskiy et al., 2021; sizes of Touvron et al., 2021), cut after any block."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocosfl.errors import SettingError
from mocosfl.models.pieces import Backbone, Piece, Stem

HEADS: dict[str, int] = {"vit_tiny": 3, "vit_small": 6}
"""Attention heads, of ``model.width`` numbers each (published: 64)."""

DEPTH, EPS = 12, 1e-6
PATCH: dict[Stem, int] = {"32": 4, "64": 8, "224": 16}
"""Pixels a side of a patch. 16 is published; the others make 64 patches of small images."""

Pooling = Literal["token", "mean"]


class PatchEmbedding(nn.Module):
    """Patches to tokens, a class token before them if there is one, and a learned embedding of their places.

    Shape: (n, C, S, S) to (n, tokens, width).
    """

    def __init__(self, inputs: int, size: int, patch: int, width: int, class_token: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(inputs, width, patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None
        self.places = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + class_token, width))
        _truncated(self.patches, self.class_token, self.places)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)  # (n, H' * W', width)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        return x + self.places


class Block(nn.Module):
    """Attention, then two linear layers with GELU, each behind a LayerNorm and beside a shortcut.

    Shape: (n, tokens, width) to the same.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        _truncated(self.qkv, self.projection, self.mlp[0], self.mlp[2])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def _attention(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, n, heads, tokens, d)
        q, k, v = qkv.unbind(0)
        return self.projection(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Pool(nn.Module):
    """Tokens to features: the class token's, or the mean of all. Shape: (n, tokens, D) to (n, D)."""

    def __init__(self, pooling: Pooling) -> None:
        super().__init__()
        self.pooling = pooling

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0] if self.pooling == "token" else tokens.mean(dim=1)

    def extra_repr(self) -> str:
        return self.pooling


def vit(name: str, width: int, inputs: int, size: int, stem: Stem, pooling: Pooling) -> Backbone:
    """Build a vision transformer.

    Args:
        name: a key of ``HEADS``.
        width: of an attention head (published: 64).
        inputs: channels of the images.
        size: of the images in pixels.
        stem: the images' size class, which decides the patches' size.
        pooling: ``token``, as published, or ``mean``; without a class token then.

    Raises:
        SettingError: the patches do not divide the images.
    """
    patch, heads = PATCH[stem], HEADS[name]
    if size % patch:
        raise SettingError(
            f"data.size={size}: the patches of {name} have {patch} pixels a side here (model.stem={stem}), which do "
            f"not divide the images; use a multiple of {patch}, or another model.stem"
        )
    width *= heads
    pieces = [Piece("embedding", PatchEmbedding(inputs, size, patch, width, pooling == "token"), 1, width)]
    pieces += [Piece(f"block{number}", Block(width, heads), 1, width) for number in range(1, DEPTH + 1)]
    ending = {"norm": nn.LayerNorm(width, eps=EPS), "pool": Pool(pooling)}
    return Backbone(pieces, width, ending, "layers (the patch embedding is one, and each block)")


def _truncated(*parts: nn.Module | nn.Parameter | None) -> None:
    """Draw initial weights from a truncated normal distribution, and set biases to zero."""
    for part in parts:
        if isinstance(part, nn.Parameter):
            nn.init.trunc_normal_(part, std=0.02)
        elif part is not None:
            nn.init.trunc_normal_(part.weight, std=0.02)  # type: ignore[arg-type]
            nn.init.zeros_(part.bias)  # type: ignore[arg-type]
