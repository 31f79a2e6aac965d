"""Networks side by side equal the same networks one by one."""

import copy

import pytest
import torch
from torch import nn

from mocosfl.models.layers import BasicBlock, ConvNorm
from mocosfl.models.side_by_side import SideBySide

CPU = torch.device("cpu")
NETWORKS = {
    "stem by matrices": lambda: ConvNorm(3, 8, 3, 1, "group"),
    "grey": lambda: nn.Sequential(ConvNorm(1, 8, 3, 1, "group"), nn.ReLU(inplace=True)),
    "stem of 7x7, grouped": lambda: nn.Sequential(ConvNorm(3, 8, 7, 2, "group"), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
    "strides, padding and bias by matrices": lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 3), padding=(2, 1)),
    "strides, padding and bias, grouped": lambda: nn.Conv2d(8, 5, (3, 2), stride=(2, 3), padding=(2, 1)),
    "block with a shortcut": lambda: nn.Sequential(ConvNorm(3, 8, 3, 1, "group"), BasicBlock(8, 16, 2, "group")),
    "batch norm": lambda: nn.Sequential(ConvNorm(3, 8, 3, 1, "batch"), BasicBlock(8, 8, 1, "batch")),
    "a linear layer, one after another": lambda: nn.Sequential(
        ConvNorm(3, 8, 3, 1, "batch"), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    ),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.GroupNorm(2, 8), nn.ReLU6()),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("sizes", [[2], [1, 1, 1], [3, 3, 3], [2, 2, 5, 2, 4]], ids=str)
@pytest.mark.parametrize("views", [1, 2])
def test_outputs_gradients_and_statistics(name: str, sizes: list[int], views: int) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]().double()
    single = [copy.deepcopy(network) for _ in sizes]
    together = SideBySide(network, sizes, CPU)
    for number, one in enumerate(single):  # weights of their own
        for key, parameter in one.named_parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
            together.weights[key].data[number] = parameter.data
    inputs = next(m for m in network.modules() if isinstance(m, nn.Conv2d)).in_channels
    images = torch.randn(views, sum(sizes), inputs, 10, 9, dtype=torch.float64)

    found = together.forward(images)
    pieces = images.split(sizes, dim=1)
    expected = torch.cat(
        [one(x.flatten(0, 1)).unflatten(0, (views, -1)) for one, x in zip(single, pieces, strict=True)], dim=1
    )
    torch.testing.assert_close(found, expected)
    gradient = torch.randn_like(expected)
    found.backward(gradient)
    expected.backward(gradient)
    for key, stack in together.weights.items():
        torch.testing.assert_close(stack.grad, torch.stack([one.get_parameter(key).grad for one in single]))
    for key, stack in together.statistics.items():
        torch.testing.assert_close(stack, torch.stack([one.get_buffer(key) for one in single]))


def test_copies_start_alike_and_leave_the_network_alone() -> None:
    network = ConvNorm(3, 8, 3, 1, "group")
    before = copy.deepcopy(network.state_dict())
    together = SideBySide(network, [1, 1], CPU)
    together.weights["0.weight"].data[0] += 1
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])
    for name, stack in SideBySide(network, [1, 2], CPU).weights.items():
        assert torch.equal(stack, before[name].expand_as(stack))


def test_the_half_that_does_not_learn_keeps_no_graph() -> None:
    output = SideBySide(ConvNorm(3, 8, 3, 1, "group"), [1, 2], CPU, learns=False).forward(torch.randn(1, 3, 3, 8, 8))
    assert not output.requires_grad
