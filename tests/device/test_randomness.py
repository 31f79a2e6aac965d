import numpy as np
import pytest

from mocosfl_device.randomness import AUGMENT, ORDER, POOL, ROUNDS, bits, mix, permuted, uniform

WORD = 2**64
GOLDEN = 0x9E3779B97F4A7C15


def mix_with_plain_integers(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
    return x ^ (x >> 31)


def bits_with_plain_integers(*counters: int) -> int:
    state = 0
    for counter in counters:
        state = mix_with_plain_integers((state + GOLDEN) % WORD ^ mix_with_plain_integers((counter + GOLDEN) % WORD))
    return state


def permuted_with_plain_integers(position: int, size: int, *counters: int) -> int:
    base = bits_with_plain_integers(*counters)
    for turn in range(ROUNDS):
        key = mix_with_plain_integers((base + (2 * turn + 1) * GOLDEN) % WORD) % size
        partner = (key - position) % size
        seen = (base + (2 * turn + 2) * GOLDEN) % WORD ^ max(position, partner) * 0xBF58476D1CE4E5B9 % WORD
        if mix_with_plain_integers(seen) >> 63:
            position = partner
    return position


def chi_square_is_plausible(counts: np.ndarray) -> bool:
    """Counts that ought to be equal differ no more than five standard deviations of chance."""
    freedom = counts.size - 1
    statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    return abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def test_mix_is_the_published_finaliser() -> None:
    state = np.uint64(GOLDEN) * np.arange(1, 4, dtype=np.uint64)  # SplitMix64's first three outputs, seed 0
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    np.testing.assert_array_equal(mix(state), np.array(expected, dtype=np.uint64))


@pytest.mark.parametrize(
    ("counters", "expected"),
    [
        ((0,), 258863698125685209),
        ((1, 2), 8739154586042531541),
        ((0, 1), 1644250370817864617),
        ((0, 2), 9661162730952371053),
        ((-1,), 4815193057359064352),
        ((2**63 - 1,), 16656206196686635526),
        ((2**64 - 1,), 4815193057359064352),
    ],
)
def test_bits_are_pinned(counters: tuple[int, ...], expected: int) -> None:
    found = bits(*counters)
    assert found.dtype == np.uint64
    assert int(found) == expected


def test_uniform_numbers_are_pinned() -> None:
    np.testing.assert_array_equal(
        uniform(1, [2, 3, -4]),
        np.array([0.4737504720687866, 0.0036736130714416504, 0.0031189322471618652], dtype=np.float32),
    )


def test_permutations_are_pinned() -> None:
    np.testing.assert_array_equal(permuted(np.arange(8), 8, 5, 7), [0, 7, 2, 6, 4, 1, 5, 3])
    np.testing.assert_array_equal(permuted(np.arange(5), 5, 0), [0, 2, 1, 4, 3])


def test_the_uses_have_fixed_and_different_numbers() -> None:
    assert (POOL, ORDER, AUGMENT) == (1, 2, 3)


def test_bits_equal_plain_integers() -> None:
    numbers = [0, 1, 2, 255, 2**31, 2**32 + 1, 2**62 + 3, 2**63 - 1, -1, -2, -(2**63)]
    for seed in numbers:
        expected = [[bits_with_plain_integers(seed, a, b) for b in numbers] for a in numbers]
        found = bits(seed, np.array(numbers)[:, None], numbers)
        np.testing.assert_array_equal(found, np.array(expected, dtype=np.uint64))


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64])
def test_the_type_of_a_counter_does_not_matter(kind: type) -> None:
    np.testing.assert_array_equal(bits(kind(5), np.arange(100, dtype=kind)), bits(5, list(range(100))))


def test_negative_counters_wrap_and_differ_from_positive_ones() -> None:
    np.testing.assert_array_equal(bits(-3), bits(2**64 - 3))
    np.testing.assert_array_equal(bits(np.array([-3], np.int8)), bits([-3]))
    assert len(np.unique(bits(0, np.arange(-500, 500)))) == 1000


@pytest.mark.parametrize("draw", [bits, uniform])
def test_a_number_depends_on_its_counters_and_not_on_the_shape(draw) -> None:
    clients, draws = np.array([4, 0, 9]), np.arange(6)
    table = draw(7, clients[:, None], draws, 2)
    assert table.shape == (3, 6)
    for row, client in enumerate(clients):
        for column in draws:
            assert table[row, column] == draw(7, client, column, 2)
    flat = draw(7, np.repeat(clients, 6), np.tile(draws, 3), np.full(18, 2))
    np.testing.assert_array_equal(flat, table.ravel())
    np.testing.assert_array_equal(draw(7, clients[::-1, None], draws, 2), table[::-1])
    assert draw(7, np.arange(0), 2).shape == (0,)


def test_place_and_number_of_counters_matter() -> None:
    tuples = [(), (0,), (0, 0), (0, 0, 0), (1,), (1, 0), (0, 1), (1, 1), (0, 0, 1), (1, 0, 0), (2, 1), (1, 2)]
    assert len({int(bits(*counters)) for counters in tuples}) == len(tuples)


def test_no_two_counters_of_a_block_share_a_number() -> None:
    assert len(np.unique(bits(0, np.arange(300)[:, None], np.arange(300)))) == 90_000


def test_uniform_numbers_are_multiples_of_two_to_the_minus_24_below_one() -> None:
    u = uniform(0, np.arange(200_000))
    assert u.dtype == np.float32
    assert u.min() >= 0
    assert u.max() < 1
    scaled = u.astype(np.float64) * 2**24
    np.testing.assert_array_equal(scaled, np.rint(scaled))
    largest = np.float32(2**24 - 1) * np.float32(2**-24)  # what 64 set bits would give
    assert largest < 1


@pytest.mark.parametrize("base", [0, 2**40, -(2**40), 2**63 - 300_000], ids=["0", "2^40", "-2^40", "2^63"])
def test_uniform_numbers_have_the_moments_and_spread_of_the_uniform_distribution(base: int) -> None:
    n = 100_000
    u = uniform(3, base + np.arange(n)).astype(np.float64)
    assert abs(u.mean() - 1 / 2) < 4 * np.sqrt(1 / 12 / n)
    assert abs(u.var() - 1 / 12) < 4 * np.sqrt(1 / 180 / n)
    assert chi_square_is_plausible(np.histogram(u, 64, (0, 1))[0])


@pytest.mark.parametrize("lag", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_neighbouring_counters_are_uncorrelated(axis: int, lag: int) -> None:
    shape = [20, 20, 20]
    shape[axis] = 120
    u = np.moveaxis(uniform(*np.ogrid[: shape[0], : shape[1], : shape[2]]), axis, 0)
    one, other = u[:-lag], u[lag:]
    assert abs(correlation(one, other)) < 4 / np.sqrt(one.size)
    pairs = np.histogram2d(one.ravel(), other.ravel(), bins=10, range=[(0, 1), (0, 1)])[0]
    assert chi_square_is_plausible(pairs)


def test_seeds_are_uncorrelated() -> None:
    u = uniform(np.arange(30)[:, None], AUGMENT, np.arange(3000))
    off_diagonal = np.corrcoef(u)[~np.eye(30, dtype=bool)]
    assert np.abs(off_diagonal).max() < 5 / np.sqrt(3000)


def test_swapped_counters_are_uncorrelated() -> None:
    a, b = np.triu_indices(150, 1)
    assert abs(correlation(uniform(a, b), uniform(b, a))) < 4 / np.sqrt(len(a))


def test_every_bit_is_set_half_of_the_time() -> None:
    n = 20_000
    words = bits(1, 2, np.arange(n))
    share = (words[:, None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)).mean(0)
    assert np.abs(share - 0.5).max() < 5 * 0.5 / np.sqrt(n)


@pytest.mark.parametrize("counter", [0, 1, 2])
def test_one_changed_bit_of_a_counter_changes_half_of_all_bits(counter: int) -> None:
    numbers = [np.arange(500)[:, None], np.full((500, 1), 7), np.full((500, 1), 1000)]
    before = bits(*numbers)
    numbers[counter] = numbers[counter] ^ (1 << np.arange(62))
    changed = before ^ bits(*numbers)  # (500, 62)
    flips = (changed[..., None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)).mean(0)  # (62, 64)
    assert np.abs(flips - 0.5).max() < 6 * 0.5 / np.sqrt(500)


@pytest.mark.parametrize("size", [*range(1, 71), 500, 1000])
def test_permuted_is_a_bijection(size: int) -> None:
    images = permuted(np.arange(size), size, 11, np.arange(5)[:, None])
    assert images.dtype == np.int64
    np.testing.assert_array_equal(np.sort(images, axis=1), np.tile(np.arange(size), (5, 1)))


@pytest.mark.parametrize("size", [1, 2, 3, 10, 64, 99])
def test_permuted_equals_plain_integers(size: int) -> None:
    expected = [permuted_with_plain_integers(position, size, 2, -5) for position in range(size)]
    np.testing.assert_array_equal(permuted(np.arange(size), size, 2, -5), expected)


@pytest.mark.parametrize("size", [10, 33, 500, 1000])
def test_every_epoch_has_an_order_of_its_own(size: int) -> None:
    orders = permuted(np.arange(size), size, 0, ORDER, 4, np.arange(50)[:, None])
    assert len(np.unique(orders, axis=0)) == 50
    assert not (orders == np.arange(size)).all(axis=1).any()


def test_sizes_and_counters_broadcast() -> None:
    sizes = np.array([[5], [12], [1], [1000]])
    position = np.array([0, 3, 4, 7]) % sizes
    clients, epochs = np.arange(4)[:, None], np.array([0, 0, 1, 2])
    table = permuted(position, sizes, 6, clients, epochs)
    assert table.shape == (4, 4)
    for row in range(4):
        for column in range(4):
            alone = permuted(position[row, column], sizes[row, 0], 6, row, epochs[column])
            assert alone.shape == ()
            assert table[row, column] == alone


@pytest.mark.parametrize("size", [2**31 + 11, 2**40])
def test_large_sizes_stay_in_range_and_distinct(size: int) -> None:
    items = permuted(np.arange(1000), size, 0)
    assert items.min() >= 0
    assert items.max() < size
    assert len(np.unique(items)) == 1000
    assert abs(items.mean() / size - 0.5) < 5 * np.sqrt(1 / 12 / 1000)


@pytest.mark.parametrize("size", [2, 3, 8, 13])
def test_every_position_lands_everywhere_equally_often(size: int) -> None:
    epochs = 6000
    orders = permuted(np.arange(size), size, 9, np.arange(epochs)[:, None])
    for position in range(size):
        assert chi_square_is_plausible(np.bincount(orders[:, position], minlength=size))


def test_all_orders_of_four_items_are_equally_frequent() -> None:
    orders = permuted(np.arange(4), 4, 1, np.arange(12_000)[:, None])
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert chi_square_is_plausible(counts)


def test_neighbours_are_torn_apart() -> None:
    orders = permuted(np.arange(100), 100, 1, np.arange(400)[:, None])
    assert abs(correlation(orders[:, :-1], orders[:, 1:]) + 1 / 99) < 4 / np.sqrt(400 * 99)
    assert abs(correlation(orders[:-1], orders[1:])) < 4 / np.sqrt(399 * 100)
