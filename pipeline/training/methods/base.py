"""What a training method is: how it makes its examples, and the loss of every example."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.base import ThreatModel
from pipeline.config.training import AttackConfig
from pipeline.training.attacks import default_step_size, pgd
from pipeline.training.attacks.pgd import Model, Start


@dataclass(frozen=True)
class Terms:
    """Per example: loss (B,), and the logits (B, C) behind it, where the method computes them anyway."""

    loss: Tensor
    adv: Tensor | None = None
    clean: Tensor | None = None


@dataclass(frozen=True)
class Cost:
    """Passes of a training step through the network, over one batch: the arithmetic that no loop can do without."""

    attack_steps: int
    """Forward and backward to the input."""
    forwards: int
    """Forward without backward: clean logits, the ranking of restarts."""
    batches: int
    """Forward and full backward."""

    @property
    def forward_equivalents(self) -> int:
        """In forward passes: a backward to the input is 1 more, a full one 2 more."""
        return 2 * self.attack_steps + self.forwards + 3 * self.batches


class Method(Protocol):
    """A training method. y: (B,) labels, or (B, C) probabilities where the images are mixed."""

    @property
    def cost(self) -> Cost:
        """The least a training step can cost."""

    def perturb(self, model: Model, x: Tensor, y: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        """Training examples (B, C, H, W) from images x; strength in [0, 1] scales eps and the step."""

    def terms(self, model: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> Terms:
        """The loss of every example, with a graph back to the parameters of `model`."""


@dataclass(frozen=True)
class Attack:
    """A configured PGD within a threat."""

    threat: ThreatModel
    config: AttackConfig

    def cost(self, batches: int) -> Cost:
        """Cost of a step that makes its examples so, and then trains on so many batches."""
        restarts = self.config.restarts
        forwards = (self.config.loss == "kl") + (restarts if restarts > 1 else 0)
        return Cost(restarts * self.config.steps, forwards, batches)

    def __call__(self, model: Model, x: Tensor, y: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        """Adversarial images, with eps and step scaled by `strength`."""
        config, eps = self.config, self.threat.eps * strength
        step = default_step_size(eps, config.steps) if config.step_size is None else config.step_size * strength
        start: Start = False if config.start == "none" else config.start
        return pgd(
            model,
            x,
            y,
            eps=eps,
            step_size=step,
            steps=config.steps,
            norm=self.threat.norm,
            loss=config.loss,
            random_start=start,
            restarts=config.restarts,
            generator=generator,
            step_rule=config.step_rule,
            bn=config.bn,
        )


@dataclass(frozen=True)
class Attacking:
    """What the methods have in common whose examples an attack makes."""

    attack: Attack

    def perturb(self, model: Model, x: Tensor, y: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        """Adversarial images of the attack."""
        return self.attack(model, x, y, strength, generator)


def cross_entropy(z: Tensor, y: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy (B,) of logits z (B, C) with labels or probabilities y, smoothed (arXiv 1512.00567)."""
    return F.cross_entropy(z, y, reduction="none", label_smoothing=smoothing)


def forward_both(model: Model, x: Tensor, x_adv: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of clean and of adversarial images by one forward pass; batch statistics are those of both together."""
    clean, adv = model(torch.cat((x, x_adv))).chunk(2)
    return clean, adv
