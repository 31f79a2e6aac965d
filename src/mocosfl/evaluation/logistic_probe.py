"""Linear probe without a learning rate: logistic regression on all features at once, to its minimum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mocosfl.evaluation.features import doubled
from mocosfl.evaluation.linear_probe import ProbeResult, accuracy, check_probed, standardised

CHUNK = 8192
"""Features that are in float64 at the same time."""

ITERATIONS = 2000
"""Of L-BFGS, at most."""

TOLERANCE = 1e-6
"""It ends where no number of the gradient is larger."""


@dataclass(frozen=True)
class LogisticResult(ProbeResult):
    """Outcome of a logistic probe, at the minimum of its loss."""

    loss: float
    """Mean cross-entropy in nats and L2 penalty of the training features."""
    iterations: int
    """Of L-BFGS."""
    converged: bool
    """Whether the minimum was reached."""


def logistic_probe(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int, l2: float = 1e-3
) -> LogisticResult:
    """Fit multinomial logistic regression to cached features, full batch, by L-BFGS (Liu and Nocedal, 1989).

    With standardised features x_i and labels y_i it minimises over weight W and bias b

        1/N sum_i -log softmax(x_i W + b)[y_i] + l2 / 2 * ||W||^2

    The minimum is one and the same wherever the search starts, so nothing is drawn, and there is no learning rate or
    last epoch to choose. The loss is scikit-learn's with C = 1 / (N * l2). Test features are looked at once, at the
    end.

    Args:
        train: training features. Shape (N, D), floating point. All four tensors share one device.
        train_labels: classes from 0 to classes - 1. Shape (N,), integer.
        test: test features. Shape (M, D), floating point.
        test_labels: classes from 0 to classes - 1. Shape (M,), integer.
        classes: number of classes.
        l2: strength of the penalty, more than 0.

    Returns:
        Accuracy on test and training features, and how the search ended.

    Raises:
        ValueError: features are empty, shapes do not agree, or a label or l2 is out of its range.
    """
    check_probed(train, train_labels, test, test_labels, classes)
    if not l2 > 0:
        raise ValueError(f"l2={l2}: must be greater than 0")
    with torch.no_grad():
        train, test = standardised(train, test)
        state, loss, gradient, iterations = minimise(train, train_labels.long(), classes, l2)
        weight, bias = state[:-1].to(train), state[-1].to(train)
        return LogisticResult(
            accuracy=accuracy(torch.addmm(bias, test, weight), test_labels),
            train_accuracy=accuracy(torch.addmm(bias, train, weight), train_labels),
            loss=loss,
            iterations=iterations,
            converged=gradient <= TOLERANCE,
        )


def minimise(x: Tensor, y: Tensor, classes: int, l2: float) -> tuple[Tensor, float, float, int]:
    """Find the minimum of the loss of ``logistic_probe``.

    Args:
        x: (N, D) standardised features.
        y: (N,) int64 classes.
        classes: number of classes.
        l2: strength of the penalty.

    Returns:
        Weight and, in the last row, bias, (D + 1, classes) float64; the loss; the largest number of its gradient; and
        the iterations that it took.
    """
    state = doubled(x.new_zeros(x.shape[1] + 1, classes))
    parts = list(zip(x.split(CHUNK), y.split(CHUNK), strict=True))

    def loss() -> Tensor:
        weight, bias = state[:-1], state[-1]
        total = l2 / 2 * weight.square().sum()
        gradient = F.pad(l2 * weight, (0, 0, 0, 1))
        for inputs, labels in parts:
            # float64: near the minimum the loss changes by less than float32 can tell, and the line search would fail.
            inputs = doubled(inputs)
            log_p = torch.addmm(bias, inputs, weight).log_softmax(dim=1)
            truth = F.one_hot(labels.to(log_p.device), classes)
            total = total - (log_p * truth).sum() / len(x)
            error = (log_p.exp_() - truth) / len(x)
            gradient[:-1].addmm_(inputs.T, error)
            gradient[-1] += error.sum(dim=0)
        state.grad = gradient
        return total

    search = torch.optim.LBFGS(
        [state],
        max_iter=ITERATIONS,
        max_eval=2 * ITERATIONS,
        tolerance_grad=TOLERANCE,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    search.step(loss)  # all iterations
    final = float(loss())
    assert state.grad is not None
    return state, final, float(state.grad.abs().max()), int(search.state[state]["n_iter"])
