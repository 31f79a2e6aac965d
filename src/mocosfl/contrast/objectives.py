"""Self-supervised objectives: what the server makes of the queries and keys of one step.

All of them stand behind one interface, so that they can be exchanged by the setting ``contrast.objective``. A further
one is a file of the user's (docs/objectives.md).
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mocosfl.config import ContrastSettings
from mocosfl.contrast.infonce import infonce
from mocosfl.errors import SettingError
from mocosfl.trust import check_trusted


@dataclass(frozen=True)
class Batch:
    """What the networks put out in one step, for the images of all clients.

    A way is one direction of the comparison of two views: W is 2 where views are compared both ways, else 1.

    Attributes:
        queries: (W, N, D) float, of the online networks, as they come from the head (or the predictor): not normalised.
        keys: (W, N, D) float, of the momentum networks, of the other view of the same image. No gradient flows into
            them. W is 0 where the objective takes no keys.
        negatives: keys of earlier steps, unit vectors: (K, D) for all images; or (P, K, D) where each of P equal
            consecutive pieces of the images has its own. None where the objective has no queue.
        clients: (N,) int64, the client of each image, where the images of different clients must not be contrasted.
            None where all may be.
    """

    queries: Tensor
    keys: Tensor
    negatives: Tensor | None = None
    clients: Tensor | None = None


class Objective(ABC):
    """A loss of every query.

    Args:
        settings: of the contrast.
    """

    keys: ClassVar[bool] = True
    """Whether it compares with the momentum networks' output. If not, it compares both views' queries."""
    queue: ClassVar[bool] = False
    """Whether it wants keys of earlier steps."""
    predictor: ClassVar[bool] = False
    """Whether queries pass a predictor behind the head, which keys do not."""

    def __init__(self, settings: ContrastSettings) -> None:
        self.settings = settings

    @abstractmethod
    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of every query, and whether its image was recognised.

        With several processes, each computes all losses and differentiates by its own queries, so a loss may depend on
        all of them.

        Returns:
            Losses, (W, N) float, of which the sum over the ways and the mean over the images are minimised; and hits,
            (W, N) bool.
        """


class MoCo(Objective):
    """InfoNCE against a queue of keys (He et al., CVPR 2020, eq. 1; v2: Chen et al., 2020)."""

    queue = True

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        assert batch.negatives is not None
        q, k = F.normalize(batch.queries, dim=2), F.normalize(batch.keys, dim=2)
        pairs = zip(q, k, strict=True)
        found = [infonce(*pair, batch.negatives, self.settings.temperature) for pair in pairs]
        losses, hits = zip(*found, strict=True)
        return torch.stack(losses), torch.stack(hits)


class MoCoV3(Objective):
    """InfoNCE against the other keys of the batch, behind a predictor (Chen, Xie, He, ICCV 2021, algorithm 1).

    2 T · -log( exp(q·k / T) / Σ_j exp(q·k_j / T) )
    """

    predictor = True

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        temperature = self.settings.temperature
        q, k = F.normalize(batch.queries, dim=2), F.normalize(batch.keys, dim=2)
        logits = _among_own(q @ k.mT, batch.clients) / temperature  # (W, N, N)
        target = torch.arange(q.shape[1], device=q.device)
        losses = [F.cross_entropy(way, target, reduction="none") for way in logits]
        return 2 * temperature * torch.stack(losses), _recognised(logits)


class SimCLR(Objective):
    """NT-Xent over both views of the batch (Chen et al., ICML 2020, eq. 1). There is no momentum copy.

    -log( exp(z·z' / T) / Σ_j exp(z·z_j / T) ) over all z_j but z itself, halved, so that the mean over all 2 N queries
    is minimised.
    """

    keys = False

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        n = batch.queries.shape[1]
        z = F.normalize(batch.queries, dim=2).flatten(0, 1)  # (2 N, D)
        clients = None if batch.clients is None else batch.clients.repeat(2)
        logits = _among_own(z @ z.T, clients) / self.settings.temperature
        itself = torch.eye(2 * n, dtype=torch.bool, device=z.device)
        logits = logits.masked_fill(itself, -torch.inf)
        target = torch.arange(2 * n, device=z.device).roll(n)
        losses = F.cross_entropy(logits, target, reduction="none") / 2
        return losses.unflatten(0, (2, n)), (logits.argmax(dim=1) == target).unflatten(0, (2, n))


class BYOL(Objective):
    """Distance of the prediction and the key, no negatives (Grill et al., NeurIPS 2020, eq. 2): 2 - 2 q·k.

    A hit is a query that is nearer to its key than to those of the batch's other images; nothing is learned from that.
    """

    predictor = True

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        q, k = F.normalize(batch.queries, dim=2), F.normalize(batch.keys, dim=2)
        with torch.no_grad():
            hits = _recognised(_among_own(q @ k.mT, batch.clients))
        return 2 - 2 * (q * k).sum(dim=2), hits


OBJECTIVES: dict[str, type[Objective]] = {"moco": MoCo, "mocov3": MoCoV3, "simclr": SimCLR, "byol": BYOL}


def objective_of(settings: ContrastSettings) -> Objective:
    """The objective that ``contrast.objective`` names.

    Raises:
        SettingError: the file that it names may not be run here (``mocosfl.trust``), cannot be loaded, or has no such
            objective.
    """
    if settings.objective in OBJECTIVES:
        return OBJECTIVES[settings.objective](settings)
    found = _from_file(settings.objective)
    what = f"contrast.objective={settings.objective}"
    if not found.keys and not settings.both_views:
        raise SettingError(f"{what}: without keys it needs contrast.both_views=True")
    if not found.keys and found.queue:
        raise SettingError(f"{what}: a queue is made of keys; queue=True needs keys=True")
    return found(settings)


def score(objective: Objective, batch: Batch, name: str) -> tuple[Tensor, Tensor]:
    """Losses and hits of an objective; see ``Objective.__call__``.

    Args:
        objective: one of those here, or the user's, which is held to what it must return.
        batch: the outputs of one step.
        name: the objective's, as ``contrast.objective`` has it.

    Raises:
        SettingError: the user's objective fails, or returns something else.
    """
    if name in OBJECTIVES:
        return objective(batch)
    try:
        made = objective(batch)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the user's class raises
        raise SettingError(f"contrast.objective={name}: {type(error).__name__} in its call: {error}") from error
    wanted = tuple(batch.queries.shape[:2])
    match made:
        case (Tensor() as losses, Tensor() as hits) if losses.shape == hits.shape == wanted:
            if losses.is_floating_point() and hits.dtype == torch.bool:
                return losses, hits
    found = made if isinstance(made, tuple | list) else [made]
    shown = ", ".join(
        f"{tuple(one.shape)} {one.dtype}".replace("torch.", "") if isinstance(one, Tensor) else type(one).__name__
        for one in found
    )
    raise SettingError(
        f"contrast.objective={name}: it returned {shown}; expected are losses and hits of every query, "
        f"{wanted} float and {wanted} bool"
    )


def _from_file(text: str) -> type[Objective]:
    path, _, name = text.rpartition(":")
    what = f"contrast.objective={text}"
    check_trusted(what, text)
    if not Path(path).is_file():
        raise SettingError(f"{what}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"mocosfl_objective_{Path(path).stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        raise SettingError(f"{what}: {path} cannot be loaded: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise SettingError(f"{what}: {path} has no class {name} that derives from mocosfl.contrast.Objective")
    return found


def _among_own(similarities: Tensor, clients: Tensor | None) -> Tensor:
    """(..., N, N) similarities, -inf between images of different clients where ``clients``, (N,), are given."""
    if clients is None:
        return similarities
    return similarities.masked_fill(clients[:, None] != clients[None, :], -torch.inf)


def _recognised(similarities: Tensor) -> Tensor:
    """(W, N, N) to (W, N): whether each row is largest on the diagonal."""
    target = torch.arange(similarities.shape[-1], device=similarities.device)
    return similarities.argmax(dim=2) == target
