import numpy as np
import pytest

from mocosfl.data.partition import Partition
from mocosfl.data.sampler import ClientSampler, pool_of_round

SIZES = [7, 1, 12, 5, 30, 2]


def held(sizes: list[int]) -> Partition:
    """Clients with these many images, whose rows are in no order and leave gaps."""
    rows = np.random.default_rng(0).permutation(3 * sum(sizes))[: sum(sizes)]
    return Partition(rows, np.concatenate([[0], np.cumsum(sizes)]))


def stream(sampler: ClientSampler, client: int, images: int) -> np.ndarray:
    """A client's next images, drawn one by one."""
    return np.concatenate([sampler.draw(np.array([client]), 1)[0] for _ in range(images)])


@pytest.mark.parametrize("batch", [1, 3, 4, 5, 40])
@pytest.mark.parametrize("client", range(len(SIZES)))
def test_a_client_sees_every_image_once_an_epoch(client: int, batch: int) -> None:
    partition = held(SIZES)
    sampler, size, epochs = ClientSampler(partition, seed=3), SIZES[client], 4
    steps = -(-epochs * size // batch)  # the last batch may run into the next epoch
    drawn = np.concatenate([sampler.draw(np.array([client]), batch)[0] for _ in range(steps)])
    for epoch in range(epochs):
        one = drawn[epoch * size : (epoch + 1) * size]
        np.testing.assert_array_equal(np.sort(one), np.sort(partition.client(client)))


def test_the_next_epoch_has_another_order() -> None:
    sampler = ClientSampler(held([30]), seed=0)
    epochs = [tuple(sampler.draw(np.array([0]), 30)[0]) for _ in range(20)]
    assert len(set(epochs)) == 20


def test_clients_and_seeds_have_orders_of_their_own() -> None:
    partition = held([20] * 5)
    orders = set()
    for seed in range(4):
        rows = ClientSampler(partition, seed).draw(np.arange(5), 20)[0].reshape(5, 20)
        for client in range(5):
            places = np.argsort(partition.client(client))[
                np.searchsorted(np.sort(partition.client(client)), rows[client])
            ]
            orders.add(tuple(places))
    assert len(orders) == 20


def test_the_same_seed_draws_the_same() -> None:
    one, other = ClientSampler(held(SIZES), seed=5), ClientSampler(held(SIZES), seed=5)
    for _ in range(5):
        for a, b in zip(one.draw(np.arange(6), 4), other.draw(np.arange(6), 4), strict=True):
            np.testing.assert_array_equal(a, b)


def test_rows_and_draws_have_a_row_for_each_client_of_the_pool() -> None:
    partition = held(SIZES)
    sampler = ClientSampler(partition, seed=1)
    pool = np.array([4, 0, 2])
    for step in range(3):
        rows, draws = (drawn.reshape(3, 5) for drawn in sampler.draw(pool, 5))
        assert rows.dtype == draws.dtype == np.int64
        np.testing.assert_array_equal(draws, np.tile(5 * step + np.arange(5), (3, 1)))
        for client, row in zip(pool, rows, strict=True):
            assert np.isin(row, partition.client(client)).all()


def test_clients_may_draw_different_numbers_of_images() -> None:
    sampler, alone = ClientSampler(held(SIZES), seed=1), [ClientSampler(held(SIZES), seed=1) for _ in SIZES]
    pool, batches = np.array([0, 2, 4, 5]), np.array([1, 4, 4, 9])
    for _ in range(3):
        rows, draws = sampler.draw(pool, batches)
        expected = [alone[client].draw(np.array([client]), batch) for client, batch in zip(pool, batches, strict=True)]
        np.testing.assert_array_equal(rows, np.concatenate([rows for rows, _ in expected]))
        np.testing.assert_array_equal(draws, np.concatenate([draws for _, draws in expected]))


@pytest.mark.parametrize("batches", [[30], [4] * 7 + [2], [1, 2, 3, 4, 5, 6, 9], [7, 7, 16], [29, 1]])
def test_a_clients_images_do_not_depend_on_how_they_are_cut_into_batches(batches: list[int]) -> None:
    client = 0  # 7 images: most of these batches cross an epoch
    expected = stream(ClientSampler(held(SIZES), seed=2), client, 30)
    sampler = ClientSampler(held(SIZES), seed=2)
    drawn, numbers = zip(*(sampler.draw(np.array([client]), batch) for batch in batches), strict=True)
    np.testing.assert_array_equal(np.concatenate(drawn), expected)
    np.testing.assert_array_equal(np.concatenate(numbers), np.arange(30))


def test_a_clients_images_do_not_depend_on_the_rest_of_the_pool() -> None:
    expected = {client: stream(ClientSampler(held(SIZES), seed=8), client, 24) for client in range(6)}
    sampler, found = ClientSampler(held(SIZES), seed=8), {client: [] for client in range(6)}
    rng = np.random.default_rng(0)
    for _ in range(40):
        pool = rng.permutation(6)[: rng.integers(1, 7)]
        rows = sampler.draw(pool, 3)[0].reshape(-1, 3)
        for client, row in zip(pool, rows, strict=True):
            found[client].extend(row)
    for client in range(6):
        assert len(found[client]) >= 24
        np.testing.assert_array_equal(found[client][:24], expected[client])


def test_a_clients_order_does_not_depend_on_the_other_clients() -> None:
    alone = ClientSampler(held([12]), seed=4)
    among = ClientSampler(Partition(np.concatenate([held([12]).rows, np.arange(90, 99)]), np.array([0, 12, 21])), 4)
    np.testing.assert_array_equal(alone.draw(np.array([0]), 30)[0], among.draw(np.arange(2), 30)[0][:30])


def test_only_the_counters_of_the_pool_move() -> None:
    sampler = ClientSampler(held(SIZES), seed=0)
    assert sampler.drawn.dtype == np.int64
    np.testing.assert_array_equal(sampler.drawn, [0] * 6)
    sampler.draw(np.array([1, 4]), 3)
    np.testing.assert_array_equal(sampler.drawn, [0, 3, 0, 0, 3, 0])
    sampler.draw(np.array([5, 4, 0]), 2)
    np.testing.assert_array_equal(sampler.drawn, [2, 3, 0, 0, 5, 2])


def test_the_counters_are_all_that_is_needed_to_go_on() -> None:
    sampler = ClientSampler(held(SIZES), seed=6)
    for pool in ([0, 1, 2], [3, 4, 5], [1, 3, 5], [0, 2, 4]):
        sampler.draw(np.array(pool), 5)
    resumed = ClientSampler(held(SIZES), seed=6)
    resumed.drawn = sampler.drawn.copy()
    for a, b in zip(sampler.draw(np.arange(6), 9), resumed.draw(np.arange(6), 9), strict=True):
        np.testing.assert_array_equal(a, b)


def test_draw_leaves_the_pool_and_the_returned_numbers_alone() -> None:
    sampler, pool = ClientSampler(held(SIZES), seed=0), np.array([0, 3])
    rows, draws = sampler.draw(pool, 2)
    kept = rows.copy(), draws.copy(), pool.copy()
    sampler.draw(pool, 2)
    for now, before in zip((rows, draws, pool), kept, strict=True):
        np.testing.assert_array_equal(now, before)


@pytest.mark.parametrize(("number", "size"), [(2, 1), (10, 3), (10, 9), (200, 100), (1000, 100)])
def test_a_pool_is_distinct_ascending_and_of_the_right_size(number: int, size: int) -> None:
    for round_ in range(20):
        pool = pool_of_round(4, round_, number, size)
        assert pool.dtype == np.int64
        assert pool.shape == (size,)
        assert pool[0] >= 0
        assert pool[-1] < number
        assert (np.diff(pool) > 0).all()


@pytest.mark.parametrize("number", [1, 2, 17])
def test_a_pool_of_all_is_everybody_in_order(number: int) -> None:
    for round_ in range(3):
        pool = pool_of_round(0, round_, number, number)
        assert pool.dtype == np.int64
        np.testing.assert_array_equal(pool, np.arange(number))


@pytest.mark.parametrize(("number", "size", "rich", "rich_size"), [(50, 10, 5, 1), (50, 10, 20, 4), (9, 8, 2, 1)])
def test_a_pool_has_its_share_of_rich_clients(number: int, size: int, rich: int, rich_size: int) -> None:
    turns = np.zeros(number)
    for round_ in range(400):
        pool = pool_of_round(0, round_, number, size, rich, rich_size)
        assert len(set(pool.tolist())) == size
        assert (pool >= number - rich).sum() == rich_size
        assert (np.diff(pool) > 0).all()
        turns[pool] += 1
    for kind, share in ((turns[:-rich], (size - rich_size) / (number - rich)), (turns[-rich:], rich_size / rich)):
        assert np.abs(kind - 400 * share).max() <= 4 * np.sqrt(400 * share * (1 - share))


def test_round_and_seed_decide_the_pool() -> None:
    pools = {tuple(pool_of_round(seed, round_, 100, 20)) for seed in range(5) for round_ in range(20)}
    assert len(pools) == 100
    np.testing.assert_array_equal(pool_of_round(1, 2, 100, 20), pool_of_round(1, 2, 100, 20))


def test_pools_are_pinned() -> None:
    np.testing.assert_array_equal(pool_of_round(0, 0, 10, 4), [1, 2, 6, 9])
    np.testing.assert_array_equal(pool_of_round(0, 1, 10, 4), [0, 2, 3, 6])


@pytest.mark.parametrize(("number", "size"), [(20, 5), (10, 1), (10, 9)])
def test_every_client_gets_its_turn_about_equally_often(number: int, size: int) -> None:
    rounds = 2000
    turns = np.bincount(
        np.concatenate([pool_of_round(0, round_, number, size) for round_ in range(rounds)]), minlength=number
    )
    share = size / number
    assert np.abs(turns - rounds * share).max() < 4 * np.sqrt(rounds * share * (1 - share))


def test_pairs_of_clients_meet_about_equally_often() -> None:
    rounds, number, size = 2000, 12, 4
    active = np.zeros((rounds, number))
    for round_ in range(rounds):
        active[round_, pool_of_round(3, round_, number, size)] = 1
    together = (active.T @ active)[~np.eye(number, dtype=bool)]
    share = size * (size - 1) / number / (number - 1)
    assert np.abs(together - rounds * share).max() < 4.5 * np.sqrt(rounds * share * (1 - share))
