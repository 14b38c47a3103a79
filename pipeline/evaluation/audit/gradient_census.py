"""8: a census of input gradients that are zero, not finite or lost to underflow: float32 against float64."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.evaluation.attacks import Problem
from pipeline.evaluation.audit.chunks import chunks
from pipeline.evaluation.audit.subject import FLOAT32_ONLY, Subject
from pipeline.evaluation.audit.verdict import judged_share, skipped
from pipeline.evaluation.records import Check

WARN, FAIL = 0.02, 0.2
"""An overconfident honest network loses a few, where 1 - p(y) drowns in rounding; the margin losses see them."""
_TINY = 1e-30
"""Below this a gradient is at the end of float32, where it loses its digits."""
_COSINE = 0.5


class _Counted(NamedTuple):
    """Per example, (B,): what its gradient is like."""

    dead: Tensor
    """Zero or not finite in float32."""
    unlike: Tensor
    """Unlike the float64 one."""
    zeros: Tensor
    """Share of pixels whose gradient is 0."""
    size: Tensor
    """Largest absolute value in float64."""


def check(subject: Subject) -> Check:
    """Share of the correct examples whose float32 gradient of the cross-entropy is no direction to follow."""
    if not len(subject.y):
        return skipped(8, "gradient_census", "no image is classified correctly")
    what = "have no usable float32 gradient: zero, not finite, or unlike the float64 one"
    try:
        found = _count(subject, subject.double)
    except FLOAT32_ONLY as error:
        what = f"have no usable float32 gradient (float64 is not to be had: {type(error).__name__})"
        found = _count(subject, None)
    details: dict[str, float | list[float]] = {"zero or not finite": float(found.dead.sum())}
    if len(found.size):
        details["log10 of the median size"] = float(found.size.clamp_min(1e-300).median().log10())
    details["share of zero pixels"] = float(found.zeros.mean())
    return judged_share(
        8, "gradient_census", int((found.dead | found.unlike).sum()), len(subject.y), warn=WARN, fail=FAIL,
        summary=what, details=details,
    )  # fmt: skip


def _count(subject: Subject, double: nn.Module | None) -> _Counted:
    """Over all correct images, with `double` as the float64 model; None leaves that comparison out."""
    parts = [_count_part(part, double) for part in chunks(subject.problem("census"))]
    return _Counted(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _count_part(part: Problem, double: nn.Module | None) -> _Counted:
    g = _gradient(part.model, part.x, part.y)
    dead = ~g.isfinite().all(1) | (g.abs().amax(1) < _TINY)
    zeros = (g == 0).double().mean(1)
    if double is None:
        return _Counted(dead, torch.zeros_like(dead), zeros, zeros[:0])
    exact = _gradient(double, part.x.double(), part.y)
    unlike = F.cosine_similarity(g.double(), exact, dim=1, eps=1e-300) < _COSINE
    return _Counted(dead, unlike, zeros, exact.abs().amax(1))


def _gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Gradient of the cross-entropy to the input, (B, C * H * W); zero where the graph does not reach the input."""
    x = x.detach().requires_grad_()
    loss = F.cross_entropy(model(x), y, reduction="sum")
    if not loss.requires_grad:
        return torch.zeros_like(x).flatten(1)
    (g,) = torch.autograd.grad(loss, x, allow_unused=True)
    return torch.zeros_like(x).flatten(1) if g is None else g.flatten(1)
