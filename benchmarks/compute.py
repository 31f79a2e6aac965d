"""Ways of running many client halves with weights of their own: which is the fastest?

Each way computes the same: the halves' outputs for their own images, and the gradients of all weights. It is compared
with the loop before it is timed, in float64. ``one half`` has the weights of the first client for everybody: the least
that anything could cost.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.testing import assert_close

from benchmarks import common
from benchmarks.common import seconds
from mocosfl.config import ModelSettings
from mocosfl.models import build
from mocosfl.models.layers import ResidualBlock, WSConv2d, standardised
from mocosfl.models.side_by_side import SideBySide

Stack = dict[str, Tensor]
"""Weights by name, (P, ...) each: the clients in front."""

Layer = Callable[[Any, Tensor, Stack], Tensor]
"""Runs a convolution or a norm on an input of all clients, with their weights."""


class Way:
    """A way of running P halves.

    Args:
        half: the network; its weights are not used.
        stack: the weights of all clients.
    """

    def __init__(self, half: nn.Module, stack: Stack) -> None:
        self.half = half
        self.stack = {name: weight.clone().requires_grad_() for name, weight in stack.items()}

    @property
    def weights(self) -> list[Tensor]:
        """What the gradients are taken of."""
        return list(self.stack.values())

    def forward(self, images: Tensor) -> Tensor:
        """(P, B, C, H, W) to (P, B, C', H', W')."""
        raise NotImplementedError


class Loop(Way):
    """One half after the other."""

    def forward(self, images: Tensor) -> Tensor:
        outputs = []
        for client, batch in enumerate(images):
            weights = {name: weight[client] for name, weight in self.stack.items()}
            outputs.append(functional_call(self.half, weights, (batch,)))
        return torch.stack(outputs)


class Vmap(Way):
    """torch.func.vmap over functional_call."""

    def forward(self, images: Tensor) -> Tensor:
        return vmap(lambda weights, batch: functional_call(self.half, weights, (batch,)))(self.stack, images)


class Grouped(Way):
    """One wide network: the clients are groups of channels.

    Args:
        half, stack: as above.
        memory_format: of the images and the convolutions' weights.
    """

    def __init__(self, half: nn.Module, stack: Stack, memory_format: torch.memory_format) -> None:
        super().__init__(half, stack)
        self.memory_format = memory_format

    def forward(self, images: Tensor) -> Tensor:
        clients = len(images)
        x = images.transpose(0, 1).flatten(1, 2).contiguous(memory_format=self.memory_format)  # (B, P * C, H, W)
        y = _interpret(self.half, x, self.stack, partial(self._conv, clients), partial(self._norm, clients))
        return y.unflatten(1, (clients, -1)).transpose(0, 1)

    def _conv(self, clients: int, layer: Any, x: Tensor, stack: Stack) -> Tensor:
        weight = _standardised(stack["weight"]).flatten(0, 1).contiguous(memory_format=self.memory_format)
        return F.conv2d(x, weight, stride=layer.stride, padding=layer.padding, groups=clients)

    @staticmethod
    def _norm(clients: int, layer: Any, x: Tensor, stack: Stack) -> Tensor:
        weight, bias = stack["weight"].flatten(), stack["bias"].flatten()
        return F.group_norm(x, clients * layer.num_groups, weight, bias, layer.eps)


class Bmm(Way):
    """Patches of the images times the filters, as one batched matrix product."""

    def forward(self, images: Tensor) -> Tensor:
        return _interpret(self.half, images, self.stack, self._conv, self._norm)

    @staticmethod
    def _conv(layer: Any, x: Tensor, stack: Stack) -> Tensor:
        height, width = x.shape[3:]
        weight = _standardised(stack["weight"])  # (P, O, I, k, k)
        kernel, stride, pad = layer.kernel_size, layer.stride, layer.padding
        x = F.pad(x, (pad[1], pad[1], pad[0], pad[0]))
        windows = x.unfold(3, kernel[0], stride[0]).unfold(4, kernel[1], stride[1])  # (P, B, I, H', W', k, k), a view
        patches = windows.permute(0, 1, 2, 5, 6, 3, 4).flatten(5, 6).flatten(2, 4)  # (P, B, I * k * k, L)
        y = weight.flatten(2)[:, None] @ patches  # (P, B, O, L)
        out = [(s + 2 * p - k) // t + 1 for s, p, k, t in zip((height, width), pad, kernel, stride, strict=True)]
        return y.unflatten(3, out)

    @staticmethod
    def _norm(layer: Any, x: Tensor, stack: Stack) -> Tensor:
        weight, bias = (stack[name][:, None].expand(x.shape[:3]).flatten() for name in ("weight", "bias"))
        groups = x.shape[0] * x.shape[1] * layer.num_groups
        return F.group_norm(x.flatten(0, 2)[None], groups, weight, bias, layer.eps).view(x.shape)


class Ours(Way):
    """As ``LocalCohort`` does: matrix products where a filter reads few numbers, grouped convolutions elsewhere."""

    def __init__(self, half: nn.Module, stack: Stack, batch: int) -> None:
        clients, device = len(next(iter(stack.values()))), next(iter(stack.values())).device
        self.halves = SideBySide(half, [batch] * clients, device)
        self.stack = self.halves.weights
        with torch.no_grad():
            for name, weight in self.stack.items():
                weight.copy_(stack[name])

    def forward(self, images: Tensor) -> Tensor:
        return self.halves.forward(images.flatten(0, 1)[None])[0].unflatten(0, images.shape[:2])


class OneHalf(Way):
    """The first client's weights for everybody, in an ordinary network."""

    def __init__(self, half: nn.Module, stack: Stack, memory_format: torch.memory_format) -> None:
        self.half = half
        self.stack = {}
        for name, weight in stack.items():
            first = weight[0].clone()
            first = first.contiguous(memory_format=memory_format) if first.ndim == 4 else first
            self.stack[name] = first.requires_grad_()

    def forward(self, images: Tensor) -> Tensor:
        return functional_call(self.half, self.stack, (images.flatten(0, 1),)).unflatten(0, images.shape[:2])


def _standardised(weight: Tensor) -> Tensor:
    """Filters as ``WSConv2d`` has them: (P, O, I, k, k)."""
    return standardised(weight.flatten(0, 1)).view(weight.shape)


def _interpret(module: nn.Module, x: Tensor, stack: Stack, conv: Layer, norm: Layer) -> Tensor:
    """Run a client half with other convolutions and norms."""

    def run(name: str, x: Tensor) -> Tensor:
        below = {key.removeprefix(name + "."): w for key, w in stack.items() if key.startswith(name + ".")}
        return _interpret(module.get_submodule(name), x, below, conv, norm)

    if isinstance(module, WSConv2d):
        return conv(module, x, stack)
    if isinstance(module, nn.GroupNorm):
        return norm(module, x, stack)
    if isinstance(module, ResidualBlock):
        return F.relu(run("body", x) + run("shortcut", x))
    if isinstance(module, nn.Sequential):
        for name, _ in module.named_children():
            x = run(name, x)
        return x
    if next(module.parameters(), None) is not None:
        raise TypeError(f"{type(module).__name__} has weights, and nobody knows how to run it")
    return module(x)


WAYS: dict[str, Callable[[nn.Module, Stack], Way]] = {
    "loop": Loop,
    "vmap": Vmap,
    "grouped convolutions": partial(Grouped, memory_format=torch.contiguous_format),
    "grouped convolutions, channels last": partial(Grouped, memory_format=torch.channels_last),
    "batched matrix product": Bmm,
    "one half": partial(OneHalf, memory_format=torch.contiguous_format),
    "one half, channels last": partial(OneHalf, memory_format=torch.channels_last),
}


def gradients(way: Way, images: Tensor, gradient: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Outputs, and the gradients of the weights."""
    outputs = way.forward(images)
    return outputs, list(torch.autograd.grad(outputs, way.weights, gradient))


def check(way: Way, loop: Way, images: Tensor, gradient: Tensor) -> None:
    """Make sure that a way computes what the loop does."""
    outputs, grads = gradients(way, images, gradient)
    wanted, wanted_grads = gradients(loop, images, gradient)
    if isinstance(way, OneHalf):  # the same for the first client; for the others on its weights only
        assert_close(outputs[0], wanted[0])
        return
    assert_close(outputs, wanted)
    assert_close(grads, wanted_grads)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--clients", type=int, default=100, help="P, halves")
    parser.add_argument("--batch", type=int, default=1, help="images of each")
    parser.add_argument("--width", type=int, default=64, help="channels of the stem")
    parser.add_argument("--size", type=int, default=32, help="pixels a side")
    parser.add_argument("--cuts", type=int, nargs="+", default=[1, 3], help="cuts of the backbone")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=3, help="passes of one repeat")
    args = parser.parse_args()
    if args.set:
        parser.error("--set: this benchmark has no configuration")
    device = common.begin(args)
    with common.kernels_of_training(device):
        cases = [case for cut in args.cuts for case in measure_cut(cut, args, device)]
    sizes = {name: getattr(args, name) for name in ("clients", "batch", "width", "size")}
    unit = {"unit": "milliseconds a pass", "images": "random numbers: the cost does not depend on them"}
    common.write("compute", args, device, {**sizes, "passes_of_a_repeat": args.steps, **unit, "cases": cases})


def measure_cut(cut: int, args: Any, device: torch.device) -> list[dict[str, Any]]:
    """Check, time and print all ways at one cut."""
    torch.manual_seed(0)
    half = build(ModelSettings(width=args.width, cut=cut), 3, args.size, 0).client.to(device)
    stack = {
        name: weight.detach() * (1 + 0.1 * torch.randn(args.clients, *weight.shape, device=device))
        for name, weight in half.named_parameters()
    }
    images = torch.randn(args.clients, args.batch, 3, args.size, args.size, device=device)

    def ways_of(half: nn.Module, stack: Stack) -> dict[str, Way]:
        return {name: make(half, stack) for name, make in WAYS.items()} | {"LocalCohort": Ours(half, stack, args.batch)}

    ways = ways_of(half, stack)
    with torch.no_grad():
        gradient = torch.randn_like(ways["loop"].forward(images))
    # In float64: rounding in float32 lets a ReLU here and there decide otherwise.
    exact = ways_of(copy.deepcopy(half).double(), {name: weight.double() for name, weight in stack.items()})
    for way in exact.values():
        check(way, exact["loop"], images.double(), gradient.double())

    def run(way: Way, precision: str) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return way.forward(images)

    def measure(way: Way, precision: str, backward: bool) -> float:
        with torch.no_grad():
            received = torch.empty_like(run(way, precision)).copy_(gradient)  # in the memory layout of the outputs

        def block() -> None:
            for _ in range(args.steps):
                outputs = run(way, precision)
                if backward:
                    torch.autograd.grad(outputs, way.weights, received)

        with torch.set_grad_enabled(backward):
            return seconds(block, device) / args.steps

    keys = list(product(args.precisions, (True, False), ways))
    times = common.in_turn({key: partial(measure, ways[key[2]], key[0], key[1]) for key in keys}, args.repeats)

    rows, facts = [], []
    for key in keys:
        precision, backward, name = key
        time = times[key]
        best = min((times[precision, backward, other] for other in WAYS if "one half" in other), key=_median)
        passes = "forward and backward" if backward else "forward"
        rows.append([name, precision, passes, time.times(1e3), f"{time.median / best.median:.2f}"])
        figures = {**time.times(1e3).facts(), "of_one_half": (time / best).facts()}
        facts.append({"cut": cut, "way": name, "precision": precision, "passes": passes, **figures})
    title = f"cut {cut}, {args.clients} halves of width {args.width} with {args.batch} images each"
    common.show(title, ("way", "precision", "passes", "ms", "of one half"), rows)
    return facts


def _median(timing: common.Timing) -> float:
    return timing.median


if __name__ == "__main__":
    main()
