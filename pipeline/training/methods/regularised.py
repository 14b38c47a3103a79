"""Training on clean and adversarial images together, by one concatenated forward pass.

p(x) = softmax(z(x)), KL(p || q) = sum_k p_k log(p_k / q_k), gradients flow through both sides.
  trades  CE(z(x), y) + beta KL(p(x) || p(x_adv))                                       Zhang et al., arXiv 1901.08573
  mart    -log p_y(x_adv) - log(1 - max_{k != y} p_k(x_adv)) + beta KL(p(x) || p(x_adv)) (1 - p_y(x))
                                                                                        Wang et al., ICLR 2020
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.training.attacks.pgd import Model
from pipeline.training.methods.base import Attacking, Cost, Terms, cross_entropy, forward_both

_MARGIN = 1.0001  # of the authors' code: keeps the logarithm of 1 - p finite


def _kl(clean: Tensor, adv: Tensor) -> Tensor:
    log_p, log_q = F.log_softmax(clean, 1), F.log_softmax(adv, 1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


@dataclass(frozen=True)
class Trades(Attacking):
    """Trade-off between clean accuracy and the stability of predictions."""

    beta: float
    smoothing: float

    @property
    def cost(self) -> Cost:
        """2 K + 7 forward passes with the KL attack."""
        return self.attack.cost(2)

    def terms(self, model: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> Terms:
        """Cross-entropy on x + beta KL."""
        clean, adv = forward_both(model, x, x_adv)
        return Terms(cross_entropy(clean, y, self.smoothing) + self.beta * _kl(clean, adv), adv, clean)


@dataclass(frozen=True)
class Mart(Attacking):
    """Misclassification-aware training; y are labels (B,)."""

    beta: float

    @property
    def cost(self) -> Cost:
        """2 K + 6 forward passes."""
        return self.attack.cost(2)

    def terms(self, model: Model, x: Tensor, x_adv: Tensor, y: Tensor) -> Terms:
        """Boosted cross-entropy on x_adv + beta KL, weighted by how wrong the clean prediction is."""
        clean, adv = forward_both(model, x, x_adv)
        p_adv = F.softmax(adv, 1)
        runner_up = p_adv.scatter(1, y[:, None], -torch.inf).amax(1)
        boosted = F.cross_entropy(adv, y, reduction="none") - torch.log(_MARGIN - runner_up)
        doubt = 1 - F.softmax(clean, 1).gather(1, y[:, None]).squeeze(1)
        return Terms(boosted + self.beta * _kl(clean, adv) * doubt, adv, clean)
