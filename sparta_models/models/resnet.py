"""ResNet-18 / 34 / 50 with a CIFAR or an ImageNet stem (He et al., arXiv 1512.03385). Names of weights are
torchvision's.

The stride of a bottleneck is at its 3 x 3 convolution (torchvision's "V1.5").
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from sparta_models.models.common import Normalize, check_stem, conv1x1, conv3x3, initialise
from sparta_models.sites import Site


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut.

    Args:
        in_channels: C of the input.
        width: channels of both convolutions, and of the output.
        stride: of the first convolution.
        stage: resolution stage of its sites, from 1.
        block: its number within the stage, from 0.
    """

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, *, stage: int, block: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(in_channels, width, stride), nn.BatchNorm2d(width)
        self.act1 = Site(width, stage=stage, block=block)
        self.conv2, self.bn2 = conv3x3(width, width), nn.BatchNorm2d(width)
        self.downsample = _projection(in_channels, width, stride)
        self.act2 = Site(width, stage=stage, block=block)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, width, H / stride, W / stride)."""
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return cast(Tensor, self.act2(out + (x if self.downsample is None else self.downsample(x))))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolution and a shortcut.

    Args:
        in_channels: C of the input.
        width: channels of the first two convolutions; the output has four times as many.
        stride: of the 3 x 3 convolution.
        stage: resolution stage of its sites, from 1.
        block: its number within the stage, from 0.
    """

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, *, stage: int, block: int) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1, self.bn1 = conv1x1(in_channels, width), nn.BatchNorm2d(width)
        self.act1 = Site(width, stage=stage, block=block)
        self.conv2, self.bn2 = conv3x3(width, width, stride), nn.BatchNorm2d(width)
        self.act2 = Site(width, stage=stage, block=block)
        self.conv3, self.bn3 = conv1x1(width, out_channels), nn.BatchNorm2d(out_channels)
        self.downsample = _projection(in_channels, out_channels, stride)
        self.act3 = Site(out_channels, stage=stage, block=block)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, 4 width, H / stride, W / stride)."""
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.act2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return cast(Tensor, self.act3(out + (x if self.downsample is None else self.downsample(x))))


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))


class ResNet(nn.Module):
    """Residual network of four stages; x (B, in_channels, H, W) in [0, 1] -> logits (B, num_classes).

    Args:
        block: kind of the blocks.
        num_blocks: blocks of each stage.
        num_classes: number of logits.
        in_channels: channels of the images.
        mean: see `build_model`.
        std: see `build_model`.
        width: channels of the first convolution; the blocks of stage i, from 0, have the width `width * 2**i`.
        stem: "cifar", a 3 x 3 convolution, or "imagenet", 7 x 7 of stride 2 and a maximum pool: maps of H / 4, W / 4.

    Raises:
        ValueError: for an unknown stem, or a mean or std that `Normalize` refuses.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        num_blocks: Sequence[int],
        *,
        num_classes: int,
        in_channels: int,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        width: int = 64,
        stem: str = "cifar",
    ) -> None:
        super().__init__()
        check_stem(stem)
        self.normalize = Normalize(in_channels, mean, std)
        self.conv1 = (
            conv3x3(in_channels, width)
            if stem == "cifar"
            else nn.Conv2d(in_channels, width, 7, 2, padding=3, bias=False)
        )
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = Site(width, stage=0, block=0)
        self.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, stride=2, padding=1)
        channels = width
        self.stages = [f"layer{i + 1}" for i in range(len(num_blocks))]
        for i, name in enumerate(self.stages):
            out = width * 2**i
            blocks = []
            for j in range(num_blocks[i]):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(block(channels, out, stride, stage=i + 1, block=j))
                channels = out * block.expansion
            self.add_module(name, nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, H, W) in [0, 1] -> logits (B, num_classes)."""
        x = self.maxpool(self.act1(self.bn1(self.conv1(self.normalize(x)))))
        for name in self.stages:
            x = getattr(self, name)(x)
        return cast(Tensor, self.fc(torch.mean(x, dim=(2, 3))))
