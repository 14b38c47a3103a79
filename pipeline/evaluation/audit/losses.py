"""7: the robustness does not hang on the loss that is attacked: worst case over five of them, per example.

Cross-entropy, margin (Carlini and Wagner, 2017), DLR (Croce and Hein, 2020), targeted margin, and cross-entropy of
logits scaled to unit spread, which no temperature can make vanish.
"""

import torch
from torch import Tensor, nn

from pipeline.config.evaluation import TargetedAttack
from pipeline.evaluation.attacks import Problem, pgd_on, run_attack
from pipeline.evaluation.audit.subject import Subject, judged_share
from pipeline.evaluation.records import Check

WARN, FAIL = 0.06, 0.12


class _Rescaled(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits / logits.detach().std(dim=1, keepdim=True).clamp_min(1e-12)


def check(subject: Subject) -> Check:
    """Share of examples that cross-entropy leaves correct and another loss fools: a few are normal, many are a mask."""
    left = subject.correct(subject.ce_adv)
    problem = subject.problem("losses", keep=left)
    found = _attacks(subject, problem) if len(problem.y) else {}
    each = {f"fooled by {name}": float(subject.fooled([x_adv], problem)) for name, x_adv in found.items()}
    count = subject.fooled(list(found.values()), problem) if found else 0
    return judged_share(
        7, "losses", count, subject.n, warn=WARN, fail=FAIL,
        summary="are correct after PGD on cross-entropy and fooled through another loss",
        details={"accuracy": int(left.sum()) / subject.n, **each},
    )  # fmt: skip


def _attacks(subject: Subject, problem: Problem) -> dict[str, Tensor]:
    steps = subject.effort.steps
    with torch.no_grad():
        num_classes = subject.model(problem.x[:1]).shape[1]
    found = {
        "margin": pgd_on(problem, steps=steps, loss="margin"),
        "rescaled": pgd_on(problem, steps=steps, model=_Rescaled(subject.model)),
        "targeted": run_attack(
            TargetedAttack(steps=steps, num_targets=subject.effort.num_targets),
            problem.model, problem.x, problem.y, problem.threat, seed=problem.seed,
        )[0],
    }  # fmt: skip
    if num_classes > 2:
        found["DLR"] = pgd_on(problem, steps=steps, loss="dlr")
    return found
