"""Whole networks of many clients: one after another, vectorised by torch.func, and side by side.

A step is the forward pass of two views of each client's images through encoder and head of that client, and the
gradients of all weights. ``one after another`` is what the clients of baselines do (``clients.holds=network``).
``vmap`` is ``torch.func.vmap`` of ``functional_call`` over the stacked weights. ``encoder side by side`` lays the
convolutions and norms out as the halves of MocoSFL's clients are, and runs the heads one after another.

Measured is the processor time of one thread, which other work on the machine disturbs less than wall-clock time.
"""

from __future__ import annotations

import time
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
from mocosfl.config import ModelSettings
from mocosfl.models import build, build_head
from mocosfl.models.heads import WIDTHS
from mocosfl.models.side_by_side import SideBySide, Stack

Run = Callable[[Tensor], Tensor]
"""(2, P * B, C, S, S), two views of the images of client 0, of client 1, ..., to (2, P * B, D)."""

Ways = dict[str, tuple[Run, list[Stack]]]
"""How the networks are run, and the stacks of their weights."""


def ways(encoder: nn.Sequential, head: nn.Module, clients: int, batch: int) -> Ways:
    """All of them, with the same weights."""
    network, convolutions = nn.Sequential(encoder, head), encoder[:-1]  # all but the flattening at its end
    sizes, device = [batch] * clients, torch.device("cpu")
    whole, vectorised = (SideBySide(network, sizes, device) for _ in range(2))
    halves, heads = SideBySide(convolutions, sizes, device), SideBySide(head, sizes, device)
    assert whole.in_turn
    assert not halves.in_turn

    for module in vectorised.network.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = partial(_flat, module)  # type: ignore[method-assign]

    def by_vmap(views: Tensor) -> Tensor:
        images = views.unflatten(1, (clients, batch)).transpose(0, 1).flatten(1, 2)  # (P, 2 * B, C, S, S)
        state = {f"0.{name}": stack for name, stack in (vectorised.weights | vectorised.statistics).items()}
        y = vmap(lambda own, x: functional_call(vectorised.network, own, (x,)))(state, images)
        return y.unflatten(1, (2, batch)).transpose(0, 1).flatten(1, 2)

    def by_parts(views: Tensor) -> Tensor:
        return heads.forward(halves.forward(views).flatten(2))

    torch.manual_seed(0)
    for name, weight in whole.weights.items():
        with torch.no_grad():
            weight.mul_(1 + 0.1 * torch.randn_like(weight))
            vectorised.weights[name].copy_(weight)
            part, _, own = name.partition(".")
            (halves if part == "0" else heads).weights[own].copy_(weight)
    return {
        "one after another": (whole.forward, [whole.weights]),
        "vmap": (by_vmap, [vectorised.weights]),
        "encoder side by side": (by_parts, [halves.weights, heads.weights]),
    }


def _flat(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """GroupNorm of images without rows: vmap refuses those that a 1x1 convolution leaves with their channels last."""
    return F.group_norm(x.flatten(2), norm.num_groups, norm.weight, norm.bias, norm.eps).view(x.shape)


def step(run: Run, stacks: list[Stack], views: Tensor, gradient: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Outputs, and the gradients of the weights."""
    outputs = run(views)
    return outputs, list(torch.autograd.grad(outputs, [w for stack in stacks for w in stack.values()], gradient))


def check(found: Ways, views: Tensor) -> None:
    """Make sure that all ways compute the same."""
    gradient = torch.randn(*views.shape[:2], WIDTHS["v2"]).double()
    wanted = step(*found["one after another"], views, gradient)
    for way in found.values():
        assert_close(step(*way, views, gradient), wanted)


def measure(norm: str, clients: int, batch: int, args: Any) -> list[dict[str, Any]]:
    """Check, time and print all ways of a case."""
    settings = ModelSettings(width=args.width, client_norm=norm, server_norm=norm)
    model = build(settings, 3, args.size, 0)
    encoder = nn.Sequential(*model.client, *model.server)
    head = build_head("v2", model.features, 0)
    check(ways(encoder.double(), head.double(), 3, 2), torch.randn(2, 6, 3, args.size, args.size).double())
    found = ways(encoder.float(), head.float(), clients, batch)
    views = torch.randn(2, clients * batch, 3, args.size, args.size)
    gradient = torch.randn(2, clients * batch, WIDTHS["v2"])

    def spent(way: tuple[Run, list[Stack]]) -> float:
        start = time.process_time()
        step(*way, views, gradient)
        return time.process_time() - start

    times = common.in_turn({name: partial(spent, way) for name, way in found.items()}, args.repeats)
    rows, facts = [], []
    for name, timing in times.items():
        ratio = timing / times["one after another"]
        rows.append([name, timing.times(1e3), ratio])
        case = {"norm": norm, "clients": clients, "batch": batch, "way": name}
        facts.append(case | timing.times(1e3).facts() | {"of_one_after_another": ratio.facts()})
    title = f"{clients} networks of width {args.width} with {norm} norms, {batch} images of {args.size} pixels each"
    common.show(title, ("way", "ms", "of one after another"), rows)
    return facts


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--width", type=int, default=16, help="channels of the stem")
    parser.add_argument("--size", type=int, default=32, help="pixels a side")
    parser.add_argument("--cases", nargs="+", default=["5x20", "100x1", "100x10"], help="clients x images")
    parser.add_argument("--norms", nargs="+", default=["batch", "group"], choices=["batch", "group"])
    args = parser.parse_args()
    if args.set or args.device not in ("auto", "cpu"):
        parser.error("--set and --device: this benchmark has no configuration, and runs on the CPU")
    args.device, args.threads = "cpu", 1
    device, facts = common.begin(args), []
    for case, norm in product(args.cases, args.norms):
        clients, batch = (int(number) for number in case.split("x"))
        facts += measure(norm, clients, batch, args)
    unit = {"unit": "milliseconds of processor time a step", "images": "random: the cost does not depend on them"}
    common.write("whole", args, device, {"width": args.width, "size": args.size, **unit, "cases": facts})


if __name__ == "__main__":
    main()
