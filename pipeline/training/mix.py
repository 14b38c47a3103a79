"""Mixtures of two images and of their labels.

lam ~ Beta(alpha, alpha), pi a permutation of the batch:
  mixup   x' = lam x + (1 - lam) x[pi]                                      Zhang et al., arXiv 1710.09412
  cutmix  x' = x, but a rectangle of area (1 - lam) H W from x[pi]; lam is then the area that is left
                                                                           Yun et al., arXiv 1905.04899
  y' = lam onehot(y) + (1 - lam) onehot(y[pi])
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.training import MixConfig


def mix_batch(
    config: MixConfig, x: Tensor, y: Tensor, *, num_classes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mixed images (B, C, H, W) and label probabilities (B, num_classes).

    generator: of the CPU, because share and rectangle decide sizes: the host must know them without asking a device.
    """
    lam = _beta(config.alpha, generator)
    other = torch.randperm(len(x), generator=generator).to(x.device, non_blocking=True)
    if config.kind == "mixup":
        mixed = torch.lerp(x[other], x, lam)
    else:
        mixed, lam = _paste(x, x[other], lam, generator)
    one_hot = F.one_hot(y, num_classes).to(x.dtype)
    return mixed, torch.lerp(one_hot[other], one_hot, lam)


def _beta(alpha: float, generator: torch.Generator) -> float:
    """A draw of Beta(alpha, alpha) by way of two Gamma(alpha) draws."""
    shape = torch.full((2,), alpha, dtype=torch.float64)
    first, second = torch._standard_gamma(shape, generator=generator).tolist()
    return float(first / (first + second)) if first + second > 0 else 0.5


def _paste(x: Tensor, source: Tensor, lam: float, generator: torch.Generator) -> tuple[Tensor, float]:
    height, width = x.shape[-2:]
    side = math.sqrt(1 - lam)
    centre = torch.rand(2, generator=generator).tolist()
    (top, bottom), (left, right) = (
        _interval(share, side, length) for share, length in zip(centre, (height, width), strict=True)
    )
    mixed = x.clone()
    mixed[..., top:bottom, left:right] = source[..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _interval(share: float, side: float, length: int) -> tuple[int, int]:
    centre, half = int(share * length), int(side * length) // 2
    return max(centre - half, 0), min(centre + half, length)
