"""What an attack maximises: one number per example from its logits.

z (B, C) logits, y (B,) labels or (B, C) soft labels, t (B,) targets, pi_i the index of the i-th largest logit.
  ce      -log p_y                                                       Goodfellow et al., arXiv 1412.6572
  margin  max_{i != y} z_i - z_y                                         Carlini and Wagner, arXiv 1608.04644
  dlr     -(z_y - max_{i != y} z_i) / (z_pi1 - z_pi3)                    Croce and Hein, arXiv 2003.01690
  kl      KL(p(x) || p(x_adv)), p(x) the clean prediction                Zhang et al., arXiv 1901.08573
  targeted: ce log p_t; margin z_t - max_{i != t} z_i; dlr -(z_y - z_t) / (z_pi1 - (z_pi3 + z_pi4) / 2)
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Objective = Callable[[Tensor], Tensor]
_TINY = 1e-12  # keeps the quotient of dlr finite when the leading logits coincide


def _largest_other(z: Tensor, y: Tensor) -> Tensor:
    return z.scatter(1, y[:, None], -torch.inf).amax(1)


def _at(z: Tensor, y: Tensor) -> Tensor:
    return z.gather(1, y[:, None]).squeeze(1)


def _cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="none")


def _margin(z: Tensor, y: Tensor) -> Tensor:
    return _largest_other(z, y) - _at(z, y)


def _dlr(z: Tensor, y: Tensor) -> Tensor:
    top = _top(z, 3)
    return _margin(z, y) / (top[:, 0] - top[:, 2] + _TINY)


def _targeted_dlr(z: Tensor, y: Tensor, t: Tensor) -> Tensor:
    top = _top(z, 4)
    return -(_at(z, y) - _at(z, t)) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + _TINY)


def _top(z: Tensor, count: int) -> Tensor:
    if z.shape[1] < count:
        raise ValueError(f'loss "dlr" expected at least {count} classes, got {z.shape[1]}; use loss="margin"')
    return z.topk(count, dim=1).values


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": _cross_entropy, "margin": _margin, "dlr": _dlr}
"""Untargeted objectives: (z (B, C), y) -> (B,)."""

TARGETED_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ce": lambda z, _, t: -_cross_entropy(z, t),
    "margin": lambda z, _, t: -_margin(z, t),
    "dlr": _targeted_dlr,
}
"""Targeted objectives: (z (B, C), y, t) -> (B,)."""


def kl_from(reference: Tensor) -> Objective:
    """KL(p || q) per example, p the prediction behind the logits `reference` (B, C), q that of the argument."""
    log_p = F.log_softmax(reference.detach(), 1)
    return lambda z: F.kl_div(F.log_softmax(z, 1), log_p, reduction="none", log_target=True).sum(1)


def objective(loss: str, y: Tensor, *, targets: Tensor | None = None, reference: Tensor | None = None) -> Objective:
    """The objective named `loss`, as a function of the logits (B, C) -> (B,).

    y: (B,) int64 labels, or (B, C) probabilities for "ce" and "kl". targets: (B,) classes to reach.
    reference: (B, C) clean logits, needed by "kl". Raises ValueError for an unknown loss or one without that form.
    """
    if loss == "kl":
        if targets is not None or reference is None:
            raise ValueError('loss "kl" expected clean logits and no targets; for a targeted attack use loss="ce"')
        return kl_from(reference)
    if loss not in LOSSES:
        raise ValueError(f"unknown attack loss {loss!r}; known: {', '.join(sorted([*LOSSES, 'kl']))}")
    if y.dim() == 2 and loss != "ce":
        raise ValueError(f'loss {loss!r} expected labels of shape (B,), got {tuple(y.shape)}; use loss="ce" or "kl"')
    if targets is None:
        untargeted = LOSSES[loss]
        return lambda z: untargeted(z, y)
    targeted, t = TARGETED_LOSSES[loss], targets
    return lambda z: targeted(z, y, t)
