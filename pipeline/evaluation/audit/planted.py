"""Defences that are broken on purpose, and honest models beside them: what the audit itself is judged by.

All are small CNNs on scikit-learn's handwritten digits, trained in seconds. Each broken one makes some attack lie, by
one known trick.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.training.attacks import fgsm, pgd
from sparta_models import ActivationBank, build_activation, convert

EPS = 0.1
WIDTH = 16
LEAKING_EPS = 0.4
"""FGSM training overfits to its own step, and leaks labels, at large radii only on images this small."""
NUM_TRAIN = 1400


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 8, 8) in [0, 1] and labels (N,), the last ones for testing."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def load(cls) -> "Digits":
        """The 1,797 digits of scikit-learn, in their order."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        x = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
        y = torch.tensor(digits.target, dtype=torch.int64)
        return cls(x[:NUM_TRAIN], y[:NUM_TRAIN], x[NUM_TRAIN:], y[NUM_TRAIN:])


def small_cnn(activation: Callable[[int], nn.Module], *, width: int = WIDTH) -> nn.Module:
    """Two convolutions and a linear layer for (B, 1, 8, 8)."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), activation(width),
        nn.Conv2d(width, 2 * width, 3, padding=1, stride=2), activation(2 * width),
        nn.Flatten(), nn.Linear(32 * width, 10),
    )  # fmt: skip


def fit(
    model: nn.Module, digits: Digits, *, adversary: str, epochs: int = 12, eps: float = EPS, seed: int = 0
) -> nn.Module:
    """Train with Adam on clean images ("none"), FGSM's ("fgsm") or PGD's ("pgd"); returns the model in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(epochs):
        for batch in torch.chunk(torch.randperm(NUM_TRAIN, generator=generator), NUM_TRAIN // 100):
            x, y = digits.train_x[batch], digits.train_y[batch]
            if adversary == "fgsm":
                x = fgsm(model, x, y, eps=eps)
            elif adversary == "pgd":
                x = pgd(model, x, y, eps=eps, step_size=eps / 2, steps=3, generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    optimizer.zero_grad()
    return model.eval()


class _Killed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.zeros_like(gradients[0])


class _Shattered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        g = gradients[0]
        noise: Tensor = torch.randn(g.shape, generator=torch.Generator().manual_seed(0)).to(g) * g.norm()
        return noise


class Lambda(nn.Module):
    """`model` between a function of its input and one of its logits."""

    def __init__(
        self, model: nn.Module, *, before: Callable[[Tensor], Tensor] | None = None,
        after: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 10) of x (B, 1, 8, 8)."""
        logits: Tensor = self.model(self.before(x) if self.before else x)
        return self.after(logits) if self.after else logits


class KWTA(nn.Module):
    """k-winners-take-all (Xiao et al., 2020, arXiv 1905.10510): the largest of an image's activations remain."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) with all but its largest values set to 0."""
        flat = x.flatten(1)
        kept = max(1, int(self.share * flat.shape[1]))
        threshold = flat.topk(kept, dim=1).values[:, -1:]
        return (flat * (flat >= threshold)).view_as(x)


class BatchCentred(nn.Module):
    """Subtracts the batch's mean from each feature map: an image's logits depend on its company."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) centred over the batch."""
        return x - x.mean(dim=0, keepdim=True)


class Decoy(nn.Module):
    """The class of `model` beside a margin that has nothing to do with it: gradients are exact, smooth, and astray."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.slopes: Tensor
        self.register_buffer("slopes", torch.randn(10, 64, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 10) of x (B, 1, 8, 8)."""
        top = self.model(x).argmax(1)
        margin = 1 + torch.sigmoid((self.slopes[top] * x.flatten(1)).sum(1) / 4)
        return F.one_hot(top, 10).to(x) * margin[:, None]


class Remembers(nn.Module):
    """A defence by the history of queries: an image near one of the first that it was asked gets that one's answer."""

    def __init__(self, model: nn.Module, radius: float) -> None:
        super().__init__()
        self.model, self.radius = model, radius
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 10) of x (B, 1, 8, 8)."""
        flat = x.flatten(1)
        if self.seen is None and len(x) > 2:
            self.seen = flat.detach().float()
        if self.seen is None:
            logits: Tensor = self.model(x)
            return logits
        distance, nearest = (flat.detach()[:, None] - self.seen.to(x)).abs().amax(2).min(1)
        near = (distance < self.radius)[:, None]
        remembered: Tensor = self.model(torch.where(near, self.seen.to(x)[nearest], flat).view_as(x))
        return remembered + 1e-3 * flat.sum(1, keepdim=True) * torch.arange(10).to(x)


def _quantised(x: Tensor) -> Tensor:
    return (x * 3).round() / 3


def _noisy(logits: Tensor) -> Tensor:
    return logits + logits.detach().std() * torch.randn_like(logits)


def relu(_: int) -> nn.Module:
    """A plain ReLU."""
    return nn.ReLU()


def named(name: str, **options: Any) -> Callable[[int], nn.Module]:
    """A registered activation as a function of the number of channels."""
    return lambda num_channels: build_activation(name, num_channels, **options)


@dataclass(frozen=True)
class Case:
    """How to make a model, the radius (linf) at which it is audited, and how to make its reference, if it has one."""

    make: Callable[[Digits], nn.Module]
    eps: float = EPS
    reference: Callable[[Digits], nn.Module] | None = None


def _trick(
    *, before: Callable[[Tensor], Tensor] | None = None, after: Callable[[Tensor], Tensor] | None = None
) -> Case:
    """A trick around an ordinary network that was trained without it."""

    def make(digits: Digits) -> nn.Module:
        return Lambda(_network(relu, "none").make(digits), before=before, after=after).eval()

    return Case(make)


def _network(activation: Callable[[int], nn.Module], adversary: str, *, epochs: int = 12, eps: float = EPS) -> Case:
    def make(digits: Digits) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return fit(small_cnn(activation), digits, adversary=adversary, epochs=epochs, eps=eps)

    return Case(make, eps)


def _transferred(digits: Digits) -> nn.Module:
    """An activation that was trained in one network and frozen into another, which was trained around it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        source, target = (convert(small_cnn(relu), "sparta", input_shape=(1, 8, 8)) for _ in range(2))
        ActivationBank.from_model(fit(source, digits, adversary="pgd")).apply_to(target, freeze=True)
        return fit(target, digits, adversary="pgd")


def _one_saturated(num_channels: int) -> nn.Module:
    """Ordinary gates at the first site, saturated ones at the second, which has twice the channels."""
    return build_activation("sparta", num_channels, beta=1e4 if num_channels > WIDTH else 1.0)


HONEST: Mapping[str, Case] = {
    "ReLU": _network(relu, "pgd"),
    "SiLU": _network(named("silu"), "pgd"),
    "Sparta": _network(named("sparta"), "pgd"),
    "Sparta, depthwise": _network(named("sparta", variant="depthwise", kernel_size=3), "pgd"),
    "Sparta, sharp gates": _network(named("sparta", init="relu"), "pgd"),
    "Sparta, with a reference": replace(
        _network(named("sparta"), "pgd"), reference=lambda digits: _network(relu, "pgd").make(digits)
    ),
    "Sparta, frozen and transferred": Case(_transferred),
    "ReLU and max pooling": _network(lambda _: nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 1, 1)), "pgd"),
    "ReLU, not robust": _network(relu, "none"),
    "Sparta, not robust": _network(named("sparta"), "none"),
}
"""Models without a trick, which must pass."""

PLANTED: Mapping[str, Case] = {
    "gradient killer": _trick(before=_Killed.apply),
    "detached input": _trick(before=lambda x: x.detach()),
    "shattered gradient": _trick(before=_Shattered.apply),
    "k-WTA": _network(lambda _: KWTA(0.05), "none"),
    "k-WTA, adversarially trained": _network(lambda _: KWTA(0.05), "pgd"),
    "saturated gates": _network(named("sparta", beta=1e4), "none"),
    "one saturated site": _network(_one_saturated, "none"),
    "randomised logits": _trick(after=_noisy),
    "batch-dependent": _network(lambda _: nn.Sequential(BatchCentred(), nn.ReLU()), "none"),
    "label leaking": _network(relu, "fgsm", epochs=40, eps=LEAKING_EPS),
    "quantised input": _trick(before=_quantised),
    "decoy margin": Case(lambda digits: Decoy(_network(relu, "none").make(digits)).eval()),
    "remembered queries": Case(lambda digits: Remembers(_network(relu, "none").make(digits), EPS + 1e-3).eval()),
    "underflowing logits": _trick(after=lambda logits: 1e4 * logits),
}
"""Broken defences, which must be flagged."""
