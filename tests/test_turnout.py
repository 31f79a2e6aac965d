"""When averages are due, and who drops out between them."""

import numpy as np
import pytest
import torch

from mocosfl.config import Config
from mocosfl.turnout import Schedule, Turnout, untouched

MANY = np.arange(4000)


def turnout(steps: int = 40, **changes: object) -> Turnout:
    base = {"clients.number": len(MANY), "sync.every": 10, "train.epochs": steps}
    return Turnout(Config().updated(base | changes), len(MANY))


@pytest.mark.parametrize("every", [0, 1, 3, 7])
@pytest.mark.parametrize("sampled", [True, False])
def test_intervals_end_where_averages_are_due(every: int, sampled: bool) -> None:
    schedule = Schedule(steps=20, round_steps=6, every=every, sampled=sampled)
    due = {20} | ({6, 12, 18} if sampled else set())  # after so many steps
    due |= {step for step in range(1, 21) if every and (step % 6 if sampled else step) % every == 0}
    for step in range(20):
        begin, length = schedule.interval(step)
        assert begin == max([0, *(d for d in due if d <= step)])
        assert begin + length == min(d for d in due if d > step)


def test_so_many_drop_out_and_at_any_step() -> None:
    there = turnout(**{"clients.drop": 0.3})
    left = np.array([there.present(step, MANY).mean() for step in range(20)])
    expected = 1 - 0.3 * np.arange(1, 11) / 10  # before the first step as often as before any other
    np.testing.assert_allclose(left, np.tile(expected, 2), atol=0.04)
    for step in range(9):  # and nobody is back before the average
        assert not (there.present(step + 1, MANY) & ~there.present(step, MANY)).any()
    assert not np.array_equal(there.present(9, MANY), there.present(19, MANY))


def test_a_client_drops_out_whoever_else_is_there() -> None:
    there = turnout(**{"clients.drop": 0.5})
    for step in (0, 5, 13):
        assert np.array_equal(there.present(step, MANY)[::7], there.present(step, MANY[::7]))


def test_somebody_always_stays() -> None:
    there = turnout(**{"clients.drop": 0.99})
    for client in range(0, 30, 3):
        pool = np.arange(client, client + 3)
        for step in range(20):
            assert there.present(step, pool).any()
            assert there.present(step, pool[:1]).all()


def test_nobody_drops_out_by_default() -> None:
    assert turnout().present(3, MANY).all()


def test_rows_of_who_is_away_stay() -> None:
    stack, other = torch.zeros(3, 2), torch.zeros(3)
    with untouched([stack, other], np.array([0, 2])):
        stack += 1
        other -= 1
    assert stack.tolist() == [[0, 0], [1, 1], [0, 0]]
    assert other.tolist() == [0, -1, 0]
