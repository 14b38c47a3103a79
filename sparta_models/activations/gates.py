"""The forms of Sparta. Each starts as x sigmoid(beta x).

Legend: x (B, C, H, W); * a k x k convolution with zero padding, same size out; s the logistic sigmoid.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparta_models.activations.attention import attention_gate
from sparta_models.activations.attention import logits as attention_logits
from sparta_models.activations.gate import correlate, depthwise_gate, smooth_max


class Gate(nn.Module):
    """One form of Sparta; all of them share a correlation w * x + b of each channel with its own k x k kernel."""

    any_width = False
    """Whether the parameters fit every number of channels."""

    def __init__(self, num_channels: int, *, kernel_size: int, dilation: int, beta: float, bias: bool) -> None:
        super().__init__()
        self.dilation = dilation
        self.weight = nn.Parameter(dirac(num_channels, kernel_size, beta))  # (C, 1, k, k)
        self.bias = nn.Parameter(torch.zeros(num_channels)) if bias else None

    def extra_repr(self) -> str:
        """Its settings."""
        return f"kernel_size={self.weight.shape[-1]}, dilation={self.dilation}, bias={self.bias is not None}"

    def forward(self, x: Tensor) -> Tensor:
        """Return g(x), (B, C, H, W)."""
        return correlate(x, self.weight, self.bias, self.dilation)

    def activate(self, x: Tensor) -> Tensor:
        """Return y = x sigmoid(g(x)), (B, C, H, W)."""
        return x * torch.sigmoid(self(x))

    def flops(self, num_channels: int, height: int, width: int) -> int:
        """FLOPs of `activate` for one image."""
        per_element = 2 * self.weight[0].numel() + (self.bias is not None) + 4
        return per_element * num_channels * height * width


class DepthwiseGate(Gate):
    """g(x)_c = w_c * x_c + b_c: each channel looks at its own k x k neighbourhood."""

    def activate(self, x: Tensor) -> Tensor:
        """Return y = x sigmoid(g(x)), (B, C, H, W)."""
        return depthwise_gate(x, self.weight, self.bias, self.dilation)


class AttentionGate(Gate):
    """g(x)_c = w_c * x_c + b_c + v * [mean_c x, max_c x]: a map that all channels share is added; v = 0 at the
    start."""

    def __init__(self, num_channels: int, *, kernel_size: int, dilation: int, beta: float, bias: bool) -> None:
        super().__init__(num_channels, kernel_size=kernel_size, dilation=dilation, beta=beta, bias=bias)
        self.pooled = nn.Parameter(torch.zeros(1, 2, kernel_size, kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        """Return g(x), (B, C, H, W)."""
        return attention_logits(x, self.weight, self.pooled, self.bias, self.dilation)

    def activate(self, x: Tensor) -> Tensor:
        """Return y = x sigmoid(g(x)), (B, C, H, W)."""
        return attention_gate(x, self.weight, self.pooled, self.bias, self.dilation)

    def flops(self, num_channels: int, height: int, width: int) -> int:
        """FLOPs of `activate` for one image."""
        maps = 3 * num_channels * height * width + 2 * self.pooled.numel() * height * width
        return super().flops(num_channels, height, width) + maps


class LowRankGate(Gate):
    """g(x)_c = w_c * x_c + b_c + (U V x)_c: channels are mixed through C / 8 directions; U = 0 at the start."""

    def __init__(self, num_channels: int, *, kernel_size: int, dilation: int, beta: float, bias: bool) -> None:
        super().__init__(num_channels, kernel_size=kernel_size, dilation=dilation, beta=beta, bias=bias)
        rank = max(1, num_channels // 8)
        self.reduce = nn.Parameter(torch.randn(rank, num_channels, 1, 1) / num_channels**0.5)
        self.expand = nn.Parameter(torch.zeros(num_channels, rank, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return g(x), (B, C, H, W)."""
        return super().forward(x) + F.conv2d(F.conv2d(x, self.reduce), self.expand)

    def flops(self, num_channels: int, height: int, width: int) -> int:
        """FLOPs of `activate` for one image."""
        mixing = (4 * self.reduce.numel() + num_channels) * height * width
        return super().flops(num_channels, height, width) + mixing


class SharedGate(Gate):
    """g(x)_c = w * x_c + b: one kernel for all channels, so that it fits every width."""

    any_width = True

    def __init__(self, num_channels: int, *, kernel_size: int, dilation: int, beta: float, bias: bool) -> None:
        super().__init__(1, kernel_size=kernel_size, dilation=dilation, beta=beta, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return g(x), (B, C, H, W)."""
        return correlate(x, *self._expanded(x.shape[1]), self.dilation)

    def activate(self, x: Tensor) -> Tensor:
        """Return y = x sigmoid(g(x)), (B, C, H, W)."""
        return depthwise_gate(x, *self._expanded(x.shape[1]), self.dilation)

    def _expanded(self, num_channels: int) -> tuple[Tensor, Tensor | None]:
        bias = None if self.bias is None else self.bias.expand(num_channels)
        return self.weight.expand(num_channels, -1, -1, -1), bias


class SmoothMaxGate(Gate):
    """y = T + (x - T) s(b_c (x - T)), T = w_c * x_c: smooth maximum of x and a spatial condition; w = 0 at the start.

    The limit of sharp b_c is FReLU's max(x, T). The offset that `bias` adds is T's.
    """

    def __init__(self, num_channels: int, *, kernel_size: int, dilation: int, beta: float, bias: bool) -> None:
        super().__init__(num_channels, kernel_size=kernel_size, dilation=dilation, beta=0.0, bias=bias)
        self.sharpness = nn.Parameter(torch.full((num_channels, 1, 1), float(beta)))

    def forward(self, x: Tensor) -> Tensor:
        """Return T, (B, C, H, W): what x is compared with, and no argument of the sigmoid."""
        return super().forward(x)

    def activate(self, x: Tensor) -> Tensor:
        """Return the smooth maximum, (B, C, H, W)."""
        return smooth_max(x, self.weight, self.sharpness.flatten(), self.bias, self.dilation)

    def flops(self, num_channels: int, height: int, width: int) -> int:
        """FLOPs of `activate` for one image."""
        return super().flops(num_channels, height, width) + 3 * num_channels * height * width


def dirac(num_channels: int, kernel_size: int, centre: float) -> Tensor:
    """Depthwise kernel (C, 1, k, k) that multiplies by `centre`."""
    weight = torch.zeros(num_channels, 1, kernel_size, kernel_size)
    weight[:, :, kernel_size // 2, kernel_size // 2] = centre
    return weight


GATES: dict[str, type[Gate]] = {
    "depthwise": DepthwiseGate,
    "attention": AttentionGate,
    "lowrank": LowRankGate,
    "shared": SharedGate,
    "smoothmax": SmoothMaxGate,
}
