"""Spatially varying activations beside Sparta: position-wise PReLU (input independent), FReLU, ATAC, CBAM-gated ReLU.

Legend: s the logistic sigmoid; p a position; r the reduction of a bottleneck.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparta_models.activations.base import (
    VARYING_DEPENDENT,
    VARYING_INDEPENDENT,
    Activation,
    GateNorm,
    check_kernel_size,
    check_map,
)
from sparta_models.activations.shared_dependent import Bottleneck


class PositionPReLU(Activation):
    """PReLU with a slope for each channel and place: a size x size grid of slopes, laid over the map.

    When the map is size x size, every position has its own slope; otherwise the grid is resized bilinearly, so that
    the same activation stands at maps of every size. The control of the study that varies in space but not with the
    input.

    Args:
        num_channels: C of the input.
        size: height and width of the grid, (C, size, size).
        slope: a at the start.

    Raises:
        ValueError: unless size >= 1; in forward, for an input that is not (B, num_channels, H, W).
    """

    cell = VARYING_INDEPENDENT
    formula = "max(x, 0) + a_cp min(x, 0)"
    paper = "position-wise form of He et al., arXiv 1502.01852"

    def __init__(self, num_channels: int, *, size: int = 8, slope: float = 0.25) -> None:
        super().__init__(num_channels)
        if size < 1:
            raise ValueError(f"expected size >= 1, got {size}")
        self.weight = nn.Parameter(torch.full((num_channels, size, size), float(slope)))

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (B, C, H, W)."""
        check_map(x, self.num_channels)
        slope = self.weight.unsqueeze(0)
        if slope.shape[-2:] != x.shape[-2:]:
            slope = F.interpolate(slope, size=x.shape[-2:], mode="bilinear")
        return F.relu(x) - slope.to(x.dtype) * F.relu(-x)

    def flops(self, height: int, width: int) -> int:
        """FLOPs for one image: those of PReLU, and of a weighted sum of four slopes where the grid is resized."""
        resized = self.weight.shape[-2:] != (height, width)
        return (2 + 7 * resized) * self.num_channels * height * width


class FReLU(Activation):
    """Funnel activation: the maximum of x and a depthwise condition on its neighbourhood.

    Args:
        num_channels: C of the input.
        kernel_size: k, odd.
        batch_norm: whether a batch norm follows the convolution, as published; without one it has a bias.

    Raises:
        ValueError: for a kernel size that is not odd and positive.
    """

    cell = VARYING_DEPENDENT
    formula = "max(x, BN(k x k depthwise convolution of x))"
    paper = "Ma et al., arXiv 2007.11824"

    def __init__(self, num_channels: int, *, kernel_size: int = 3, batch_norm: bool = True) -> None:
        super().__init__(num_channels)
        check_kernel_size(kernel_size)
        self.condition = nn.Conv2d(
            num_channels, num_channels, kernel_size, padding=kernel_size // 2, groups=num_channels, bias=not batch_norm
        )
        self.norm = GateNorm(num_channels) if batch_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (B, C, H, W)."""
        return torch.maximum(x, self.norm(self.condition(x)))

    def flops_per_element(self) -> int:
        """FLOPs for one element."""
        return 2 * self.condition.weight[0].numel() + _behind(self.condition) + 1


class Atac(Activation):
    """Attentional activation: a gate for each element from the channels at its own position.

    Args:
        num_channels: C of the input.
        reduction: r; W1 gives C / r channels, at least 1.
        batch_norm: whether a batch norm follows W1 and W2, as published; without one they have biases.

    Raises:
        ValueError: unless reduction >= 1.
    """

    cell = VARYING_DEPENDENT
    formula = "x s(BN(W2 relu(BN(W1 x_p))))"
    paper = "Dai et al., arXiv 2007.07729"

    def __init__(self, num_channels: int, *, reduction: int = 4, batch_norm: bool = True) -> None:
        super().__init__(num_channels)
        if reduction < 1:
            raise ValueError(f"expected reduction >= 1, got {reduction}")
        hidden = max(1, num_channels // reduction)
        self.reduce = nn.Conv2d(num_channels, hidden, 1, bias=not batch_norm)
        self.reduce_norm = GateNorm(hidden) if batch_norm else nn.Identity()
        self.expand = nn.Conv2d(hidden, num_channels, 1, bias=not batch_norm)
        self.expand_norm = GateNorm(num_channels) if batch_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (B, C, H, W)."""
        h = F.relu(self.reduce_norm(self.reduce(x)))
        return x * torch.sigmoid(self.expand_norm(self.expand(h)))

    def flops(self, height: int, width: int) -> int:
        """FLOPs for one image."""
        hidden, channels = self.reduce.out_channels, self.num_channels
        behind = _behind(self.reduce)
        return height * width * (4 * hidden * channels + (behind + 1) * hidden + (behind + 4) * channels)


class CbamReLU(Activation):
    """ReLU behind the channel and the spatial attention of CBAM, in this order; no batch norm in the spatial gate.

    Args:
        num_channels: C of the input.
        reduction: r; the channel attention's hidden width is C / r, at least 1.
        kernel_size: k of the spatial attention, odd.

    Raises:
        ValueError: unless reduction >= 1, or for a kernel size that is not odd and positive.
    """

    cell = VARYING_DEPENDENT
    formula = "h m(h), h = max(x, 0) s(M(mean_p) + M(max_p)), m = s(conv([mean_c h, max_c h]))"
    paper = "Woo et al., arXiv 1807.06521"

    def __init__(self, num_channels: int, *, reduction: int = 16, kernel_size: int = 7) -> None:
        super().__init__(num_channels)
        check_kernel_size(kernel_size)
        self.channel = Bottleneck(num_channels, reduction, num_channels)
        self.spatial = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (B, C, H, W)."""
        x = F.relu(x)
        attention = self.channel(x.mean(dim=(2, 3), keepdim=True)) + self.channel(x.amax(dim=(2, 3), keepdim=True))
        h = x * torch.sigmoid(attention)
        maps = torch.cat([h.mean(dim=1, keepdim=True), h.amax(dim=1, keepdim=True)], dim=1)  # (B, 2, H, W)
        return h * torch.sigmoid(self.spatial(maps))

    def flops(self, height: int, width: int) -> int:
        """FLOPs for one image."""
        elements = self.num_channels * height * width
        spatial = height * width * (2 * self.spatial.weight.numel() + 3)
        return 7 * elements + 2 * self.channel.flops() + 4 * self.num_channels + spatial


def _behind(convolution: nn.Conv2d) -> int:
    """FLOPs for one output of what follows: a norm's product and addition, or without a norm the bias's addition."""
    return 2 if convolution.bias is None else 1
