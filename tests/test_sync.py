import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from mocosfl.config import SyncSettings
from mocosfl.sync import (
    averaging,
    coordinate_median,
    distance,
    divergence,
    fedavg,
    mixed,
    own_shares,
    scale,
    trimmed_mean,
)


def test_weighted_by_images() -> None:
    stack = torch.randn(3, 4, 2)
    expected = (stack[0] * 1 + stack[1] * 2 + stack[2] * 5) / 8
    torch.testing.assert_close(fedavg(stack, torch.tensor([1.0, 2.0, 5.0])), expected)


def test_the_first_client_is_nothing_special() -> None:
    stack = torch.randn(4, 3)
    torch.testing.assert_close(fedavg(stack, torch.tensor([0.0, 0.0, 1.0, 0.0])), stack[2])
    order = torch.tensor([2, 0, 3, 1])
    weights = torch.tensor([1.0, 3.0, 2.0, 4.0])
    torch.testing.assert_close(fedavg(stack[order], weights[order]), fedavg(stack, weights))


def test_equal_clients_average_to_themselves() -> None:
    one = torch.randn(5)
    torch.testing.assert_close(fedavg(one.expand(100, 5), torch.rand(100) + 0.1), one)


def test_counters_are_not_averaged() -> None:
    assert fedavg(torch.tensor([3, 7, 5]), torch.ones(3)) == 7


def test_a_weight_for_each_client() -> None:
    with pytest.raises(ValueError, match="3 clients need as many weights"):
        fedavg(torch.randn(3, 2), torch.ones(2))


def naive_median(numbers: list[float]) -> float:
    ordered, middle = sorted(numbers), len(numbers) // 2
    return ordered[middle] if len(numbers) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def naive_trimmed(numbers: list[float], share: float) -> float:
    out = min(math.ceil(share * len(numbers)), (len(numbers) - 1) // 2)
    kept = sorted(numbers)[out : len(numbers) - out]
    return sum(kept) / len(kept)


@pytest.mark.parametrize("clients", [1, 2, 3, 4, 5, 10, 11])
@pytest.mark.parametrize("share", [None, 0.01, 0.1, 0.3, 0.49])
def test_robust_averages_equal_a_loop_over_numbers(clients: int, share: float | None) -> None:
    stack, weights = torch.randn(clients, 3, 2).double(), torch.rand(clients) + 0.1
    combine = coordinate_median if share is None else partial(trimmed_mean, share=share)
    naive = naive_median if share is None else partial(naive_trimmed, share=share)
    found = combine(stack, weights)
    for row in range(3):
        for column in range(2):
            expected = naive(stack[:, row, column].tolist())
            assert float(found[row, column]) == pytest.approx(expected, rel=1e-12)


ROBUST = [coordinate_median, partial(trimmed_mean, share=0.2)]


def test_divergence_of_a_hand_made_case() -> None:
    """Two clients, one at a distance of 3 and 4 from the average in its two blocks, whose lengths are 6 and 8."""
    means = {"stem.weight": torch.tensor([6.0]), "stage.0.weight": torch.tensor([[0.0, 8.0]])}
    means["stage.0.bias"] = torch.tensor([0.0])
    deviations = {
        "stem.weight": torch.tensor([[3.0], [0.0]]),
        "stage.0.weight": torch.tensor([[[2.0, 0.0]], [[0.0, 0.0]]]),
        "stage.0.bias": torch.tensor([[math.sqrt(12)], [0.0]]),  # 4 away, together with the weight
    }
    found = divergence(deviations, means)
    assert {name: pytest.approx(ratios.tolist()) for name, ratios in found.items()} == {
        "divergence": [0.5, 0.0],
        "divergence/stem": [0.5, 0.0],
        "divergence/stage": [0.5, 0.0],
        "divergence_l2/stem": [3.0, 0.0],
        "divergence_l2/stage.0": [4.0, 0.0],
        "divergence_l2": [7.0, 0.0],  # a sum over layers (eq. 4), not the length of all together
    }
    nothing = divergence({"a.b": torch.zeros(3, 2)}, {"a.b": torch.zeros(2)})
    assert nothing["divergence"].tolist() == [0, 0, 0]  # and not 0 / 0


@pytest.mark.parametrize("combine", ROBUST, ids=["median", "trimmed mean"])
@pytest.mark.parametrize("bad", [1e6, -1e6, 3e38, math.inf, -math.inf])
def test_one_bad_client_of_five_cannot_move_a_robust_average(
    combine: Callable[[Tensor, Tensor], Tensor], bad: float
) -> None:
    good = torch.randn(4, 50)
    for place in range(5):
        stack = torch.cat([good[:place], torch.full((1, 50), bad), good[place:]])
        found = combine(stack, torch.ones(5))
        assert ((good.amin(0) <= found) & (found <= good.amax(0))).all()
        moved = fedavg(stack, torch.ones(5))
        assert not ((good.amin(0) <= moved) & (moved <= good.amax(0))).any()  # the mean is


@pytest.mark.parametrize("combine", ROBUST, ids=["median", "trimmed mean"])
def test_robust_averages_leave_out_who_took_no_part(combine: Callable[[Tensor, Tensor], Tensor]) -> None:
    stack = torch.randn(6, 4)
    weights = torch.tensor([1.0, 0.0, 5.0, 0.0, 2.0, 1.0])
    kept = stack[[0, 2, 4, 5]]
    torch.testing.assert_close(combine(stack, weights), combine(kept, torch.ones(4)))
    torch.testing.assert_close(combine(stack, weights), combine(stack, weights.sign()))  # all count alike
    order = torch.tensor([3, 0, 5, 2, 1, 4])
    torch.testing.assert_close(combine(stack[order], weights[order]), combine(stack, weights))
    assert combine(torch.tensor([3, 9, 7, 9, 2, 5]), weights) == 7  # counters: the largest of those
    with pytest.raises(ValueError, match="no client takes part"):
        combine(stack, torch.zeros(6))
    with pytest.raises(ValueError, match="6 clients need as many weights"):
        combine(stack, torch.ones(5))


def test_the_setting_names_the_average() -> None:
    stack, weights = torch.randn(10, 3), torch.rand(10) + 0.1
    for settings, expected in (
        (SyncSettings(), fedavg(stack, weights)),
        (SyncSettings(average="median"), coordinate_median(stack, weights)),
        (SyncSettings(average="trimmed_mean", trim=0.3), trimmed_mean(stack, weights, 0.3)),
    ):
        torch.testing.assert_close(averaging(settings)(stack, weights), expected)


NETWORKS = {  # of three clients; the average is zero
    "client.weight": torch.tensor([[[3.0, 0.0]], [[0.0, 0.0]], [[0.3, 0.0]]]),
    "client.bias": torch.tensor([[4.0], [0.0], [0.4]]),
    "server.weight": torch.tensor([[[0.0, 1.0]], [[0.0, 0.0]], [[0.0, 0.1]]]),
    "predictor.weight": torch.tensor([[[100.0]], [[100.0]], [[100.0]]]),
}
AVERAGE = {name: torch.zeros(stack.shape[1:]) for name, stack in NETWORKS.items()}


def test_fedema_in_numbers() -> None:
    """Three clients whose encoders are sqrt(26), 0 and sqrt(0.26) from the average, and their predictors far off."""
    ema = SyncSettings(own="ema", tau=0.7)
    far = distance(ema, NETWORKS, AVERAGE)
    torch.testing.assert_close(far, torch.tensor([math.sqrt(26), 0, math.sqrt(0.26)]))
    scales = scale(ema, far)
    torch.testing.assert_close(scales, torch.tensor([0.7 / math.sqrt(26), 0, 0.7 / math.sqrt(0.26)]))
    torch.testing.assert_close(own_shares(ema, scales, far), torch.tensor([0.7, 0, 0.7]))  # tau at the first average
    torch.testing.assert_close(own_shares(ema, scales, far / 2), torch.tensor([0.35, 0, 0.35]))
    torch.testing.assert_close(own_shares(ema, scales, far * 3), torch.tensor([1.0, 0, 1.0]))  # no more than all
    shares, average = torch.tensor([0.7, 0.0, 1.0]), torch.tensor([[10.0, 20.0]])
    found = mixed(NETWORKS["client.weight"], average, shares)
    torch.testing.assert_close(found, torch.tensor([[[5.1, 6.0]], [[10.0, 20.0]], [[0.3, 0.0]]]))
    assert torch.equal(found[1], average)  # exactly
    assert torch.equal(found[2], NETWORKS["client.weight"][2])


def test_fedu_in_numbers() -> None:
    """The encoder's weights, without biases, are 3 and 1 from the average: 2 in the mean; and a tenth of that."""
    fedu = SyncSettings(own="predictor", threshold=0.4)
    far = distance(fedu, NETWORKS, AVERAGE)
    torch.testing.assert_close(far, torch.tensor([2.0, 0.0, 0.2]))
    scales = scale(fedu, far)
    assert own_shares(fedu, scales, far).tolist() == [1, 0, 0]
    assert own_shares(fedu, scales, far * 3).tolist() == [1, 0, 1]
    assert own_shares(fedu, torch.zeros(3), far).tolist() == [0, 0, 0]  # none had a part in an average yet
