"""MobileNetV2 (Sandler et al., arXiv 1801.04381). Names of weights are torchvision's; 3,504,872 parameters for 1000
classes.

stem="cifar" leaves out the strides of the first convolution and of the second setting, as is usual for 32 x 32 images.
The published network has ReLU6: activation="relu6" gives torchvision's outputs.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from sparta_models.models.common import Normalize, check_stem, conv1x1, conv3x3, initialise
from sparta_models.sites import Site

_SETTINGS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""(expansion, channels, blocks, stride of the first block)."""


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution and projection, with a shortcut where the shapes agree.

    Args:
        in_channels: C of the input.
        out_channels: channels of the output.
        stride: of the depthwise convolution.
        expansion: channels of the depthwise convolution over in_channels; 1: there is no expansion.
        stage: resolution stage of its sites, from 1.
        block: its number within the stage, from 0.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, expansion: int, *, stage: int, block: int
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(_norm_act(conv1x1(in_channels, hidden), stage=stage, block=block))
        layers.append(_norm_act(conv3x3(hidden, hidden, stride, groups=hidden), stage=stage, block=block))
        layers += [conv1x1(hidden, out_channels), nn.BatchNorm2d(out_channels)]
        self.conv = nn.Sequential(*layers)
        self.shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, out_channels, H / stride, W / stride)."""
        return cast(Tensor, x + self.conv(x) if self.shortcut else self.conv(x))


def _norm_act(conv: nn.Conv2d, *, stage: int, block: int) -> nn.Sequential:
    channels = conv.out_channels
    return nn.Sequential(conv, nn.BatchNorm2d(channels), Site(channels, stage=stage, block=block))


class MobileNetV2(nn.Module):
    """x (B, in_channels, H, W) in [0, 1] -> logits (B, num_classes); a stage begins at each stride of the published
    net.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        mean: see `build_model`.
        std: see `build_model`.
        width_mult: all channels over the published ones; they are rounded to multiples of 8, and the last layer's 1,280
            get no fewer.
        stem: "cifar" or "imagenet", see above.
        dropout: share of the features that is zeroed in training, before the linear layer.

    Raises:
        ValueError: for an unknown stem, a dropout outside [0, 1], or a mean or std that `Normalize` refuses.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        width_mult: float = 1.0,
        stem: str = "cifar",
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        check_stem(stem)
        self.normalize = Normalize(in_channels, mean, std)
        channels, last = _multiple(32 * width_mult), _multiple(1280 * max(1.0, width_mult))
        layers: list[nn.Module] = [
            _norm_act(conv3x3(in_channels, channels, 1 if stem == "cifar" else 2), stage=0, block=0)
        ]
        stage, block = 1, 0
        for i, (expansion, out, blocks, first_stride) in enumerate(_SETTINGS):
            stage, block = (stage + 1, 0) if first_stride == 2 else (stage, block)
            for j in range(blocks):
                stride = first_stride if j == 0 and not (stem == "cifar" and i == 1) else 1
                out_channels = _multiple(out * width_mult)
                layers.append(InvertedResidual(channels, out_channels, stride, expansion, stage=stage, block=block))
                channels, block = out_channels, block + 1
        layers.append(_norm_act(conv1x1(channels, last), stage=stage, block=block))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, num_classes))
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, H, W) in [0, 1] -> logits (B, num_classes)."""
        return cast(Tensor, self.classifier(torch.mean(self.features(self.normalize(x)), dim=(2, 3))))


def _multiple(channels: float, of: int = 8) -> int:
    """Round channels to a multiple of 8, never down by more than a tenth."""
    rounded = max(of, int(channels + of / 2) // of * of)
    return rounded + of if rounded < 0.9 * channels else rounded
