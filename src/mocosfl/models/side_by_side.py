"""Many copies of one network, each with weights of its own, run as one network where that can be."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from mocosfl.models.layers import ResidualBlock

FEW = 32
"""Convolutions that read no more numbers for an output (27 in the stem for RGB images) are computed as matrix products:
a grouped convolution with so few input channels takes nearly twice as long, one with 64 less than half (benchmarks)."""

Stack = dict[str, Tensor]
"""Parameters or buffers by name, each with a leading dimension for the copies."""


class SideBySide:
    """P copies of a network, laid side by side as groups of channels.

    That takes convolutions, GroupNorm, BatchNorm2d, and layers without weights that treat every channel alike. A
    network with others (linear layers, LayerNorm, attention) is run one copy after another.

    n convolutions from I to O channels are one convolution in n groups from n*I to n*O; likewise for the norms, and
    layers without weights do not notice. Every image is a group of its own and is given its copy's weights. So there is
    no loop over copies, and a pass costs the same for one image a copy, for many, and for unequally many.

    Args:
        network: weights and buffers that every copy starts with.
        sizes: (P,) images of each copy in one pass; n is their sum.
        device: where to put the copies.
        learns: whether gradients are wanted.

    Attributes:
        weights: parameters by name, (P, ...), leaves of autograd.
        statistics: buffers by name, (P, ...).
        in_turn: whether the copies are run one after another.
    """

    def __init__(self, network: nn.Module, sizes: Sequence[int], device: torch.device, learns: bool = True) -> None:
        copies, images = len(sizes), sum(sizes)

        def stacked(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device).expand(copies, *tensor.shape).clone()

        self.weights: Stack = {name: stacked(p).requires_grad_(learns) for name, p in network.named_parameters()}
        self.statistics: Stack = {name: stacked(b) for name, b in network.named_buffers()}
        self.alone = copies == 1
        owner = torch.repeat_interleave(torch.tensor(sizes)).to(device)  # of every image
        self.owner = None if copies == images else owner
        # Only its structure is used: weights and statistics are handed to it in every pass.
        self.network = nn.Sequential(copy.deepcopy(network)).to("meta").train()
        self.sizes = list(sizes)
        self.in_turn = not self.alone and not _can_be_widened(self.network)
        if not self.alone and not self.in_turn:
            _widen(self.network, images, owner, torch.tensor(sizes, device=device))

    def forward(self, images: Tensor) -> Tensor:
        """Run every copy on its own images.

        Args:
            images: (V, n, C, H, W): V views of the images of copy 0, of copy 1, ...

        Returns:
            (V, n, C', H', W'), or whatever shape the network's outputs have, in the same order.
        """
        if self.in_turn:
            return self._one_after_another(images)
        if self.alone:
            state = {f"0.{name}": stack[0] for name, stack in (self.weights | self.statistics).items()}
            return functional_call(self.network, state, images.flatten(0, 1)).unflatten(0, images.shape[:2])
        weights = {name: w if self.owner is None else w.index_select(0, self.owner) for name, w in self.weights.items()}
        state = {name: w.flatten(0, 1) for name, w in weights.items()} | self.statistics
        state = {f"0.{name}": tensor for name, tensor in state.items()}
        return functional_call(self.network, state, images.flatten(1, 2)).unflatten(1, (images.shape[1], -1))

    def _one_after_another(self, images: Tensor) -> Tensor:
        # unbound at once: the gradient of a slice of a stack is a stack of zeros
        stacks = {f"0.{name}": stack.unbind(0) for name, stack in (self.weights | self.statistics).items()}
        outputs = []
        for place, piece in enumerate(images.split(self.sizes, dim=1)):
            state = {name: slices[place] for name, slices in stacks.items()}
            output = functional_call(self.network, state, piece.flatten(0, 1))
            outputs.append(output.unflatten(0, piece.shape[:2]))
        return torch.cat(outputs, dim=1)


_CHANNELWISE = (nn.Sequential, nn.Identity, nn.ReLU, nn.ReLU6, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


def _can_be_widened(network: nn.Module) -> bool:
    """Whether all layers are of kinds that can be laid side by side."""
    layers = (*_CHANNELWISE, ResidualBlock, nn.Conv2d, nn.GroupNorm, nn.BatchNorm2d)
    return all(isinstance(module, layers) for module in network.modules())


def _widen(network: nn.Module, groups: int, owner: Tensor, sizes: Tensor) -> None:
    """Give the layers inside a network so many times the channels, in groups."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d):
                numbers = child.in_channels * child.kernel_size[0] * child.kernel_size[1]
                if child.groups == 1 and numbers <= FEW and _is_plain(child):
                    child._conv_forward = partial(_by_matrices, child, groups)  # type: ignore[method-assign]
                child.in_channels *= groups
                child.out_channels *= groups
                child.groups *= groups
            elif isinstance(child, nn.GroupNorm):
                child.num_groups *= groups
                child.num_channels *= groups
            elif isinstance(child, nn.BatchNorm2d):
                setattr(module, name, _BatchNorms(child, owner, sizes))


def _is_plain(conv: nn.Conv2d) -> bool:
    return conv.dilation == (1, 1) and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def _by_matrices(conv: nn.Conv2d, groups: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution in n groups as matrix products with unfolded images: (V, n * I, H, W) to (V, n * O, H', W')."""
    (height, width), (down, along) = conv.kernel_size, conv.stride
    above, beside = (int(side) for side in conv.padding)
    x = F.pad(x.unflatten(1, (groups, -1)), (beside, beside, above, above))  # (V, n, I, H, W)
    windows = x.unfold(3, height, down).unfold(4, width, along)  # (V, n, I, H', W', k, k), a view
    patches = windows.permute(0, 1, 2, 5, 6, 3, 4).flatten(5, 6).flatten(2, 4)  # several times as fast as F.unfold
    y = weight.view(groups, -1, patches.shape[2]) @ patches  # (V, n, O, H' * W')
    y = y.flatten(1, 2).unflatten(2, windows.shape[3:5])
    return y if bias is None else y + bias.view(-1, 1, 1)


class _BatchNorms(nn.Module):
    """One BatchNorm for each copy, over the copy's own images.

    Args:
        norm: the one to replace; weights and statistics have its names.
        owner: (n,) the copy that each image belongs to.
        sizes: (P,) images of each copy.

    Shape: input and output (V, n * C, H, W).
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, norm: nn.BatchNorm2d, owner: Tensor, sizes: Tensor) -> None:
        super().__init__()
        self.eps, self.share = norm.eps, norm.momentum or 0.0
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers():
            self.register_buffer(name, buffer)
        self.owner, self.sizes = owner, sizes

    def forward(self, x: Tensor) -> Tensor:
        full = torch.promote_types(x.dtype, torch.float32)
        y = x.to(full).unflatten(1, (len(self.owner), -1))  # (V, n, C, H, W)
        mean = self._of_copies(y)
        y = y - mean[self.owner, :, None, None]
        variance = self._of_copies(y.square())
        with torch.no_grad():
            count = self.sizes[:, None] * (y[:, 0, 0].numel())
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.share)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), self.share)
            self.num_batches_tracked.add_(1)
        y = y * torch.rsqrt(variance + self.eps)[self.owner, :, None, None]
        return (y.flatten(1, 2) * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).to(x.dtype)

    def _of_copies(self, y: Tensor) -> Tensor:
        """(V, n, C, H, W) to the means of every copy and channel, (P, C)."""
        of_images = y.mean(dim=(0, 3, 4))  # (n, C)
        sums = of_images.new_zeros(len(self.sizes), of_images.shape[1]).index_add(0, self.owner, of_images)
        return sums / self.sizes[:, None]
