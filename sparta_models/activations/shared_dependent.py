"""Spatially shared, input dependent: the rule of a channel is computed from the whole image, and is then one rule
everywhere.

Legend: z = mean of x over the positions, (B, C, 1, 1); s the logistic sigmoid; r the reduction of the bottleneck.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparta_models.activations.base import SHARED_DEPENDENT, Activation, per_channel
from sparta_models.activations.shared_independent import acon


class Bottleneck(nn.Module):
    """Two 1 x 1 convolutions with a ReLU between, (B, C, 1, 1) -> (B, out, 1, 1); `least` hidden channels, or C / r."""

    def __init__(self, num_channels: int, reduction: int, out: int, *, relu: bool = True, least: int = 1) -> None:
        super().__init__()
        if reduction < 1:
            raise ValueError(f"expected reduction >= 1, got {reduction}")
        hidden = max(least, num_channels // reduction)
        self.reduce = nn.Conv2d(num_channels, hidden, 1)
        self.expand = nn.Conv2d(hidden, out, 1)
        self.relu = relu

    def forward(self, z: Tensor) -> Tensor:
        """Apply to z (B, C, H, W)."""
        h = self.reduce(z)
        out: Tensor = self.expand(F.relu(h) if self.relu else h)
        return out

    def flops(self) -> int:
        """FLOPs for one position."""
        products = 2 * sum(c.weight.numel() for c in (self.reduce, self.expand))
        return products + self.relu * self.reduce.out_channels


class MetaAcon(Activation):
    """ACON whose sharpness is computed from the image's channel means, without the batch norms of the first release.

    The published network puts a batch norm behind each of its two layers; on 1 x 1 maps that makes an output depend on
    the rest of the batch, which an attack may not use. As other implementations do, it is left out.

    Args:
        num_channels: C of the input.
        reduction: r; the hidden width is max(r, C / r), as in the authors' code.

    Raises:
        ValueError: unless reduction >= 1.
    """

    cell = SHARED_DEPENDENT
    formula = "acon(x; p1_c, p2_c, s(W2 W1 z)_c)"
    paper = "Ma et al., arXiv 2009.04759"

    def __init__(self, num_channels: int, *, reduction: int = 16) -> None:
        super().__init__(num_channels)
        self.p1 = nn.Parameter(torch.randn(num_channels))
        self.p2 = nn.Parameter(torch.randn(num_channels))
        self.sharpness = Bottleneck(num_channels, reduction, num_channels, relu=False, least=reduction)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (B, C, H, W)."""
        beta = torch.sigmoid(self.sharpness(_mean(x)))
        return acon(x, per_channel(self.p1), per_channel(self.p2), beta)

    def flops(self, height: int, width: int) -> int:
        """FLOPs for one image."""
        return 9 * self.num_channels * height * width + self.sharpness.flops() + 3 * self.num_channels


class DyReLUB(Activation):
    """Dynamic ReLU, version B: the maximum of two lines whose slopes and offsets come from the image's channel means.

    Residuals of slope are scaled by 1 and of offset by 0.5, as published. At a zero last layer it is ReLU.

    Args:
        num_channels: C of the input.
        reduction: r; the hidden width is C / r, at least 1.

    Raises:
        ValueError: unless reduction >= 1.
    """

    cell = SHARED_DEPENDENT
    formula = "max_k (a_kc(z) x + b_kc(z)), k = 1, 2"
    paper = "Chen et al., arXiv 2003.10027"

    def __init__(self, num_channels: int, *, reduction: int = 8) -> None:
        super().__init__(num_channels)
        self.coefficients = Bottleneck(num_channels, reduction, 4 * num_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (B, C, H, W)."""
        residual = 2 * torch.sigmoid(self.coefficients(_mean(x))) - 1  # (B, 4 C, 1, 1)
        a1, a2, b1, b2 = residual.chunk(4, dim=1)
        return torch.maximum((1 + a1) * x + 0.5 * b1, a2 * x + 0.5 * b2)

    def flops(self, height: int, width: int) -> int:
        """FLOPs for one image."""
        return 6 * self.num_channels * height * width + self.coefficients.flops() + 23 * self.num_channels


class SEReLU(Activation):
    """ReLU behind a squeeze-and-excitation gate.

    Args:
        num_channels: C of the input.
        reduction: r; the hidden width is C / r, at least 1.

    Raises:
        ValueError: unless reduction >= 1.
    """

    cell = SHARED_DEPENDENT
    formula = "max(x, 0) s(W2 relu(W1 z))_c"
    paper = "Hu et al., arXiv 1709.01507"

    def __init__(self, num_channels: int, *, reduction: int = 16) -> None:
        super().__init__(num_channels)
        self.excite = Bottleneck(num_channels, reduction, num_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (B, C, H, W)."""
        return F.relu(x) * torch.sigmoid(self.excite(_mean(x)))

    def flops(self, height: int, width: int) -> int:
        """FLOPs for one image."""
        return 3 * self.num_channels * height * width + self.excite.flops() + 3 * self.num_channels


def _mean(x: Tensor) -> Tensor:
    return x.mean(dim=(2, 3), keepdim=True)
