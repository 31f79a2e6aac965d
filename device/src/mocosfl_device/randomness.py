"""Counter-based randomness: every random number that belongs to a client is a pure function of where it is used.

There is no generator and no state. A number is found by hashing (seed, client, draw, view, index), so a resumed run
needs nothing stored, the result does not depend on who answers first or on how clients are spread over processes, and
a device without torch draws the same numbers. It is written in numpy alone: the numbers of one step are a few
thousand, found on the host in well under a millisecond and copied to the compute device without waiting for it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S40 = (np.uint64(n) for n in (30, 27, 31, 40))

ROUNDS = 32
"""Rounds of the shuffle. 6 log2(n) rounds mix n items well; 32 serves clients of up to some thousands of images,
and for larger ones still gives a permutation."""

POOL, ORDER, AUGMENT, STREAM, PROTECT, REPLAY, DROP = 1, 2, 3, 4, 5, 6, 7
"""First counter of each use, so that no two uses ever share a number."""


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea and Flood, 2014), a bijection in which every bit depends on all others."""
    x = (x ^ (x >> _S30)) * _M1
    x = (x ^ (x >> _S27)) * _M2
    return x ^ (x >> _S31)


def bits(*counters: ArrayLike) -> NDArray[np.uint64]:
    """64 random bits for every combination of counters.

    Args:
        counters: integers or arrays of integers that broadcast together; negative ones wrap.

    Returns:
        uint64, of the broadcast shape.
    """
    with np.errstate(over="ignore"):
        state = np.zeros((), dtype=np.uint64)
        for counter in counters:
            state = mix((state + _GOLDEN) ^ mix(np.asarray(counter).astype(np.uint64) + _GOLDEN))
        return state


def uniform(*counters: ArrayLike) -> NDArray[np.float32]:
    """Random numbers in [0, 1), multiples of 2**-24.

    Args:
        counters: as for ``bits``.

    Returns:
        float32, of the broadcast shape.
    """
    return (bits(*counters) >> _S40).astype(np.float32) * np.float32(2**-24)


def stream(seed: int, use: str) -> int:
    """A seed of its own for each use of a generator: equal seeds would draw equal numbers.

    Args:
        seed: the run's seed.
        use: names the use, such as ``queue``.

    Returns:
        An integer in [0, 2**63).
    """
    return int(bits(seed, STREAM, *use.encode()) >> np.uint64(1))


def permuted(position: ArrayLike, size: ArrayLike, *counters: ArrayLike) -> NDArray[np.int64]:
    """Where a random permutation of ``range(size)`` sends ``position``, without building the permutation.

    The swap-or-not shuffle of Hoang, Morris and Rogaway (2012): in each round a position x and its partner
    (key - x) mod size swap or do not, as one random bit of the larger of the two says. Any size, no tables.

    Args:
        position: integers in [0, size).
        size: number of items, at least 1; broadcasts against ``position``.
        counters: name the permutation; they broadcast against ``position`` too.

    Returns:
        int64, of the broadcast shape: distinct for distinct positions of one permutation.
    """
    n = np.asarray(size).astype(np.uint64)
    base = bits(*counters)
    x, n, base = np.broadcast_arrays(np.asarray(position).astype(np.uint64), n, base)
    with np.errstate(over="ignore"):
        for turn in range(ROUNDS):
            key = mix(base + np.uint64(2 * turn + 1) * _GOLDEN) % n
            partner = (key + n - x) % n
            larger = np.maximum(x, partner)
            swap = mix((base + np.uint64(2 * turn + 2) * _GOLDEN) ^ (larger * _M1)) >> np.uint64(63)
            x = np.where(swap.astype(bool), partner, x)
    return x.astype(np.int64)


def items(
    seed: int, client: NDArray[np.int64], draws: NDArray[np.int64], images: NDArray[np.int64], use: int = ORDER
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which images draws fall on.

    Args:
        seed: the run's.
        client, draws, images: (n,) int64: whose draw it is, its number, and how many images that client has.
        use: first counter of the order.

    Returns:
        Each draw's image, from 0 among its client's, and how often its client had gone through all of them before, (n,)
        int64 each.
    """
    epoch, position = np.divmod(draws, images)
    return permuted(position, images, seed, use, client, epoch), epoch
