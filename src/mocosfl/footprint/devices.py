"""Devices, and what a run costs them in time and energy.

A figure is ``measured`` by whom is named, of the ``datasheet``, or of the ``paper`` (Li et al., ICLR 2023, 5.3).
Rates are the highest that were reached, by Linpack; small convolutions on single images reach a part of them. So times
and energies are the least to expect, and say how recipes compare.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from mocosfl.errors import SettingError, nearest

Basis = Literal["measured", "datasheet", "paper", "given"]


@dataclass(frozen=True)
class Figure:
    """A number, and where it is from."""

    value: float
    basis: Basis


@dataclass(frozen=True)
class Device:
    """A device that a client may run on.

    Attributes:
        name: in words.
        flops: floating-point operations a second.
        watts: power while it computes or sends.
        memory: bytes.
        link: bits a second, either way.
        source: of the figures.
    """

    name: str
    flops: Figure
    watts: Figure
    memory: Figure
    link: Figure
    source: str

    def seconds(self, macs: float) -> float:
        """Time of so many multiply-adds."""
        return 2 * macs / self.flops.value

    def seconds_to_send(self, size: float) -> float:
        """Time of so many bytes on the link."""
        return 8 * size / self.link.value

    def joules(self, seconds: float) -> float:
        """Energy of so many seconds."""
        return seconds * self.watts.value


_LINPACK = "Linpack in double precision on four cores, power at the wall: github.com/geerlingguy/top500-benchmark"
_ETHERNET = "iperf3: mpr-projects.com, RPi NAS part 3"

DEVICES = {
    "pi4": Device(
        "Raspberry Pi 4B",
        Figure(11.889e9, "measured"),
        Figure(7.2, "measured"),
        Figure(2**30, "paper"),
        Figure(941e6, "measured"),
        f"{_LINPACK}, issue 13; {_ETHERNET}; the paper's has 1 GB",
    ),
    "pi5": Device(
        "Raspberry Pi 5",
        Figure(30.249e9, "measured"),
        Figure(11.0, "measured"),
        Figure(2 * 2**30, "datasheet"),
        Figure(941e6, "measured"),
        f"{_LINPACK}, issue 18; {_ETHERNET}; the smallest model that was measured so has 2 GB",
    ),
    "pi-zero-2w": Device(
        "Raspberry Pi Zero 2 W",
        Figure(0.37e9, "measured"),
        Figure(2.1, "measured"),
        Figure(512 * 2**20, "datasheet"),
        Figure(72.2e6, "datasheet"),
        f"{_LINPACK}, issue 26; 802.11n with one antenna at 20 MHz",
    ),
    "jetson-nano": Device(
        "NVIDIA Jetson Nano",
        Figure(236e9, "datasheet"),
        Figure(10.0, "datasheet"),
        Figure(4 * 2**30, "datasheet"),
        Figure(1e9, "datasheet"),
        "128 cores at 0.92 GHz: 472 GFLOP/s in half precision, half of that in single; its 10 W mode",
    ),
}
"""By name."""


def device(name: str, link: float | None = None) -> Device:
    """A device by its name.

    Args:
        name: a key of ``DEVICES``.
        link: Mbit a second instead of its own network's.

    Raises:
        SettingError: there is none of that name.
    """
    if name not in DEVICES:
        raise SettingError(f"device={name}: {nearest(name, DEVICES) or 'accepted are ' + ', '.join(DEVICES)}")
    if link is not None and not link > 0:
        raise SettingError(f"link={link:g}: expected Mbit a second, more than 0")
    found = DEVICES[name]
    return found if link is None else replace(found, link=Figure(link * 1e6, "given"))
