"""VGG-16 with batch norm (Simonyan and Zisserman, arXiv 1409.1556). Names of weights are torchvision's.

stem="imagenet" ends in torchvision's classifier of three linear layers (138,365,992 parameters for 1000 classes), whose
two ReLUs act on vectors, have no positions and are no sites; stem="cifar" ends in the mean over positions and
one linear layer (14,723,136 parameters and 5,130 for 10 classes).
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from sparta_models.models.common import Normalize, check_stem, initialise
from sparta_models.sites import Site

_STAGES = ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8))
"""Channels of each convolution in units of the width."""


class VGG(nn.Module):
    """Stages of 3 x 3 convolutions with a maximum pool behind each; x (B, in_channels, H, W) in [0, 1] -> logits.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        mean: see `build_model`.
        std: see `build_model`.
        width: channels of the first stage; the last two have 8 times as many.
        stem: "cifar" or "imagenet": which classifier it ends in, see above.

    Raises:
        ValueError: for an unknown stem, or a mean or std that `Normalize` refuses.
    """

    def __init__(
        self,
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
        layers: list[nn.Module] = []
        channels = in_channels
        for stage, units in enumerate(_STAGES):
            for block, unit in enumerate(units):
                layers += [nn.Conv2d(channels, unit * width, 3, padding=1), nn.BatchNorm2d(unit * width)]
                layers.append(Site(unit * width, stage=stage + 1, block=block))
                channels = unit * width
            # ceil_mode keeps maps that are one pixel wide, so that images under 32 x 32 pass.
            layers.append(nn.MaxPool2d(2, 2, ceil_mode=stem == "cifar"))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1 if stem == "cifar" else 7)
        self.classifier = nn.Linear(channels, num_classes) if stem == "cifar" else _classifier(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, H, W) in [0, 1] -> logits (B, num_classes)."""
        x = self.avgpool(self.features(self.normalize(x)))
        return cast(Tensor, self.classifier(torch.flatten(x, 1)))


def _classifier(channels: int, num_classes: int) -> nn.Sequential:
    hidden = 8 * channels
    return nn.Sequential(
        nn.Linear(channels * 49, hidden),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(hidden, num_classes),
    )
