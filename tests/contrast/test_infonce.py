import math

import pytest
import torch
import torch.nn.functional as F

from mocosfl.contrast import infonce


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def naive(query: torch.Tensor, key: torch.Tensor, negatives: torch.Tensor, temperature: float) -> float:
    positive = math.exp(float(query @ key) / temperature)
    return -math.log(positive / (positive + sum(math.exp(float(query @ n) / temperature) for n in negatives)))


@pytest.mark.parametrize(("n", "size", "dim"), [(1, 1, 2), (5, 3, 4), (7, 20, 3), (32, 13, 8)])
@pytest.mark.parametrize("temperature", [0.07, 0.1, 1.0])
def test_equals_the_formula_for_each_query(n: int, size: int, dim: int, temperature: float) -> None:
    queries, keys, negatives = unit(n, dim), unit(n, dim), unit(size, dim)
    loss, correct = infonce(queries, keys, negatives, temperature)
    for i in range(n):
        assert float(loss[i]) == pytest.approx(naive(queries[i], keys[i], negatives, temperature))
        assert bool(correct[i]) == bool((queries[i] @ keys[i]) > (negatives @ queries[i]).max())


@pytest.mark.parametrize(("clients", "batch", "size"), [(1, 4, 3), (3, 1, 5), (4, 3, 2)])
def test_own_negatives_of_each_client(clients: int, batch: int, size: int) -> None:
    queries, keys, negatives = unit(clients * batch, 6), unit(clients * batch, 6), unit(clients, size, 6)
    loss, _ = infonce(queries, keys, negatives, 0.2)
    for i in range(clients * batch):
        assert float(loss[i]) == pytest.approx(naive(queries[i], keys[i], negatives[i // batch], 0.2))


def test_gradient_reaches_the_queries_alone() -> None:
    queries, keys, negatives = (unit(n, 4).requires_grad_() for n in (3, 3, 5))
    infonce(queries, keys, negatives, 0.1)[0].sum().backward()
    assert queries.grad is not None
    assert keys.grad is None
    assert negatives.grad is None


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        infonce(unit(3, 4), unit(2, 4), unit(5, 4), 0.1)
    with pytest.raises(ValueError, match="equal pieces"):
        infonce(unit(3, 4), unit(3, 4), unit(2, 5, 4), 0.1)
