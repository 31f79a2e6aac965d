"""Many copies of one network, each with weights of its own, run as one network."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = 32
"""Convolutions that read no more numbers for an output (27 in the stem for RGB images) are computed as matrix products:
a grouped convolution with so few input channels takes nearly twice as long, one with 64 less than half (benchmarks)."""

Stack = dict[str, Tensor]
"""Parameters or buffers by name, each with a leading dimension for the copies."""


class SideBySide(nn.Module):
    """P copies of a network, laid side by side as groups of channels.

    P convolutions from I to O channels are one convolution in P groups from P*I to P*O; likewise for the norms, and
    layers without weights do not notice. So the copies cost about what one such network costs, without a loop over
    them.

    Args:
        network: weights and buffers that every copy starts with. Its layers: convolutions, GroupNorm, BatchNorm, and
            any without weights that treat every channel alike.
        sizes: (P,) images of each copy in one pass.
        device: where to put the copies.

    Attributes:
        parameters_of, buffers_of: by name, (P, ...), free of autograd, sharing memory with the networks: to be read
            and written in place.

    Raises:
        TypeError: a layer with weights cannot be laid side by side.
    """

    def __init__(self, network: nn.Module, sizes: Sequence[int], device: torch.device) -> None:
        super().__init__()
        copies = len(sizes)
        learned = {name for name, _ in network.named_parameters()}
        stacks = {
            name: tensor.detach().to(device).expand(copies, *tensor.shape).clone()
            for name, tensor in network.state_dict().items()
            if tensor.ndim > 0
        }
        self.parameters_of: Stack = {name: stack for name, stack in stacks.items() if name in learned}
        self.buffers_of: Stack = {name: stack for name, stack in stacks.items() if name not in learned}
        # Copies with equally many images run together: one network for each run of them.
        starts = [0, *(i for i in range(1, copies) if sizes[i] != sizes[i - 1])]
        self.runs = [(a, b, int(sizes[a])) for a, b in zip(starts, [*starts[1:], copies], strict=True)]
        self.networks = nn.ModuleList(_widened(network, b - a) for a, b, _ in self.runs)
        for (a, b, _), wide in zip(self.runs, self.networks, strict=True):
            wide.to(device).train()
            for name, stack in stacks.items():
                owner, _, leaf = name.rpartition(".")
                view = stack[a:b].flatten(0, 1)
                setattr(wide.get_submodule(owner), leaf, nn.Parameter(view) if name in learned else view)

    def forward(self, images: Tensor) -> Tensor:
        """Run every copy on its own images.

        Args:
            images: (V, n, C, H, W): V views of the images of copy 0, of copy 1, ...; n is the sum of ``sizes``.

        Returns:
            (V, n, C', H', W'), in the same order.
        """
        pieces = images.split([(b - a) * size for a, b, size in self.runs], dim=1)
        outputs = [
            _run(wide, piece, b - a) for (a, b, _), wide, piece in zip(self.runs, self.networks, pieces, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def counters(self) -> Stack:
        """Buffers that all copies share, by name: how many batches BatchNorm has seen."""
        return {name: buffer for name, buffer in self.networks[0].named_buffers() if buffer.ndim == 0}

    def set_counters(self, counters: Stack) -> None:
        """Restore ``counters``."""
        for wide in self.networks:
            for name, value in counters.items():
                wide.get_buffer(name).copy_(value)


def _run(wide: nn.Module, images: Tensor, copies: int) -> Tensor:
    """Copies with B images each: (V, P * B, C, H, W) to (V, P * B, C', H', W'). Free of copying where B = 1."""
    views = len(images)
    x = images.unflatten(1, (copies, -1)).transpose(1, 2)  # (V, B, P, C, H, W)
    y = wide(x.reshape(-1, copies * x.shape[3], *x.shape[4:]))  # (V * B, P * C', H', W')
    y = y.unflatten(1, (copies, -1)).unflatten(0, (views, -1))  # (V, B, P, C', H', W')
    return y.transpose(1, 2).flatten(1, 2)


def _is_plain(conv: nn.Conv2d) -> bool:
    return conv.dilation == (1, 1) and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def _by_matrices(conv: nn.Conv2d, copies: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution of P copies as matrix products with unfolded images: (B, P * I, H, W) to (B, P * O, H', W')."""
    (height, width), (down, along) = conv.kernel_size, conv.stride
    above, beside = (int(side) for side in conv.padding)
    x = F.pad(x.unflatten(1, (copies, -1)), (beside, beside, above, above))  # (B, P, I, H, W)
    windows = x.unfold(3, height, down).unfold(4, width, along)  # (B, P, I, H', W', k, k), a view
    patches = windows.permute(0, 1, 2, 5, 6, 3, 4).flatten(5, 6).flatten(2, 4)  # several times as fast as F.unfold
    y = weight.view(copies, -1, patches.shape[2]) @ patches  # (B, P, O, H' * W')
    y = y.flatten(1, 2).unflatten(2, windows.shape[3:5])
    return y if bias is None else y + bias.view(-1, 1, 1)


def _widened(network: nn.Module, copies: int) -> nn.Module:
    """The network with so many times the channels, in groups; its weights are still to be set."""
    wide = copy.deepcopy(network)
    for module in wide.modules():
        if isinstance(module, nn.Conv2d):
            numbers = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
            if copies > 1 and module.groups == 1 and numbers <= FEW and _is_plain(module):
                module._conv_forward = partial(_by_matrices, module, copies)  # type: ignore[method-assign]
            module.in_channels *= copies
            module.out_channels *= copies
            module.groups *= copies
        elif isinstance(module, nn.GroupNorm):
            module.num_groups *= copies
            module.num_channels *= copies
        elif isinstance(module, nn.BatchNorm2d):
            module.num_features *= copies
        elif next(module.parameters(recurse=False), None) is not None:
            raise TypeError(f"{type(module).__name__} cannot be laid side by side")
    return wide
