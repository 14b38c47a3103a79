"""What the networks share: normalisation as the first layer, initial weights, and convolution helpers."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """(x - mean) / std for images in [0, 1], x (B, C, H, W). The first layer, so that attacks work in pixel units.

    Raises:
        ValueError: for a mean or std of another length than in_channels, or a std that isn't positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, in_channels: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        for name, default, values in (("mean", 0.0, mean), ("std", 1.0, std)):
            vector = [default] * in_channels if values is None else [float(v) for v in values]
            if len(vector) != in_channels:
                raise ValueError(f"expected {in_channels} values of {name}, one per channel, got {len(vector)}")
            if name == "std" and min(vector) <= 0:
                raise ValueError(f"expected std > 0, got {vector}")
            self.register_buffer(name, torch.tensor(vector).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (B, C, H, W)."""
        if x.dim() != 4 or x.shape[1] != self.mean.shape[1]:
            raise ValueError(f"expected images of shape (B, {self.mean.shape[1]}, H, W), got {tuple(x.shape)}")
        return (x - self.mean) / self.std


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """3 x 3 convolution with padding and without bias."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, groups=groups, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """1 x 1 convolution without bias."""
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


def initialise(model: nn.Module) -> None:
    """He initialisation of convolutions (fan out); batch norms at one and zero. Linear layers keep torch's default."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def check_stem(stem: str) -> None:
    """Refuse an unknown stem."""
    if stem not in ("cifar", "imagenet"):
        raise ValueError(f"expected stem among cifar, imagenet, got {stem!r}")
