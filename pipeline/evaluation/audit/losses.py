"""7: the robustness does not hang on the loss that is attacked: worst case over five of them, per example.

Cross-entropy, margin (Carlini and Wagner, 2017), DLR (Croce and Hein, 2020), targeted margin, and cross-entropy of
logits scaled to unit spread, which no temperature can make vanish.
"""

import torch
from torch import Tensor, nn

from pipeline.config.evaluation import TargetedAttack
from pipeline.evaluation.attacks import pgd_on, run_attack
from pipeline.evaluation.audit.chunks import Attack
from pipeline.evaluation.audit.subject import Subject
from pipeline.evaluation.audit.verdict import in_vain, judged_share
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
    if (vain := in_vain(7, "losses", int(left.sum()), subject.n, WARN)) is not None:
        return vain
    problem = subject.problem("losses", keep=left)
    masks = {name: subject.fooled(attack, problem) for name, attack in _attacks(subject).items()}
    each: dict[str, float | list[float]] = {f"fooled by {name}": float(mask.sum()) for name, mask in masks.items()}
    return judged_share(
        7, "losses", int(torch.stack(list(masks.values())).any(0).sum()), subject.n, warn=WARN, fail=FAIL,
        summary="are correct after PGD on cross-entropy and fooled through another loss",
        details={"accuracy": int(left.sum()) / subject.n, **each},
    )  # fmt: skip


def _attacks(subject: Subject) -> dict[str, Attack]:
    steps = subject.effort.steps
    targeted = TargetedAttack(steps=steps, num_targets=subject.effort.num_targets)
    rescaled = _Rescaled(subject.model)
    with torch.no_grad():
        num_classes = subject.model(subject.all_x[:1]).shape[1]
    found: dict[str, Attack] = {
        "margin": lambda p: pgd_on(p, steps=steps, loss="margin"),
        "rescaled": lambda p: pgd_on(p, steps=steps, model=rescaled),
        "targeted": lambda p: run_attack(targeted, p.model, p.x, p.y, p.threat, seed=p.seed)[0],
    }
    if num_classes > 2:
        found["DLR"] = lambda p: pgd_on(p, steps=steps, loss="dlr")
    return found
