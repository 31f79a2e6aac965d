import numpy as np
import pytest

from mocosfl.config import PartitionSettings
from mocosfl.data.partition import Partition, partition, partition_in_two
from mocosfl.errors import SettingError

KINDS = [
    {"kind": "iid"},
    {"kind": "classes", "classes_per_client": 2},
    {"kind": "classes", "classes_per_client": 5},
    {"kind": "dirichlet", "alpha": 0.1},
    {"kind": "dirichlet", "alpha": 100.0},
    {"kind": "iid", "quantity_skew": 0.1},
    {"kind": "dirichlet", "alpha": 0.5, "quantity_skew": 0.3},
    {"kind": "dirichlet", "alpha": 1e-3, "quantity_skew": 1e-3},
]


def shuffled_labels(sizes, seed=0):
    """Labels of a training set with this many images of each class."""
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))


def spread(labels, clients, *, classes=10, seed=0, smallest=1, **settings):
    rows = np.arange(len(labels))
    return partition(PartitionSettings(**settings), clients, rows, labels, classes, seed, smallest)


@pytest.mark.parametrize("settings", KINDS)
@pytest.mark.parametrize("clients", [5, 6, 37, 150])
def test_every_image_has_exactly_one_client(settings, clients):
    labels = shuffled_labels([150, 90, 120, 100, 101, 130, 99, 100, 77, 133])
    rows = np.flatnonzero(np.arange(len(labels)) % 7)  # a training set with a held-out slice
    held = partition(PartitionSettings(**settings), clients, rows, labels[rows], 10, seed=3)
    assert len(held) == clients
    assert held.rows.dtype == held.offsets.dtype == np.int64
    np.testing.assert_array_equal(np.sort(held.rows), rows)
    np.testing.assert_array_equal(np.concatenate([held.client(c) for c in range(clients)]), held.rows)
    assert held.sizes.sum() == len(rows)
    assert held.sizes.min() >= 1


@pytest.mark.parametrize("settings", KINDS)
def test_the_seed_decides(settings):
    labels = shuffled_labels([100] * 10)
    first, again, other = (spread(labels, 50, seed=seed, **settings) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.rows, again.rows)
    np.testing.assert_array_equal(first.offsets, again.offsets)
    assert not np.array_equal(first.rows, other.rows)


def test_counts_equal_a_plain_loop():
    labels = shuffled_labels([30, 0, 50, 20])
    held = Partition(np.array([5, 99, 7, 1, 2]), np.array([0, 2, 2, 5]))
    expected = np.zeros((3, 4), int)
    for client in range(3):
        for row in held.client(client):
            expected[client, labels[row]] += 1
    counts = held.counts(labels, 4)
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts, expected)


@pytest.mark.parametrize("clients", [1, 7, 1000])
def test_iid_pieces_differ_by_at_most_one_image_and_need_no_labels(clients):
    held = partition(PartitionSettings(kind="iid"), clients, np.arange(1000), None, None, seed=0)
    assert np.ptp(held.sizes) == (0 if 1000 % clients == 0 else 1)


@pytest.mark.parametrize(
    ("images", "classes", "clients", "k"),
    [
        (5000, 10, 5, 2),
        (5000, 10, 100, 1),
        (5000, 10, 100, 2),
        (5000, 10, 101, 2),
        (5000, 10, 1000, 2),  # 2.5 images of each class: a client has 2 of one and 3 of the other
        (5000, 10, 7, 3),  # 21 slots: one class has three, the others two
        (1000, 10, 30, 10),
        (2000, 100, 50, 20),
        (100, 10, 1, 10),
        (200, 10, 100, 2),
    ],
)
def test_k_classes_a_client_in_equal_volume(images, classes, clients, k):
    labels = shuffled_labels([images // classes] * classes)
    held = spread(labels, clients, classes=classes, kind="classes", classes_per_client=k)
    assert ((held.counts(labels, classes) > 0).sum(1) == k).all()
    assert np.ptp(held.sizes) == (0 if images % clients == 0 else 1)


@pytest.mark.parametrize(("clients", "k"), [(100, 2), (100, 5), (500, 2)])
def test_unequal_classes_still_give_equal_volume(clients, k):
    sizes = (3000 / np.arange(1, 11) ** 1.2).astype(int)
    labels = shuffled_labels(sizes)
    held = spread(labels, clients, kind="classes", classes_per_client=k)
    assert ((held.counts(labels, 10) > 0).sum(1) == k).all()
    assert np.ptp(held.sizes) <= 1


def test_tiny_and_missing_classes():
    labels = shuffled_labels([500, 1, 500, 0, 3])
    held = spread(labels, 20, classes=5, kind="classes", classes_per_client=2)
    counts = held.counts(labels, 5)
    assert ((counts > 0).sum(1) == 2).all()
    np.testing.assert_array_equal(counts.sum(0), [500, 1, 500, 0, 3])
    assert np.ptp(held.sizes) <= 1


def test_all_pairs_of_classes_occur():
    labels = shuffled_labels([200] * 10)
    holds = spread(labels, 1000, kind="classes", classes_per_client=2).counts(labels, 10) > 0
    together = (holds.T.astype(int) @ holds)[np.triu_indices(10, k=1)]
    assert together.min() > 0  # 1000 clients over 45 pairs: 22 each on average
    assert together.max() < 60


@pytest.mark.parametrize("alpha", [1e-6, 1e-2, 0.5, 1e2, 1e6])
def test_dirichlet_fills_every_client_at_any_alpha(alpha):
    labels = shuffled_labels([2000] * 10)
    held = spread(labels, 10_000, kind="dirichlet", alpha=alpha, smallest=2)
    np.testing.assert_array_equal(np.sort(held.rows), np.arange(20_000))
    assert (held.sizes == 2).all()


def test_alpha_sets_how_one_sided_the_clients_are():
    labels = shuffled_labels([1000] * 10)

    def largest_share(alpha):
        counts = spread(labels, 20, kind="dirichlet", alpha=alpha).counts(labels, 10)
        return (counts.max(1) / counts.sum(1)).mean()

    shares = [largest_share(alpha) for alpha in (1e-2, 0.5, 1e4)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.7
    assert shares[-1] == pytest.approx(0.1, abs=0.01)


def test_dirichlet_takes_from_the_largest_and_keeps_clients_one_sided():
    labels = shuffled_labels([500] * 4)
    held = spread(labels, 100, classes=4, kind="dirichlet", alpha=1e-6, smallest=5)
    counts = held.counts(labels, 4)
    large = held.sizes > 5
    assert large.sum() <= 4  # each class had gone to one client
    assert np.ptp(held.sizes[large]) <= 501  # two classes on one client at most
    assert np.median((counts > 0).sum(1)) == 1


@pytest.mark.parametrize(
    ("sizes", "clients", "settings", "smallest", "message"),
    [
        ([30] * 10, 500, {"kind": "iid"}, 1, "clients.number=500: there are only 300 training images"),
        ([30] * 10, 100, {"kind": "iid"}, 4, "clients.batch=4: .* need 400 training images, there are 300"),
        (
            [30] * 10,
            20,
            {"classes_per_client": 12},
            1,
            "partition.classes_per_client=12: the data set has 10 ",
        ),
        (
            [30, 30, 0, 0],
            9,
            {"classes_per_client": 3},
            1,
            "classes_per_client=3: only 2 of the 4 classes have",
        ),
        ([30] * 10, 4, {"classes_per_client": 2}, 1, "classes_per_client=2: 4 clients .* all 10 classes"),
        ([90, 1, 1], 60, {"classes_per_client": 2}, 1, "classes_per_client=2: .* 120 pairs .* at most 62"),
        ([90, 2, 2], 3, {"classes_per_client": 1}, 4, "clients.batch=4: client [0-2] holds only 2 images"),
    ],
)
def test_impossible_settings_are_named(sizes, clients, settings, smallest, message):
    with pytest.raises(SettingError, match=message):
        spread(shuffled_labels(sizes), clients, classes=len(sizes), smallest=smallest, **settings)


@pytest.mark.parametrize("kind", ["classes", "dirichlet"])
def test_without_labels_only_iid(kind):
    with pytest.raises(SettingError, match=f"partition.kind={kind}: the data set has no labels"):
        partition(PartitionSettings(kind=kind), 5, np.arange(100), None, None, seed=0)


def gini(sizes):
    """0 where all are equal, nearly 1 where one has all."""
    ordered = np.sort(sizes)
    return 1 - 2 * (ordered.cumsum() / ordered.sum()).mean() + 1 / len(sizes)


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
def test_quantity_skew_sets_how_unequal_the_volumes_are(kind):
    labels = shuffled_labels([1000] * 10)
    unequal = [gini(spread(labels, 100, kind=kind, alpha=5, quantity_skew=skew).sizes) for skew in (0.2, 1, 5, 100)]
    assert unequal == sorted(unequal, reverse=True)
    assert unequal[0] > 0.6
    assert unequal[1] == pytest.approx(0.5, abs=0.1)  # volumes are exponentially distributed there
    assert unequal[-1] < 0.15


def test_quantity_skew_alone_leaves_the_classes_alike():
    """Every client has the classes as they are in all, within what chance allows."""
    labels = shuffled_labels([2000] * 5)
    held = spread(labels, 20, classes=5, kind="iid", quantity_skew=0.5)
    counts = held.counts(labels, 5)
    large = counts[held.sizes > 500]
    assert len(large)
    np.testing.assert_allclose(large / large.sum(1, keepdims=True), 0.2, atol=0.08)


def test_both_skews_at_once():
    """Volumes are as unequal as with the one, clients as one-sided as with the other."""
    labels = shuffled_labels([1000] * 10)
    both = spread(labels, 100, kind="dirichlet", alpha=0.1, quantity_skew=0.3)
    volumes = spread(labels, 100, kind="iid", quantity_skew=0.3)
    sides = spread(labels, 100, kind="dirichlet", alpha=0.1)
    assert gini(both.sizes) > 0.55
    assert gini(both.sizes) == pytest.approx(gini(volumes.sizes), abs=0.2)
    largest = [
        (counts.max(1) / counts.sum(1)).mean()
        for counts in (held.counts(labels, 10) for held in (both, sides, volumes))
    ]
    assert largest[0] > 0.6
    assert largest[0] > largest[2]


@pytest.mark.parametrize("share", [0.1, 0.37, 0.5, 0.9])
@pytest.mark.parametrize(
    "settings", [{"kind": "iid"}, {"kind": "classes"}, {"kind": "dirichlet", "alpha": 0.3}], ids=str
)
def test_rich_clients_hold_their_share(settings, share):
    labels = shuffled_labels([150, 90, 120, 100, 101, 130, 99, 100, 77, 133])
    rows = np.flatnonzero(np.arange(len(labels)) % 7)
    poor, rich = 30, 10
    held = partition_in_two(
        PartitionSettings(**settings), (poor, rich), share, rows, labels[rows], 10, seed=2, smallest=(1, 2)
    )
    assert len(held) == poor + rich
    np.testing.assert_array_equal(np.sort(held.rows), rows)
    assert held.sizes[poor:].sum() == int(share * len(rows) + 1e-9)
    assert held.sizes.min() >= 1
    assert held.sizes[poor:].min() >= 2
    of_rich, of_all = (c.sum(0) for c in (held.counts(labels, 10)[poor:], held.counts(labels, 10)))
    assert (abs(of_rich - share * of_all) <= 1).all()  # of every class alike
    if settings["kind"] != "dirichlet":  # and equally much each
        assert np.ptp(held.sizes[:poor]) <= 1
        assert np.ptp(held.sizes[poor:]) <= (1 if settings["kind"] == "iid" else 3)  # whole images, of few


@pytest.mark.parametrize(
    ("share", "smallest", "settings", "message"),
    [
        (
            0.01,
            (1, 4),
            {"kind": "iid"},
            r"rich_data_share=0\.01: the 10 rich clients would hold 10 images .* need 4 each",
        ),
        (
            0.99,
            (4, 1),
            {"kind": "iid"},
            r"rich_data_share=0\.99: the 40 poor clients would hold 10 images .* need 4 each",
        ),
        (
            0.5,
            (1, 1),
            {"classes_per_client": 12},
            "the 40 poor clients cannot be given their part: partition.classes_per",
        ),
    ],
)
def test_shares_that_leave_a_client_without_a_batch(share, smallest, settings, message):
    labels = shuffled_labels([100] * 10)
    with pytest.raises(SettingError, match=message):
        partition_in_two(PartitionSettings(**settings), (40, 10), share, np.arange(1000), labels, 10, 0, smallest)
