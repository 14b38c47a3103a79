"""Training on clean images, and on the adversarial examples of PGD or of one step, by cross-entropy.

standard  CE(z(x), y)
pgd_at    CE(z(x_adv), y), x_adv by PGD                                       Madry et al., arXiv 1706.06083
fgsm_rs   CE(z(x_adv), y), x_adv one step of step_factor * eps from U(-eps, eps)   Wong et al., arXiv 2001.03994
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.training.attacks.pgd import Model
from pipeline.training.methods.base import Attacking, Cost, Terms, cross_entropy


@dataclass(frozen=True)
class Standard:
    """Cross-entropy on clean images."""

    smoothing: float

    @property
    def cost(self) -> Cost:
        """3 forward passes."""
        return Cost(0, 0, 1)

    def perturb(self, model: Model, x: Tensor, y: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        """The images themselves."""
        del model, y, strength, generator
        return x

    def terms(self, model: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> Terms:
        """Cross-entropy on x."""
        del x_adv
        z = model(x)
        return Terms(cross_entropy(z, y, self.smoothing), clean=z)


@dataclass(frozen=True)
class Adversarial(Attacking):
    """Cross-entropy on adversarial images alone: PGD training, and with a one-step attack FGSM-RS."""

    smoothing: float

    @property
    def cost(self) -> Cost:
        """2 K + 3 forward passes."""
        return self.attack.cost(1)

    def terms(self, model: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> Terms:
        """Cross-entropy on x_adv."""
        del x
        z = model(x_adv)
        return Terms(cross_entropy(z, y, self.smoothing), adv=z)
