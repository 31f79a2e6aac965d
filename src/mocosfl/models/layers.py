"""Layers that the backbones share."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocosfl.distributed import World

Norm = Literal["group", "batch"]
CHANNELS_PER_GROUP = 4

_SEEDING = threading.RLock()
"""Threads share the default generator: the dashboard builds networks too, to count their bytes."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw initial weights from a seed, one thread at a time; the global generators are left as they were."""
    with _SEEDING, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every GPU as well
        yield


class WSConv2d(nn.Conv2d):
    """Convolution whose filters are standardised to mean 0 and variance 1 before use (Qiao et al., 2019).

    Beside GroupNorm it recovers what BatchNorm does for a batch too small to have statistics.

    Shape: input (n, C_in, H, W), output (n, C_out, H', W').
    """

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, standardised(self.weight), self.bias)


def standardised(filters: Tensor) -> Tensor:
    """Filters with mean 0 and variance 1 each: (O, I, k, k), in the layout that they have.

    A layer norm of each filter, up to the n - 1 of the variance; torch.var_mean takes ten times as long on a CPU.
    """
    channels_last = filters.stride(1) == 1
    w = filters.permute(0, 2, 3, 1) if channels_last else filters
    n = w[0].numel()
    share = (n - 1) / n
    w = (F.layer_norm(w.flatten(1), (n,), eps=1e-10 * share) * share**0.5).view(w.shape)
    return w.permute(0, 3, 1, 2) if channels_last else w


def with_plain_filters(network: nn.Module) -> nn.Module:
    """A copy in eval mode whose standardised convolutions are ordinary ones, of the filters that they used.

    It computes the same numbers.
    """
    network = copy.deepcopy(network).eval()
    for name, conv in list(network.named_modules()):
        if isinstance(conv, WSConv2d):
            plain = nn.Conv2d(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size,  # type: ignore[arg-type]
                conv.stride,  # type: ignore[arg-type]
                conv.padding,  # type: ignore[arg-type]
                groups=conv.groups,
                bias=conv.bias is not None,
            )
            plain.weight, plain.bias = nn.Parameter(standardised(conv.weight.detach())), conv.bias
            network.set_submodule(name, plain)
    return network


class GroupNorm(nn.GroupNorm):
    """GroupNorm with groups of 4 channels.

    Raises:
        ValueError: the channels are not a multiple of 4.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels // CHANNELS_PER_GROUP, channels)


class SharedBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the batches of all processes of a run together.

    ``torch.nn.SyncBatchNorm`` does the same on GPUs alone.

    Args:
        norm: the BatchNorm to replace; its weights and statistics are taken over under the same names.
        world: the processes.

    Shape: input and output (n, C, ...).
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d, world: World) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self.world = world
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers():
            setattr(self, name, buffer)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions will do."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dims, shape = [d for d in range(x.ndim) if d != 1], [1, -1, *[1] * (x.ndim - 2)]
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        sums = self.world.sum(torch.cat([y.sum(dims), y.new_full((1,), y.numel() / y.shape[1])]))
        mean, count = sums[:-1] / sums[-1], sums[-1]
        y = y - mean.view(shape)
        variance = self.world.sum(y.square().sum(dims)) / count
        with torch.no_grad():
            share = self.momentum or 0.0
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), share)
            self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (y * scale.view(shape) + self.bias.view(shape)).to(x.dtype)


def share_statistics(network: nn.Module, world: World) -> None:
    """Let every BatchNorm of a network average over the batches of all processes, in place."""
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(parent, name, SharedBatchNorm(child, world))


def has_batch_norm(network: nn.Module) -> bool:
    """Whether some layer averages over the images of a batch."""
    return any(isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) for layer in network.modules())


def conv_of(norm: Norm) -> Callable[..., nn.Conv2d]:
    """The convolution that belongs to a norm: weight-standardised beside GroupNorm, plain beside BatchNorm."""
    return WSConv2d if norm == "group" else nn.Conv2d


def norm_of(norm: Norm) -> Callable[[int], nn.Module]:
    """The normalisation layer of a number of channels."""
    return GroupNorm if norm == "group" else nn.BatchNorm2d


class ConvNorm(nn.Sequential):
    """Convolution (size-preserving padding, a bias only if asked for) and norm."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, norm: Norm, groups: int = 1, bias: bool = False
    ) -> None:
        conv = conv_of(norm)(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=bias)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
        super().__init__(conv, norm_of(norm)(outputs))


class ResidualBlock(nn.Module):
    """Convolutions beside a shortcut, summed, then ReLU (He et al., 2016)."""

    convolutions: int

    def __init__(self, body: nn.Sequential, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.body = body
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = ConvNorm(inputs, outputs, 1, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x), inplace=True)


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions. Shape: (n, inputs, H, W) to (n, planes, H / stride, W / stride)."""

    convolutions = 2
    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int, norm: Norm) -> None:
        body = nn.Sequential(
            ConvNorm(inputs, planes, 3, stride, norm),
            nn.ReLU(inplace=True),
            ConvNorm(planes, planes, 3, 1, norm),
        )
        super().__init__(body, inputs, planes, stride, norm)


class BottleneckBlock(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions. Shape: (n, inputs, H, W) to (n, 4 planes, H / stride, W / stride)."""

    convolutions = 3
    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int, norm: Norm) -> None:
        outputs = planes * self.expansion
        body = nn.Sequential(
            ConvNorm(inputs, planes, 1, 1, norm),
            nn.ReLU(inplace=True),
            ConvNorm(planes, planes, 3, stride, norm),
            nn.ReLU(inplace=True),
            ConvNorm(planes, outputs, 1, 1, norm),
        )
        super().__init__(body, inputs, outputs, stride, norm)
