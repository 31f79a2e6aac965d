import pytest
import torch

from mocosfl.sync import fedavg


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
