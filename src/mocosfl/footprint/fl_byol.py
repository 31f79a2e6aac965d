"""What full federated self-supervised learning costs a client: FL-BYOL (Zhuang et al., ICLR 2022).

The whole network is on the client, twice: the online one with projector and predictor, and the target one, its moving
average. Both views go through both. The online network travels up and down at every synchronisation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocosfl.contrast import update_momentum
from mocosfl.footprint.arithmetic import counted, passes
from mocosfl.footprint.memory import META, PeakMemory
from mocosfl.footprint.plan import Plan
from mocosfl.models import build, build_head
from mocosfl.models.heads import WIDTHS

EPOCHS, EPOCHS_A_ROUND, BATCH = 500, 5, 128
"""Local epochs of a client, those between two synchronisations, and images of a step, at most (published)."""


class FLBYOL:
    """A client of FL-BYOL for the backbone, the images and the size of a plan.

    Args:
        plan: the run to compare with.
        images: of the client; its batch is ``BATCH``, or all of them where there are fewer.
        device: where to compute.
    """

    def __init__(self, plan: Plan, images: float, device: torch.device = META) -> None:
        config, self.images = plan.config, images
        self.batch = max(2, min(BATCH, int(images)))  # BatchNorm needs two
        whole = config.model.model_copy(update={"client_norm": "batch", "server_norm": "batch", "bottleneck": "none"})
        model = build(whole, config.data.channels, plan.size, config.seed)
        projector = build_head("large", model.features, config.seed)
        self.predictor = build_head("large", WIDTHS["large"], config.seed).to(device)
        self.online = nn.Sequential(model.client, model.server, projector).to(device)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.views = [
            torch.zeros(self.batch, config.data.channels, plan.size, plan.size, device=device) for _ in range(2)
        ]
        parameters = [*self.online.parameters(), *self.predictor.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=0.03, momentum=0.9, weight_decay=5e-4)

    def step(self) -> Tensor:
        """One step: the prediction of each view's target from the other view, both ways."""
        predictions = [self.predictor(self.online(view)) for view in self.views]
        with torch.no_grad():
            targets = [self.target(view) for view in self.views]
        likeness = [F.cosine_similarity(p, t).mean() for p, t in zip(predictions, targets[::-1], strict=True)]
        loss = -torch.stack(likeness).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        update_momentum(self.target.parameters(), self.online.parameters(), 0.99)
        return loss.detach()

    @property
    def kept(self) -> list[Tensor]:
        """Tensors that stay between two steps, SGD momentum apart."""
        networks = (self.online, self.predictor, self.target)
        return [*(t for network in networks for t in (*network.parameters(), *network.buffers())), *self.views]

    @property
    def parameters(self) -> int:
        """Of the online network with its predictor."""
        return sum(p.numel() for network in (self.online, self.predictor) for p in network.parameters())

    @property
    def half(self) -> int:
        """Bytes that travel one way at a synchronisation: the online network with its predictor, statistics too."""
        return sum(t.nbytes for network in (self.online, self.predictor) for t in network.state_dict().values())

    @property
    def rounds(self) -> int:
        """Synchronisations of a run."""
        return EPOCHS // EPOCHS_A_ROUND

    def macs(self) -> dict[str, float]:
        """Multiply-adds for an image, as ``arithmetic.of_client``: here ``momentum`` is the target network's."""
        forward, backward = passes(nn.Sequential(self.online, self.predictor), self.views[0], learns_input=False)
        target = counted(lambda: self.target(self.views[0])) / self.batch
        return {"forward": 2 * forward, "backward": 2 * backward, "momentum": 2 * target}

    def memory(self) -> int:
        """Peak bytes of the tensors of a step."""
        return peak_of(self.step, self.kept)


def peak_of(step: Callable[[], object], kept: list[Tensor]) -> int:
    """Peak bytes of the second of two steps."""
    with PeakMemory(kept) as memory:
        step()
        step()
    return memory.peak
