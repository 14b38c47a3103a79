"""8: a census of input gradients that are zero, not finite or lost to underflow: float32 against float64."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.evaluation.audit.subject import Subject, judged_share
from pipeline.evaluation.records import Check

WARN, FAIL = 0.02, 0.2
"""An overconfident honest network loses a few, where 1 - p(y) drowns in rounding; the margin losses see them."""
_TINY = 1e-30
"""Below this the squares that a norm sums up are no longer float32 numbers."""
_COSINE = 0.5


def check(subject: Subject) -> Check:
    """Share of examples whose float32 gradient of the cross-entropy is no direction to follow."""
    g = _gradient(subject.model, subject.x, subject.y)
    dead = ~g.isfinite().all(1) | (g.abs().amax(1) < _TINY)
    details: dict[str, float | list[float]] = {"zero or not finite": float(dead.sum())}
    try:
        exact = _gradient(subject.double, subject.x.double(), subject.y)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        what = f"have no usable float32 gradient (float64 is not to be had: {type(error).__name__})"
    else:
        what = "have no usable float32 gradient: zero, not finite, or unlike the float64 one"
        dead |= F.cosine_similarity(g.double(), exact, dim=1, eps=1e-300) < _COSINE
        details["log10 of the median size"] = float(exact.abs().amax(1).clamp_min(1e-300).median().log10())
    details["share of zero pixels"] = float((g == 0).float().mean())
    return judged_share(
        8, "gradient_census", int(dead.sum()), subject.n, warn=WARN, fail=FAIL, summary=what, details=details
    )


def _gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Gradient of the cross-entropy to the input, (B, C * H * W); zero where the graph does not reach the input."""
    x = x.detach().requires_grad_()
    loss = F.cross_entropy(model(x), y, reduction="sum")
    if not loss.requires_grad:
        return torch.zeros_like(x).flatten(1)
    (g,) = torch.autograd.grad(loss, x, allow_unused=True)
    return torch.zeros_like(x).flatten(1) if g is None else g.flatten(1)
