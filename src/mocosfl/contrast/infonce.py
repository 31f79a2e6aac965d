"""The contrastive loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def infonce(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """InfoNCE of each query: its key is the positive, the queue holds the negatives (MoCo, eq. 1).

    -log( exp(q·k / T) / (exp(q·k / T) + Σ_j exp(q·n_j / T)) )

    Args:
        queries: q, (n, D), unit vectors.
        keys: k, (n, D), unit vectors; row i is the positive of query i. No gradient flows into them.
        negatives: (K, D), shared by all queries; or (P, K, D) with n a multiple of P, where each of P equal
            consecutive pieces of the queries has its own.
        temperature: T.

    Returns:
        The loss of each query, (n,) float32, and whether its positive scores higher than every negative, (n,) bool.

    Raises:
        ValueError: the shapes do not fit.
    """
    if queries.shape != keys.shape:
        raise ValueError(f"queries {tuple(queries.shape)} and keys {tuple(keys.shape)} must have one shape")
    if negatives.ndim == 3 and queries.shape[0] % negatives.shape[0]:
        raise ValueError(f"{queries.shape[0]} queries cannot be cut into {negatives.shape[0]} equal pieces")
    positive = (queries * keys.detach()).sum(dim=1, keepdim=True)  # (n, 1)
    if negatives.ndim == 3:
        pieces = queries.view(negatives.shape[0], -1, queries.shape[1])
        negative = torch.bmm(pieces, negatives.detach().mT).flatten(0, 1)  # (n, K)
    else:
        negative = queries @ negatives.detach().T
    logits = torch.cat([positive, negative], dim=1) / temperature
    target = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    loss = F.cross_entropy(logits, target, reduction="none")
    with torch.no_grad():
        correct = logits[:, 0] > logits[:, 1:].amax(dim=1)
    return loss, correct
