"""Residual networks with pre-activation: PreActResNet-18 (He et al., arXiv 1603.05027) and WideResNet-28-10 / -34-10
(Zagoruyko and Komodakis, arXiv 1605.07146). The activation behind the last stage is the last site of that stage.

For 10 classes PreActResNet-18 has 11,172,170 parameters, WideResNet-28-10 36,479,194 and WideResNet-34-10 46,160,474.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from sparta_models.models.common import Normalize, conv1x1, conv3x3, initialise
from sparta_models.sites import Site


class PreActBlock(nn.Module):
    """Norm, activation and convolution twice; where the shape changes, the shortcut is a projection of the first
    activation.
    """

    def __init__(self, in_channels: int, width: int, stride: int, *, stage: int, block: int) -> None:
        super().__init__()
        self.bn1, self.act1 = nn.BatchNorm2d(in_channels), Site(in_channels, stage=stage, block=block)
        self.conv1 = conv3x3(in_channels, width, stride)
        self.bn2, self.act2 = nn.BatchNorm2d(width), Site(width, stage=stage, block=block)
        self.conv2 = conv3x3(width, width)
        same = stride == 1 and in_channels == width
        self.shortcut = None if same else conv1x1(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, width, H / stride, W / stride)."""
        out = self.act1(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return cast(Tensor, self.conv2(self.act2(self.bn2(self.conv1(out)))) + shortcut)


class PreActResNet(nn.Module):
    """Pre-activation network; x (B, in_channels, H, W) in [0, 1] -> logits (B, num_classes).

    Args:
        num_blocks: blocks of each stage.
        widen: stage i has `width * widen * 2**i` channels, the first convolution `width`.
        num_classes: number of logits.
        in_channels: channels of the images.
        mean: see `build_model`.
        std: see `build_model`.
        width: channels of the first convolution.
    """

    def __init__(
        self,
        num_blocks: Sequence[int],
        *,
        widen: int,
        num_classes: int,
        in_channels: int,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        width: int,
    ) -> None:
        super().__init__()
        self.normalize = Normalize(in_channels, mean, std)
        self.conv1 = conv3x3(in_channels, width)
        channels = width
        self.stages = [f"layer{i + 1}" for i in range(len(num_blocks))]
        for i, name in enumerate(self.stages):
            blocks = []
            for j in range(num_blocks[i]):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(PreActBlock(channels, width * widen * 2**i, stride, stage=i + 1, block=j))
                channels = width * widen * 2**i
            self.add_module(name, nn.Sequential(*blocks))
        self.bn = nn.BatchNorm2d(channels)
        self.act = Site(channels, stage=len(num_blocks), block=num_blocks[-1])
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, H, W) in [0, 1] -> logits (B, num_classes)."""
        x = self.conv1(self.normalize(x))
        for name in self.stages:
            x = getattr(self, name)(x)
        return cast(Tensor, self.fc(torch.mean(self.act(self.bn(x)), dim=(2, 3))))
