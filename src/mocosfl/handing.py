"""Handing out an average of which each client takes a part, and keeps some of its own (``sync.own``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from mocosfl.config import SyncSettings
from mocosfl.data.images import upload
from mocosfl.errors import SettingError
from mocosfl.models.side_by_side import Stack
from mocosfl.sync import PREDICTOR, distance, mixed, own_shares, scale


class Handing:
    """The last average, and how much of it each client takes.

    Active clients keep their halves as they have trained them, in the stacks or, once they leave the pool, in the
    cohort's bank. The average is mixed in when a client takes its next step, whenever that is: who comes back is
    measured against the average of that day, and who comes for the first time takes the average as it is.

    Args:
        settings: of the synchronisation.
        number: N, all clients.
        stacks: what is averaged, of the active clients, (P, ...) by name, ``online.NAME`` and ``momentum.NAME``;
            changed in place.
        parameters: names of the online halves' parameters.

    Attributes:
        average: the last average, (...) by the same names; zeros before there is one.
        scales: (N,) what each client's distance is multiplied with; 0 for those that had no part in an average yet.
        owed: whether the active clients have yet to be handed the average.

    Raises:
        SettingError: there is no predictor to keep.
    """

    def __init__(self, settings: SyncSettings, number: int, stacks: Stack, parameters: Mapping[str, Tensor]) -> None:
        if settings.own == "predictor" and not any(name.startswith(PREDICTOR) for name in parameters):
            raise SettingError(
                "sync.own=predictor: the clients hold no predictor; accepted without one are none and ema"
            )
        self.settings, self.stacks, self.parameters = settings, stacks, parameters
        self.average = {name: torch.zeros_like(stack[0]) for name, stack in stacks.items()}
        any_of_them = next(iter(stacks.values()))
        self.scales = torch.zeros(number, dtype=any_of_them.dtype, device=any_of_them.device)
        self.owed = False

    @torch.no_grad()
    def distances(self, average: Mapping[str, Tensor]) -> Tensor:
        """How far each active client is from an average, (P,)."""
        return distance(self.settings, self.parameters, {name: average[f"online.{name}"] for name in self.parameters})

    @torch.no_grad()
    def note(self, average: Mapping[str, Tensor], clients: NDArray, distances: Tensor) -> Tensor:
        """Take note of an average that is to be handed out.

        Args:
            average: by name.
            clients: (k,) int64, those that had a part in it.
            distances: (k,) theirs from it.

        Returns:
            (k,) the share of its own that each would keep if it took its next step now.
        """
        for name, tensor in self.average.items():
            tensor.copy_(average[name])
        self.owed = True
        index = upload(clients, self.scales.device)
        before = self.scales[index]
        scales = torch.where(before > 0, before, scale(self.settings, distances))
        self.scales[index] = scales
        return own_shares(self.settings, scales, distances)

    @torch.no_grad()
    def hand_out(self, clients: NDArray) -> None:
        """Mix the average into the halves of the active clients, (P,) int64, if they have not been handed it yet."""
        if not self.owed:
            return
        self.owed = False
        shares = own_shares(
            self.settings, self.scales[upload(clients, self.scales.device)], self.distances(self.average)
        )
        for name, stack in self.stacks.items():
            kept = self.settings.own == "ema" or name.partition(".")[2].startswith(PREDICTOR)
            stack.copy_(mixed(stack, self.average[name], shares if kept else torch.zeros_like(shares)))

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {"average": self.average, "scales": self.scales, "owed": self.owed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``'s result, in place."""
        for name, tensor in self.average.items():
            tensor.copy_(state["average"][name])
        self.scales.copy_(state["scales"])
        self.owed = state["owed"]
