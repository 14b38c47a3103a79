"""11: attacks that aim at the gates themselves find nothing that the white-box attack missed.

displace:     margin + w mean |phi(x_adv) - phi(x)|^2, away from the image's own gates
impersonate:  margin - w mean |phi(x_adv) - phi(x')|^2, towards the gates of an image x' of another class
Both are ascended by PGD as the margin of two logits, (0, objective).
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from pipeline.evaluation.attacks import Problem, pgd_on
from pipeline.evaluation.audit.chunks import Attack
from pipeline.evaluation.audit.gates import gate_maps, gated_sites
from pipeline.evaluation.audit.subject import Subject
from pipeline.evaluation.audit.verdict import beats, skipped
from pipeline.evaluation.records import Check
from pipeline.training.attacks import LOSSES

WEIGHT = 10.0
"""Weight of the gates' mean square, which is at most 1 and mostly far below, beside a margin of a few units."""


class _Aimed(nn.Module):
    """Two logits whose margin, for label 0, is the objective."""

    def __init__(self, model: nn.Module, y: Tensor, targets: list[Tensor], weight: float) -> None:
        super().__init__()
        self.model, self.y, self.targets, self.weight = model, y, targets, weight

    def forward(self, x: Tensor) -> Tensor:
        logits, maps = gate_maps(self.model, x)
        squares = [(phi - target).square().flatten(1).mean(1) for phi, target in zip(maps, self.targets, strict=True)]
        goal = LOSSES["margin"](logits, self.y) + self.weight * torch.stack(squares).mean(0)
        return torch.stack([torch.zeros_like(goal), goal], dim=1)


def check(subject: Subject) -> Check:
    """Share of examples that only a gate-targeted attack fools."""
    if not gated_sites(subject.model):
        return skipped(11, "gate_attack", "the model has no gates")
    steps = subject.effort.steps
    attacks: dict[str, Attack] = {"displace": lambda part: _aim(part, part.x, WEIGHT, steps)}
    if len(set(subject.all_y.tolist())) > 1:  # else there is nobody to impersonate
        attacks["impersonate"] = lambda part: _aim(part, _of_another_class(subject, part), -WEIGHT, steps)
    return beats(11, "gate_attack", subject, attacks, "an attack on the gates")


def _aim(problem: Problem, at: Tensor, weight: float, steps: int) -> Tensor:
    with torch.no_grad():
        targets = gate_maps(problem.model, at)[1]
    aimed = _Aimed(problem.model, problem.y, targets, weight).eval()
    return pgd_on(replace(problem, model=aimed, y=torch.zeros_like(problem.y)), steps=steps, loss="margin")


def _of_another_class(subject: Subject, problem: Problem) -> Tensor:
    """For each image the nearest one (in pixels) among all that has another label."""
    distance = torch.cdist(problem.x.flatten(1), subject.all_x.flatten(1))
    distance[problem.y[:, None] == subject.all_y[None, :]] = torch.inf
    return subject.all_x[distance.argmin(1)]
