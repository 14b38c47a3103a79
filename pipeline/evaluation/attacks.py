"""From an attack's settings to adversarial images: one small function per kind."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.base import ThreatModel
from pipeline.config.evaluation import (
    AnyAttack,
    AutoAttack,
    FGSMAttack,
    NoiseAttack,
    PGDAttack,
    SquareAttack,
    TargetedAttack,
    TransferAttack,
)
from pipeline.evaluation.ensemble import autoattack, square
from pipeline.evaluation.judged_model import attackable, evaluating, predict
from pipeline.training.attacks import default_step_size, fgsm, pgd


@dataclass(frozen=True)
class Problem:
    """What is attacked: logits = model(x), labels y, within threat; every random number comes from seed."""

    model: nn.Module
    x: Tensor
    y: Tensor
    threat: ThreatModel
    seed: int
    reference: nn.Module | None = None

    def generator(self) -> torch.Generator:
        """A fresh generator; on the CPU, so that every device sees the same numbers."""
        return torch.Generator().manual_seed(self.seed)


def run_attack(
    attack: AnyAttack, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, *, seed: int,
    reference: nn.Module | None = None,
) -> tuple[Tensor, list[str]]:  # fmt: skip
    """Attack x (B, C, H, W), y (B,).

    Returns:
        x_adv (B, C, H, W) in the ball and in [0, 1], and what the attack's library warned about.

    Raises:
        ValueError: a transfer attack without a reference model; a missing package.
    """
    return _RUNNERS[type(attack)](attack, Problem(model, x, y, threat, seed, reference))


def pgd_on(
    problem: Problem, *, steps: int, restarts: int = 1, loss: str = "ce", step_size: float | None = None,
    model: nn.Module | None = None, targets: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """PGD on the problem, with the default step size, on `model` in place of the problem's where given.

    targets: (B,) classes to reach.
    """
    eps = problem.threat.eps
    return pgd(
        model or problem.model, problem.x, problem.y, eps=eps, step_size=step_size or default_step_size(eps, steps),
        steps=steps, norm=problem.threat.norm, loss=loss, restarts=restarts, generator=problem.generator(),
        targets=targets,
    )  # fmt: skip


def uniform_noise(x: Tensor, threat: ThreatModel, generator: torch.Generator) -> Tensor:
    """x plus noise that is uniform in the linf ball, or on the l2 sphere, clipped to [0, 1]; (B, C, H, W)."""
    if threat.norm == "linf":
        noise = (2 * torch.rand(x.shape, generator=generator) - 1) * threat.eps
    else:
        noise = torch.randn(x.shape, generator=generator)
        noise *= threat.eps / noise.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
    return (x + noise.to(x)).clamp(0, 1)


def worst_of(model: nn.Module, x: Tensor, y: Tensor, candidates: list[Tensor]) -> Tensor:
    """Per example the first candidate (B, C, H, W) that is misclassified, or the last one."""
    worst = candidates[-1].clone()
    for candidate in reversed(candidates):
        fooled = predict(model, candidate) != y
        worst[fooled] = candidate[fooled]
    return worst


def _noise(attack: NoiseAttack, problem: Problem) -> tuple[Tensor, list[str]]:
    generator = problem.generator()
    draws = [uniform_noise(problem.x, problem.threat, generator) for _ in range(attack.num_draws)]
    return worst_of(problem.model, problem.x, problem.y, draws), []


def _fgsm(attack: FGSMAttack, problem: Problem) -> tuple[Tensor, list[str]]:
    return fgsm(problem.model, problem.x, problem.y, eps=problem.threat.eps, norm=problem.threat.norm), []


def _pgd(attack: PGDAttack, problem: Problem) -> tuple[Tensor, list[str]]:
    x_adv = pgd_on(problem, steps=attack.steps, restarts=attack.restarts, loss=attack.loss, step_size=attack.step_size)
    return x_adv, []


def _targeted(attack: TargetedAttack, problem: Problem) -> tuple[Tensor, list[str]]:
    p = problem
    with torch.no_grad():
        logits = p.model(p.x)
    order = logits.scatter(1, p.y[:, None], -torch.inf).argsort(1, descending=True)
    candidates = [
        pgd_on(p, steps=attack.steps, loss="margin", targets=order[:, i])
        for i in range(min(attack.num_targets, logits.shape[1] - 1))
    ]
    return worst_of(p.model, p.x, p.y, candidates), []


def _square(attack: SquareAttack, problem: Problem) -> tuple[Tensor, list[str]]:
    p = problem
    return square(p.model, p.x, p.y, p.threat, num_queries=attack.num_queries, seed=p.seed), []


def _autoattack(attack: AutoAttack, problem: Problem) -> tuple[Tensor, list[str]]:
    return autoattack(problem.model, problem.x, problem.y, problem.threat, seed=problem.seed)


def _transfer(attack: TransferAttack, problem: Problem) -> tuple[Tensor, list[str]]:
    if problem.reference is None:
        raise ValueError(
            "expected a reference model for the transfer attack, got none: give one, or leave the attack out"
        )
    with evaluating(problem.reference):
        reference = attackable(problem.reference, problem.x)
        return pgd_on(problem, steps=attack.steps, loss=attack.loss, model=reference), []


_RUNNERS: dict[type[Any], Callable[[Any, Problem], tuple[Tensor, list[str]]]] = {
    NoiseAttack: _noise,
    FGSMAttack: _fgsm,
    PGDAttack: _pgd,
    TargetedAttack: _targeted,
    SquareAttack: _square,
    AutoAttack: _autoattack,
    TransferAttack: _transfer,
}
