"""Where the time of a run goes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds spent in each phase of a run.

    On a GPU, which computes behind the host's back, it is the GPU's own time that counts: events are put into its
    queue, and only read where the run waits for it anyway.

    Args:
        device: what computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside towards ``name``. Phases do not lie inside each other."""
        if self.device.type == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            yield
            ended.record()
            self._events.append((name, began, ended))
        else:
            start = time.monotonic()
            yield
            self._add(name, time.monotonic() - start)

    def read(self) -> dict[str, float]:
        """Seconds by phase since they were last read. Waits for the device."""
        seconds, self._seconds = self.state_dict(), {}
        return seconds

    def state_dict(self) -> dict[str, float]:
        """Seconds by phase since they were last read; they stay. Waits for the device."""
        for name, began, ended in self._events:
            ended.synchronize()
            self._add(name, began.elapsed_time(ended) / 1000)
        self._events = []
        return dict(self._seconds)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore ``state_dict``'s result."""
        self._seconds, self._events = dict(state), []

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
