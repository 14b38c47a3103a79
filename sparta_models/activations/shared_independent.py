"""Spatially shared, input independent: one scalar rule, the same everywhere (learned per channel at most).

Legend: x one element; s the logistic sigmoid; c the channel. Shapes (B, C, H, W) in and out.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparta_models.activations.base import SHARED_INDEPENDENT, Activation, check_map, per_channel


class _Pointwise(Activation):
    cell = SHARED_INDEPENDENT
    _flops = 1

    def flops_per_element(self) -> int:
        """FLOPs for one element."""
        return self._flops


class ReLU(_Pointwise):
    """Rectifier: the hard gate 1[x > 0]."""

    formula = "max(x, 0)"
    paper = "Nair and Hinton, ICML 2010"

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (B, C, H, W)."""
        return F.relu(x)


class ReLU6(_Pointwise):
    """Rectifier clipped at 6, as MobileNets use it."""

    formula = "min(max(x, 0), 6)"
    paper = "Sandler et al., arXiv 1801.04381"
    _flops = 2

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (B, C, H, W)."""
        return F.relu6(x)


class LeakyReLU(_Pointwise):
    """Rectifier with a fixed slope below zero."""

    formula = "max(x, a x)"
    paper = "Maas et al., ICML 2013"
    _flops = 2

    def __init__(self, num_channels: int, *, slope: float = 0.01) -> None:
        super().__init__(num_channels)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (B, C, H, W)."""
        return F.leaky_relu(x, self.slope)


class PReLU(_Pointwise):
    """Rectifier with a learned slope below zero, one for each channel or one for all.

    Args:
        num_channels: C of the input.
        slope: a at the start.
        channel_wise: whether a is learned for each channel, (C,), or once for all, (1,).
    """

    formula = "max(x, 0) + a_c min(x, 0)"
    paper = "He et al., arXiv 1502.01852"
    _flops = 2

    def __init__(self, num_channels: int, *, slope: float = 0.25, channel_wise: bool = True) -> None:
        super().__init__(num_channels)
        self.weight = nn.Parameter(torch.full((num_channels if channel_wise else 1,), float(slope)))

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (B, C, H, W)."""
        return F.prelu(x, self.weight.to(x.dtype))


class ELU(_Pointwise):
    """Exponential linear unit."""

    formula = "x if x > 0 else a (exp(x) - 1)"
    paper = "Clevert et al., arXiv 1511.07289"
    _flops = 3

    def __init__(self, num_channels: int, *, alpha: float = 1.0) -> None:
        super().__init__(num_channels)
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (B, C, H, W)."""
        return F.elu(x, self.alpha)


class GELU(_Pointwise):
    """Gaussian error linear unit, exact."""

    formula = "x Phi(x), Phi the normal distribution function"
    paper = "Hendrycks and Gimpel, arXiv 1606.08415"
    _flops = 5

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (B, C, H, W)."""
        return F.gelu(x)


class SiLU(_Pointwise):
    """Sigmoid linear unit: the gate s(x)."""

    formula = "x s(x)"
    paper = "Elfwing et al., arXiv 1702.03118"
    _flops = 4

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (B, C, H, W)."""
        return F.silu(x)


class Softplus(_Pointwise):
    """Smooth rectifier, positive everywhere.

    Args:
        num_channels: C of the input.
        beta: sharpness b, fixed.

    Raises:
        ValueError: unless beta > 0.
    """

    formula = "log(1 + exp(b x)) / b"
    paper = "Dugas et al., NIPS 2000"
    _flops = 5

    def __init__(self, num_channels: int, *, beta: float = 1.0) -> None:
        super().__init__(num_channels)
        if beta <= 0:
            raise ValueError(f"expected beta > 0, got {beta}")
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (B, C, H, W)."""
        # Under autocast a GPU computes it in float32.
        return F.softplus(x, beta=self.beta).to(x.dtype)


class Mish(_Pointwise):
    """Self-regularised smooth gate."""

    formula = "x tanh(log(1 + exp(x)))"
    paper = "Misra, arXiv 1908.08681"
    _flops = 5

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (B, C, H, W)."""
        return F.mish(x)


class Swish(_Pointwise):
    """SiLU with a learned sharpness, one for each channel or one for all.

    Args:
        num_channels: C of the input.
        beta: sharpness b at the start.
        channel_wise: whether b is learned for each channel, (C,), or once for all, (1,).

    Raises:
        ValueError: in forward, when `channel_wise`, for an input that is not (B, num_channels, H, W).
    """

    formula = "x s(b_c x)"
    paper = "Ramachandran et al., arXiv 1710.05941"
    _flops = 5

    def __init__(self, num_channels: int, *, beta: float = 1.0, channel_wise: bool = True) -> None:
        super().__init__(num_channels)
        self.beta = nn.Parameter(torch.full((num_channels if channel_wise else 1,), float(beta)))

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (B, C, H, W)."""
        beta = self.beta.to(x.dtype)
        if beta.numel() > 1:
            check_map(x, self.num_channels)
            beta = per_channel(beta)
        return x * torch.sigmoid(beta * x)


class PSSiLU(_Pointwise):
    """Parametric shifted SiLU: two learned scalars; SiLU at alpha = 1, beta = 0. A beta that training takes to 1, where
    the formula has no value, counts as 0.999.

    Args:
        num_channels: C of the input.
        alpha: sharpness a at the start.
        beta: shift b at the start.

    Raises:
        ValueError: for a beta outside [0, 0.999].
    """

    formula = "x (s(a x) - b) / (1 - b)"
    paper = "Dai et al., arXiv 2110.05626"
    _flops = 7
    _most = 0.999

    def __init__(self, num_channels: int, *, alpha: float = 1.0, beta: float = 0.0) -> None:
        super().__init__(num_channels)
        if not 0 <= beta <= self._most:
            raise ValueError(f"expected beta in [0, {self._most}], got {beta}")
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))
        self.beta = nn.Parameter(torch.tensor(float(beta)))

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (B, C, H, W)."""
        beta = self.beta.clamp(max=self._most)
        return x * (torch.sigmoid(self.alpha * x) - beta) / (1 - beta)


class AconC(_Pointwise):
    """Activate or not, version C: a smooth maximum of two learned slopes. Slopes start from N(0, 1), as published.

    Args:
        num_channels: C of the input.
        beta: sharpness b at the start; learned for each channel, (C,), as the slopes are.

    Raises:
        ValueError: in forward, for an input that is not (B, num_channels, H, W).
    """

    formula = "(p1_c - p2_c) x s(b_c (p1_c - p2_c) x) + p2_c x"
    paper = "Ma et al., arXiv 2009.04759"
    _flops = 8

    def __init__(self, num_channels: int, *, beta: float = 1.0) -> None:
        super().__init__(num_channels)
        self.p1 = nn.Parameter(torch.randn(num_channels))
        self.p2 = nn.Parameter(torch.randn(num_channels))
        self.beta = nn.Parameter(torch.full((num_channels,), float(beta)))

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (B, C, H, W)."""
        check_map(x, self.num_channels)
        return acon(x, per_channel(self.p1), per_channel(self.p2), per_channel(self.beta))


def acon(x: Tensor, p1: Tensor, p2: Tensor, beta: Tensor) -> Tensor:
    """Smooth maximum of p1 x and p2 x with sharpness beta, in x's type: parameters in float32 would promote it."""
    d = (p1 - p2).to(x.dtype) * x
    return d * torch.sigmoid(beta.to(x.dtype) * d) + p2.to(x.dtype) * x
