"""What every activation has in common: its cell of the study, its costs, and what "frozen" means."""

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_STATES = ("training", "frozen")
"""What `repr` leaves out: not what an activation computes, but what is done with it."""


class Cell(NamedTuple):
    """A cell of the 2 x 2 that sorts activations by what their rule depends on."""

    spatial: Literal["shared", "varying"]
    """shared: in one channel of one image, equal inputs give equal outputs wherever they stand."""
    dependence: Literal["independent", "dependent"]
    """independent: an output depends on its own input element alone."""


SHARED_INDEPENDENT = Cell("shared", "independent")
SHARED_DEPENDENT = Cell("shared", "dependent")
VARYING_INDEPENDENT = Cell("varying", "independent")
VARYING_DEPENDENT = Cell("varying", "dependent")


class Activation(nn.Module):
    """Base of all activations: x (B, C, H, W) -> y (B, C, H, W).

    Constructors take `num_channels` first and options as keywords. A frozen activation stays in eval mode under
    `.train()`, holds no parameter that asks for a gradient, and refuses a state_dict with other values.
    """

    cell: ClassVar[Cell]
    formula: ClassVar[str]
    paper: ClassVar[str]
    frozen: bool = False

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        if not isinstance(num_channels, int) or num_channels < 1:
            raise ValueError(f"expected a whole num_channels >= 1, got {num_channels!r}")
        self.num_channels = num_channels

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation to x (B, C, H, W)."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Its settings, for `print(model)`, and for whoever compares functions by more than their tensors."""
        plain = {name: value for name, value in vars(self).items() if isinstance(value, bool | int | float | str)}
        return ", ".join(f"{name}={value}" for name, value in plain.items() if name not in _STATES and name[0] != "_")

    def flops(self, height: int, width: int) -> int:
        """Forward FLOPs for one image: a multiply and an add count one each, and so does a transcendental."""
        return self.flops_per_element() * self.num_channels * height * width

    def flops_per_element(self) -> int:
        """FLOPs for one element, of the activations whose cost is only that."""
        raise NotImplementedError

    def num_parameters(self) -> int:
        """Count the learnable scalars."""
        return sum(p.numel() for p in self.parameters())

    def freeze(self) -> "Activation":
        """Pin parameters and running statistics for good."""
        self.frozen = True
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                # What it gives in eval mode stays the same; `reset_running_stats` (swa_utils.update_bn) spares it then.
                module.track_running_stats = False
            if isinstance(module, GateNorm):
                module.pinned = True
        return self.eval()

    def train(self, mode: bool = True) -> "Activation":
        """Switch the mode; a frozen activation stays in eval mode, and its parameters are pinned again."""
        super().train(mode and not self.frozen)
        if self.frozen:
            for parameter in self.parameters():
                parameter.requires_grad_(False)
                # An optimizer moves whatever has a gradient, be it an old one.
                parameter.grad = None
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.frozen:
            self._refuse_other_values(state_dict, prefix, args[-1])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _refuse_other_values(self, state_dict: dict[str, Any], prefix: str, errors: list[str]) -> None:
        for name, own in self.state_dict().items():
            other = state_dict.get(prefix + name)
            if other is not None and not _same(own, other):
                # Keep the frozen values, and let load_state_dict raise with this line.
                state_dict[prefix + name] = own.clone()
                errors.append(
                    f"frozen activation parameter {prefix + name!r}: expected the frozen values, got others; "
                    "load the weights first and apply the bank after"
                )


class GateNorm(nn.BatchNorm2d):
    """Batch norm inside an activation. Pinned, it stays in eval mode, also when the norms of a network are switched one
    by one."""

    pinned: bool = False

    def train(self, mode: bool = True) -> "GateNorm":
        """Switch the mode, unless pinned."""
        return super().train(mode and not self.pinned)


def _same(own: Tensor, other: Tensor) -> bool:
    return own.shape == other.shape and torch.equal(own, other.to(own.device, own.dtype))


def per_channel(vector: Tensor) -> Tensor:
    """View (C,) as (1, C, 1, 1)."""
    return vector.view(1, -1, 1, 1)


def check_map(x: Tensor, num_channels: int) -> None:
    """Refuse what would be broadcast to another shape."""
    if x.dim() != 4 or x.shape[1] != num_channels:
        raise ValueError(f"expected x of shape (B, {num_channels}, H, W), got {tuple(x.shape)}")


def check_kernel_size(kernel_size: int) -> None:
    """Refuse kernels without a centre."""
    if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"expected an odd kernel_size >= 1, got {kernel_size}")
