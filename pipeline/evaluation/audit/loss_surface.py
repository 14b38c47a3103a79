"""14: the loss is smooth on the scale of eps: along a line its slope changes little from one point to the next.

For the margin f at evenly spaced points t of the line x + t v, |v| = eps, the roughness is
sum |f'' differences| / sum |f' differences| = sum |f(t+) - 2 f(t) + f(t-)| / sum |f(t+) - f(t)|:
about 2 / points for a smooth curve, about 2 for steps and noise.
"""

import torch
from torch import Tensor

from pipeline.evaluation.audit.subject import Subject
from pipeline.evaluation.audit.verdict import judged, largest, skipped
from pipeline.evaluation.records import Check
from pipeline.training.attacks import LOSSES, NORMS

WARN, FAIL = 0.4, 0.8
_FLAT = 1e-5
"""A line on which f varies less than this share of the logits' spread is flat, not rough: it shows rounding alone."""


def check(subject: Subject) -> Check:
    """Figure: median roughness, the worse of a line to the adversarial image and one in a random direction."""
    probed = subject.effort.num_probed
    x, y = subject.x[:probed], subject.y[:probed]
    if not len(x):
        return skipped(14, "loss_surface", "no image is classified correctly")
    ends = {"adversarial": subject.white_adv[:probed], "random": random_end(subject, x)}
    found = {name: float(_roughness(subject, x, y, end).median()) for name, end in ends.items()}
    return judged(
        14, "loss_surface", largest(found.values()), warn=WARN, fail=FAIL,
        summary="median roughness of the margin along lines of length eps (smooth: near 0, steps or noise: near 2)",
        details=dict(found),
    )  # fmt: skip


def random_end(subject: Subject, x: Tensor) -> Tensor:
    """For each image x (B, C, H, W) a point at distance eps in a random direction, clipped to [0, 1]."""
    v = torch.randn(x.shape, generator=subject.problem("surface").generator()).to(x)
    return (x + subject.threat.eps * NORMS[subject.threat.norm].ascent(v)).clamp(0, 1)


def _roughness(subject: Subject, x: Tensor, y: Tensor, end: Tensor) -> Tensor:
    """(B,)"""
    with torch.no_grad():
        line = torch.linspace(0, 1, subject.effort.line_points).tolist()
        logits = [subject.model(torch.lerp(x, end, t)) for t in line]
    f = torch.stack([LOSSES["margin"](z, y) for z in logits]).double()  # (points, B)
    first, second = f.diff(dim=0).abs().sum(0), f.diff(n=2, dim=0).abs().sum(0)
    flat = first < _FLAT * torch.stack(logits).std() * len(line)
    return torch.where(flat, 0.0, second / first.clamp_min(1e-30))
