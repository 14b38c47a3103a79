"""All networks by name."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from sparta_models.models.common import Normalize
from sparta_models.models.mobilenet import MobileNetV2
from sparta_models.models.preact import PreActResNet
from sparta_models.models.resnet import BasicBlock, Bottleneck, ResNet
from sparta_models.models.resnet_cifar import CifarResNet
from sparta_models.models.vgg import VGG
from sparta_models.sites import ActivationSpec, install

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": partial(CifarResNet, 1),
    "resnet14": partial(CifarResNet, 2),
    "resnet20": partial(CifarResNet, 3),
    "resnet32": partial(CifarResNet, 5),
    "resnet56": partial(CifarResNet, 9),
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet34": partial(ResNet, BasicBlock, (3, 4, 6, 3)),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
    "preactresnet18": partial(PreActResNet, (2, 2, 2, 2), widen=1, width=64),
    "wideresnet28_10": partial(PreActResNet, (4, 4, 4), widen=10, width=16),
    "wideresnet34_10": partial(PreActResNet, (5, 5, 5), widen=10, width=16),
    "vgg16_bn": VGG,
    "mobilenet_v2": MobileNetV2,
}
"""Name -> constructor of a network with empty sites."""


_POSITIVE = ("num_classes", "in_channels", "width", "width_mult", "widen")


def build_model(
    name: str,
    *,
    activation: str | Mapping[str, Any] | ActivationSpec = "sparta",
    num_classes: int = 10,
    in_channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a network: images (B, in_channels, H, W) in [0, 1] -> logits (B, num_classes).

    Args:
        name: a name in `MODELS`.
        activation: a name in `ACTIVATIONS`, or a mapping {"name": ..., "sharing": "site" | "stage" | "network",
        **options}.
        num_classes: number of logits.
        in_channels: channels of the images.
        mean: per channel, in pixel units of [0, 1]; the first layer subtracts it. None for zeros.
        std: likewise; the first layer divides by it. None for ones.
        **kwargs: the network's own options: `width` (channels of the first convolution; `width_mult` for MobileNetV2),
            `stem` ("cifar" or "imagenet"; ResNet-18 / 34 / 50, VGG, MobileNetV2), `widen` (WideResNets).

    Raises:
        ValueError: for an unknown name, or a value out of range.
        TypeError: for an option that the network or the activation doesn't have, or one that is no number.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(sorted(MODELS))}")
    for what, value in {"num_classes": num_classes, "in_channels": in_channels, **kwargs}.items():
        if what in _POSITIVE and not isinstance(value, int | float):
            raise TypeError(f"expected a number for {what}, got {value!r}")
        if what in _POSITIVE and not value > 0:
            raise ValueError(f"expected {what} > 0, got {value}")
    model = MODELS[name](num_classes=num_classes, in_channels=in_channels, mean=mean, std=std, **kwargs)
    install(model, activation)
    object.__setattr__(model, "_architecture", name)
    return model


__all__ = ["MODELS", "Normalize", "build_model"]
