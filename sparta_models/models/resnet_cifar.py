"""The thin ResNets of depth 6 n + 2 for small images (He et al., arXiv 1512.03385, section 4.2), shortcuts without
parameters.

ResNet-20 has 269,722 parameters for 10 classes, ResNet-32 464,154, ResNet-56 853,018.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparta_models.models.common import Normalize, conv3x3, initialise
from sparta_models.sites import Site


class CifarBlock(nn.Module):
    """Two 3 x 3 convolutions; the shortcut subsamples and pads channels with zeros (option A).

    Args:
        in_channels: C of the input.
        width: channels of both convolutions, and of the output.
        stride: of the first convolution.
        stage: resolution stage of its sites, from 1.
        block: its number within the stage, from 0.
    """

    def __init__(self, in_channels: int, width: int, stride: int, *, stage: int, block: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(in_channels, width, stride), nn.BatchNorm2d(width)
        self.act1 = Site(width, stage=stage, block=block)
        self.conv2, self.bn2 = conv3x3(width, width), nn.BatchNorm2d(width)
        self.act2 = Site(width, stage=stage, block=block)
        self.stride, self.padding = stride, width - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, width, H / stride, W / stride)."""
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.padding:
            x = F.pad(x, (0, 0, 0, 0, self.padding // 2, self.padding - self.padding // 2))
        return cast(Tensor, self.act2(out + x))


class CifarResNet(nn.Module):
    """Residual network of three stages; x (B, in_channels, H, W) in [0, 1] -> logits (B, num_classes).

    Args:
        num_blocks: n, blocks of every stage.
        num_classes: number of logits.
        in_channels: channels of the images.
        mean: see `build_model`.
        std: see `build_model`.
        width: channels of the first convolution and stage; the next two stages have 2 and 4 times as many.

    Raises:
        ValueError: for a mean or std that `Normalize` refuses.
    """

    def __init__(
        self,
        num_blocks: int,
        *,
        num_classes: int,
        in_channels: int,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        width: int = 16,
    ) -> None:
        super().__init__()
        self.normalize = Normalize(in_channels, mean, std)
        self.conv1, self.bn1 = conv3x3(in_channels, width), nn.BatchNorm2d(width)
        self.act1 = Site(width, stage=0, block=0)
        channels = width
        self.stages = ["layer1", "layer2", "layer3"]
        for i, name in enumerate(self.stages):
            blocks = []
            for j in range(num_blocks):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(CifarBlock(channels, width * 2**i, stride, stage=i + 1, block=j))
                channels = width * 2**i
            self.add_module(name, nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, H, W) in [0, 1] -> logits (B, num_classes)."""
        x = self.act1(self.bn1(self.conv1(self.normalize(x))))
        for name in self.stages:
            x = getattr(self, name)(x)
        return cast(Tensor, self.fc(torch.mean(x, dim=(2, 3))))
