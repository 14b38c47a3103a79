"""All activations by name."""

from typing import Any

from sparta_models.activations.base import Activation, Cell
from sparta_models.activations.shared_dependent import DyReLUB, MetaAcon, SEReLU
from sparta_models.activations.shared_independent import (
    ELU,
    GELU,
    AconC,
    LeakyReLU,
    Mish,
    PReLU,
    PSSiLU,
    ReLU,
    ReLU6,
    SiLU,
    Softplus,
    Swish,
)
from sparta_models.activations.sparta import Sparta
from sparta_models.activations.varying import Atac, CbamReLU, FReLU, PositionPReLU

ACTIVATIONS: dict[str, type[Activation]] = {
    "relu": ReLU,
    "relu6": ReLU6,
    "leaky_relu": LeakyReLU,
    "prelu": PReLU,
    "elu": ELU,
    "gelu": GELU,
    "silu": SiLU,
    "swish": Swish,
    "softplus": Softplus,
    "mish": Mish,
    "pssilu": PSSiLU,
    "acon_c": AconC,
    "meta_acon": MetaAcon,
    "dy_relu_b": DyReLUB,
    "se_relu": SEReLU,
    "position_prelu": PositionPReLU,
    "frelu": FReLU,
    "atac": Atac,
    "cbam_relu": CbamReLU,
    "sparta": Sparta,
}
"""Name -> class; constructed as `ACTIVATIONS[name](num_channels, **options)`."""


def build_activation(name: str, num_channels: int, **options: Any) -> Activation:
    """Build an activation for inputs (B, num_channels, H, W).

    Raises:
        ValueError: for an unknown name, or an option's value out of range.
        TypeError: for an option that the activation doesn't have.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name](num_channels, **options)


__all__ = ["ACTIVATIONS", "Activation", "Cell", "Sparta", "build_activation"]
