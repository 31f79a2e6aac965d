"""Spreading the training images over the clients.

flwr-datasets 0.6.1 was measured first: its pathological partitioner took 8.7 s to spread 50,000 images over
10,000 clients, and its Dirichlet partitioner gave up at that size. It also pins datasets below 5 and rich
below 15, so the partitions are made here, by array code without a loop over clients.

None of the kinds draws again until a draw happens to fit, so none can hang: every loop below runs over the
classes or for a fixed number of passes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mocosfl.config import PartitionSettings
from mocosfl.errors import SettingError

_STREAM = 0x70617274  # "part": keeps these draws apart from all others that start from the same seed


@dataclass(frozen=True)
class Partition:
    """Which client holds which rows of the training set."""

    rows: np.ndarray
    """int64 (n,): rows of the training set, client after client."""
    offsets: np.ndarray
    """int64 (N + 1,): client c holds ``rows[offsets[c]:offsets[c + 1]]``."""

    def __len__(self) -> int:
        """Number of clients, N."""
        return len(self.offsets) - 1

    @property
    def sizes(self) -> np.ndarray:
        """Images of each client. Shape: (N,), int64."""
        return np.diff(self.offsets)

    def client(self, index: int) -> np.ndarray:
        """Rows of the training set that one client holds. Shape: (sizes[index],), int64."""
        return self.rows[self.offsets[index] : self.offsets[index + 1]]

    def counts(self, labels: np.ndarray, classes: int) -> np.ndarray:
        """Images of each client in each class.

        Args:
            labels: labels of the whole training set, held-out rows included: ``rows`` are looked up in it.
            classes: number of classes.

        Returns:
            int64, shape (N, classes).
        """
        owner = np.repeat(np.arange(len(self)), self.sizes)
        cells = np.bincount(owner * classes + labels[self.rows], minlength=len(self) * classes)
        return cells.reshape(len(self), classes)


def partition(
    settings: PartitionSettings,
    clients: int,
    rows: np.ndarray,
    labels: np.ndarray | None,
    classes: int | None,
    seed: int,
    smallest: int = 1,
) -> Partition:
    """Give every training image to exactly one client.

    Args:
        settings: kind of partition and its parameters.
        clients: number of clients, N.
        rows: rows of the training set to spread, without the held-out ones. Shape: (n,), integer.
        labels: labels of exactly these rows, in 0 ... classes - 1. Shape: (n,), integer. None: unlabelled.
        classes: number of classes of the data set. None: unlabelled.
        seed: the same seed gives the same partition.
        smallest: images that every client needs, its batch.

    Raises:
        SettingError: the images, the classes or the labels do not suffice for these settings.
    """
    if clients > len(rows):
        raise SettingError(f"clients.number={clients}: there are only {len(rows)} training images")
    if clients * smallest > len(rows):
        raise SettingError(
            f"clients.batch={smallest}: {clients} clients (clients.number) with a batch each need "
            f"{clients * smallest} training images, there are {len(rows)}"
        )
    rng = np.random.default_rng([seed, _STREAM])
    skew = settings.quantity_skew
    volumes = None if skew is None else _proportions(np.full(clients, skew), rng)
    if settings.kind == "iid" and volumes is not None:
        owner = _spread(rng.permutation(len(rows)), volumes, rng)
        owner = _fill_up(owner, clients, smallest, rng)
    elif settings.kind == "iid":
        owner = rng.permutation(np.arange(len(rows)) % clients)
    elif labels is None or classes is None:
        raise SettingError(f"partition.kind={settings.kind}: the data set has no labels; only iid can do without")
    elif settings.kind == "classes":
        owner = _by_classes(labels, classes, clients, settings.classes_per_client, rng)
    else:
        owner = _dirichlet(labels, classes, clients, settings.alpha, volumes, rng)
        owner = _fill_up(owner, clients, smallest, rng)

    sizes = np.bincount(owner, minlength=clients)
    poorest = int(sizes.argmin())
    if sizes[poorest] < smallest:
        raise SettingError(
            f"clients.batch={smallest}: client {poorest} holds only {sizes[poorest]} images, because the "
            "classes are too unequal to give every client the same volume"
        )
    by_client = np.argsort(owner, kind="stable")
    return Partition(rows[by_client].astype(np.int64), np.concatenate([[0], sizes.cumsum()]))


def partition_in_two(
    settings: PartitionSettings,
    clients: tuple[int, int],
    share: float,
    rows: np.ndarray,
    labels: np.ndarray | None,
    classes: int | None,
    seed: int,
    smallest: tuple[int, int],
) -> Partition:
    """Give the last clients, the rich ones, a share of all images, and spread either part over its clients.

    Args:
        settings: kind of partition and its parameters; it holds in either part.
        clients: poor and rich clients.
        share: of the images that the rich hold together, of every class alike; rounded down.
        rows, labels, classes, seed: as for ``partition``.
        smallest: images that every poor and every rich client needs, its batch.

    Raises:
        SettingError: as ``partition``, or a part of the images does not give each of its clients a batch.
    """
    setting = f"clients.rich_data_share={share:g}"
    rng = np.random.default_rng([seed, _STREAM, 1])
    order = np.lexsort((rng.random(len(rows)), np.zeros(len(rows)) if labels is None else labels))
    edges = np.floor(np.arange(len(rows) + 1) * share + 1e-9)  # every so many in the order of the classes
    rich = np.zeros(len(rows), bool)
    rich[order[np.diff(edges) > 0]] = True
    parts = []
    for name, taken, number, batch in zip(("poor", "rich"), (~rich, rich), clients, smallest, strict=True):
        if number * batch > taken.sum():
            raise SettingError(
                f"{setting}: the {number} {name} clients would hold {taken.sum()} images in all, and need {batch} "
                "each, a batch"
            )
        its_labels = None if labels is None else labels[taken]
        try:
            parts.append(partition(settings, number, rows[taken], its_labels, classes, seed, batch))
        except SettingError as error:
            raise SettingError(f"{setting}: the {number} {name} clients cannot be given their part: {error}") from error
    poor, other = parts
    return Partition(
        np.concatenate([poor.rows, other.rows]), np.concatenate([poor.offsets, other.offsets[1:] + len(poor.rows)])
    )


def _by_classes(labels: np.ndarray, classes: int, clients: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """Owner of each image where every client holds exactly k classes, in nearly equal volumes.

    A class is cut into slots, one for each client that holds it. Every slot has at least one image.
    """
    sizes = np.bincount(labels, minlength=classes)
    present = np.count_nonzero(sizes)
    setting = f"partition.classes_per_client={k}"
    if k > classes:
        raise SettingError(f"{setting}: the data set has {classes} classes")
    if k > present:
        raise SettingError(f"{setting}: only {present} of the {classes} classes have training images")
    if clients * k < present:
        raise SettingError(
            f"{setting}: {clients} clients (clients.number) with {k} classes each cannot hold all {present} classes"
        )
    room = np.minimum(sizes, clients).sum()
    if clients * k > room:
        raise SettingError(
            f"{setting}: {clients} clients (clients.number) with {k} classes each need "
            f"{clients * k} pairs of client and class with an image each; these classes give at most {room}"
        )

    slots = _slots(sizes, clients, clients * k)
    # Row after row of a (k, clients) table, a class is a run no longer than a row: no column meets it twice.
    held = np.repeat(np.arange(classes), slots).reshape(k, clients).T.copy()
    _mix(held, sizes / np.maximum(slots, 1), rng)

    by_class = np.argsort(held.ravel(), kind="stable")
    rank = np.arange(clients * k) - np.repeat(slots.cumsum() - slots, slots)
    share, extra = np.divmod(sizes, np.maximum(slots, 1))
    images = np.empty((clients, k), np.int64)
    images.flat[by_class] = np.repeat(share, slots) + (rank < np.repeat(extra, slots))
    _balance(held, images, rng)

    shuffled = rng.permutation(len(labels))
    owner = np.empty(len(labels), np.int64)
    owner[shuffled[np.argsort(labels[shuffled], kind="stable")]] = np.repeat(by_class // k, images.ravel()[by_class])
    return owner


def _slots(sizes: np.ndarray, clients: int, total: int) -> np.ndarray:
    """Share slots among the classes, in proportion to their sizes as far as the limits of each allow.

    A class has at least one slot, no more than it has images and no more than there are clients.

    Args:
        sizes: images of each class; a class without any has no slot. Shape: (classes,).
        clients: number of clients.
        total: slots to share.

    Returns:
        Slots of each class, int64, shape (classes,).
    """
    least, most = np.minimum(sizes, 1), np.minimum(sizes, clients)
    low, high = 0.0, 1.0  # slots an image; at 1 every class is at its upper limit
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(middle * sizes, least, most).sum() <= total else (low, middle)
    quota = np.clip(low * sizes, least, most)
    slots = quota.astype(np.int64)
    largest_remainder = np.argsort(slots - quota, kind="stable")
    slots[largest_remainder[: total - slots.sum()]] += 1
    return slots


def _mix(held: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> None:
    """Swap classes between random pairs of clients, so that every combination of classes can occur.

    Left out are swaps that would give a client a class twice, and those that would open a gap between the two
    of more than half a client's volume: two rare classes on one client, two frequent ones on another.

    Args:
        held: class of each slot, changed in place. Shape: (clients, k).
        weights: average images of one slot of each class. Shape: (classes,).
        rng: source of the random choices.
    """
    clients, k = held.shape
    half_volume = weights[held].sum() / clients / 2
    for _ in range(16 + 8 * k):
        one, other = rng.permutation(clients)[: clients // 2 * 2].reshape(2, -1)
        i, j = rng.integers(k, size=(2, clients // 2))
        gives, takes = held[one, i], held[other, j]
        gap = weights[held[one]].sum(1) - weights[held[other]].sum(1)
        new_gap = gap + 2 * (weights[takes] - weights[gives])
        fits = np.abs(new_gap) <= np.maximum(np.abs(gap), half_volume)
        fits &= (held[one] != takes[:, None]).all(1) & (held[other] != gives[:, None]).all(1)
        held[one[fits], i[fits]] = takes[fits]
        held[other[fits], j[fits]] = gives[fits]


def _balance(held: np.ndarray, images: np.ndarray, rng: np.random.Generator) -> None:
    """Even out the volumes of the clients by moving images within a class.

    In a pass every client puts up one of its classes at random. Within each class the client with the most
    images meets the one with the fewest, the next the next, and half of the difference changes hands, as long
    as the giver keeps one. Half is rounded up, which lets a surplus of one image wander until it meets a gap
    of one. The last two meet in about as many passes as there are classes; ten times as many are allowed.

    Args:
        held: class of each slot. Shape: (clients, k).
        images: images of each slot, changed in place. Shape: (clients, k).
        rng: source of the random choices.
    """
    clients, k = held.shape
    everyone = np.arange(clients)
    volume: np.ndarray = images.sum(1)
    for _ in range(100 + 10 * int(held.max())):
        if np.ptp(volume) <= 1:
            return
        slot = rng.integers(k, size=(clients,))
        offered = held[everyone, slot]
        by_class_and_volume = offered * (volume.max() + 1) + volume + rng.random(clients)
        order = np.argsort(by_class_and_volume, kind="stable")
        runs = offered[order]
        opposite = np.searchsorted(runs, runs, "left") + np.searchsorted(runs, runs, "right") - 1 - everyone
        lower = everyone < opposite
        poor, rich = order[lower], order[opposite[lower]]
        moved = np.minimum((volume[rich] - volume[poor] + 1) // 2, images[rich, slot[rich]] - 1)
        images[rich, slot[rich]] -= moved
        images[poor, slot[poor]] += moved
        volume[rich] -= moved
        volume[poor] += moved


def _dirichlet(
    labels: np.ndarray, classes: int, clients: int, alpha: float, volumes: np.ndarray | None, rng: np.random.Generator
) -> np.ndarray:
    """Owner of each image where each class is spread in proportions from Dirichlet(alpha), symmetric without volumes.

    With the clients' volumes, (clients,), of any sum, its mean is those, at the same concentration: of
    alpha * clients * volumes.
    """
    owner = np.empty(len(labels), np.int64)
    for label in range(classes):
        images = rng.permutation(np.flatnonzero(labels == label))
        if volumes is None:
            chosen = _spread(np.arange(len(images)), _proportions(np.full(clients, alpha), rng), rng)
            owner[images] = rng.permutation(clients)[chosen]
        else:
            proportions = _proportions(np.maximum(alpha * clients * volumes / volumes.sum(), 1e-12), rng)
            owner[images] = _spread(np.arange(len(images)), proportions, rng)
    return owner


def _proportions(alphas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A draw from the Dirichlet distribution of these concentrations, (clients,), up to a factor."""
    # Gamma(alpha) is distributed as Gamma(alpha + 1) U^(1 / alpha). Its logarithm neither underflows at a
    # small alpha nor overflows at a large one, so the proportions never become 0 / 0.
    log_gamma = np.log(rng.standard_gamma(alphas + 1)) - rng.standard_exponential(len(alphas)) / alphas
    return np.exp(log_gamma - log_gamma.max())


def _spread(places: np.ndarray, proportions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Owner of the image at each place, a permutation of range(n), where clients get these proportions of all.

    A client gets its proportion rounded up or down, right on average (systematic sampling).
    """
    cumulated = proportions.cumsum()
    points = (places + rng.random()) / max(len(places), 1) * cumulated[-1]
    return np.minimum(np.searchsorted(cumulated, points, "right"), len(proportions) - 1)


def _fill_up(owner: np.ndarray, clients: int, smallest: int, rng: np.random.Generator) -> np.ndarray:
    """Bring every client to ``smallest`` images, at the expense of the clients that hold the most.

    Each client's images are stacked in random order. Those that are missing elsewhere are taken from the
    greatest heights, which cuts the tallest stacks down to one level; as there are images enough for all,
    none is cut below ``smallest``. They are handed on stack by stack, so a client filled up from a one-sided
    client becomes one-sided too.
    """
    sizes = np.bincount(owner, minlength=clients)
    missing = np.maximum(smallest - sizes, 0)
    shuffled = rng.permutation(len(owner))
    stacked = shuffled[np.argsort(owner[shuffled], kind="stable")]
    height = np.arange(len(owner)) - np.repeat(sizes.cumsum() - sizes, sizes)
    topmost = np.sort(np.argsort(height, kind="stable")[len(owner) - missing.sum() :])
    owner = owner.copy()
    owner[stacked[topmost]] = np.repeat(np.arange(clients), missing)
    return owner
