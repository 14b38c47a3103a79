"""Sparta: the spatially attentive activation, a gate at every position that depends on the neighbourhood there.

Guo, Juefei-Xu, Zhou, Feng, Liu, Wang: "Sparta: Spatially Attentive and Adversarially Robust Activation", arXiv
2105.08269. Of the paper, its abstract's properties are what is held to: the gate is spatially attentive and input
dependent. The form is this project's own choice, the default by measurement (LOG.md): the smooth maximum

    y = T + (x - T) phi,   phi = sigmoid(b (x - T)),   T = w * x

of x and a depthwise k x k correlation of it. The multiplicative forms are y = x phi, phi = sigmoid(g(x)).

Legend: x, T, phi (B, C, H, W); k the kernel size; beta the sharpness at the start.
"""

import math

from torch import Tensor

from sparta_models.activations.base import VARYING_DEPENDENT, Activation, check_kernel_size
from sparta_models.activations.gates import GATES, Gate

INITS = {"silu": 1.0, "relu": 10.0}


class Sparta(Activation):
    """Spatially attentive activation.

    Args:
        num_channels: C of the input.
        variant: the form, see `sparta_models.activations.gates`.
        kernel_size: k, odd.
        dilation: spacing of the kernel's taps.
        beta: sharpness at the start; y = x sigmoid(beta x) with init "silu".
        bias: whether T, or g, has a learned offset (per channel; one for the variant "shared"), zero at the start.
        init: "silu", or "relu" for a gate ten times as sharp.

    Raises:
        ValueError: for an unknown variant or init, or a kernel size, dilation or beta out of range; in forward, for an
            input that is not (B, num_channels, H, W) (any C for the variant "shared").
    """

    cell = VARYING_DEPENDENT
    formula = "T + (x - T) s(b (x - T)), T = w * x (or x s(g(x))), from a k x k neighbourhood"
    paper = "Guo et al., arXiv 2105.08269"

    def __init__(
        self,
        num_channels: int,
        *,
        variant: str = "smoothmax",
        kernel_size: int = 5,
        dilation: int = 1,
        beta: float = 1.0,
        bias: bool = False,
        init: str = "silu",
    ) -> None:
        super().__init__(num_channels)
        _check(variant, kernel_size, dilation, beta, init)
        self.variant = variant
        self.gate: Gate = GATES[variant](
            num_channels, kernel_size=kernel_size, dilation=dilation, beta=beta * INITS[init], bias=bias
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (B, C, H, W)."""
        if x.dim() != 4 or (not self.gate.any_width and x.shape[1] != self.num_channels):
            raise ValueError(
                f"expected x of shape (B, {self.num_channels}, H, W), got {tuple(x.shape)}; "
                'build Sparta for the width of its input, or use variant="shared", which fits every width'
            )
        return self.gate.activate(x)

    def flops(self, height: int, width: int) -> int:
        """FLOPs for one image."""
        return self.gate.flops(self.num_channels, height, width)


def _check(variant: str, kernel_size: int, dilation: int, beta: float, init: str) -> None:
    if variant not in GATES:
        raise ValueError(f"expected a variant among {', '.join(GATES)}, got {variant!r}")
    check_kernel_size(kernel_size)
    if not isinstance(dilation, int) or dilation < 1:
        raise ValueError(f"expected a whole dilation >= 1, got {dilation}")
    if not isinstance(beta, int | float) or not 0 < beta < math.inf:
        raise ValueError(f"expected a finite beta > 0, got {beta!r}")
    if init not in INITS:
        raise ValueError(f"expected init among {', '.join(INITS)}, got {init!r}")
