"""5: adversarial images made on a twin never beat those made on the model itself.

Twins: the reference model (say, the ReLU control), and the same weights with every gate hardened to 1[g > 0].
"""

from functools import partial

from torch import Tensor, nn

from pipeline.evaluation.attacks import Problem, pgd_on
from pipeline.evaluation.audit.chunks import Attack
from pipeline.evaluation.audit.gates import Parts, gated_sites, gates_replaced
from pipeline.evaluation.audit.subject import Subject
from pipeline.evaluation.audit.verdict import beats, skipped
from pipeline.evaluation.judged_model import attackable, evaluating
from pipeline.evaluation.records import Check


def check(subject: Subject) -> Check:
    """Share of examples that only a transferred image fools; skipped without a reference and without gates."""
    steps, attacks = subject.effort.steps, dict[str, Attack]()

    def on_hard_gates(part: Problem) -> Tensor:
        with gates_replaced(part.model, _hard):
            return pgd_on(part, steps=steps, loss="margin")

    if subject.reference is not None:
        attacks["the reference"] = partial(_on_the_reference, subject.reference, steps)
    if gated_sites(subject.model):
        attacks["hard gates"] = on_hard_gates
    if not attacks:
        return skipped(5, "transfer", "there is no reference model, and no gate to replace")
    return beats(5, "transfer", subject, attacks, "an image made on a twin")


def _on_the_reference(reference: nn.Module, steps: int, part: Problem) -> Tensor:
    with evaluating(reference):
        return pgd_on(part, steps=steps, loss="margin", model=attackable(reference, part.x))


def _hard(_: int, parts: Parts) -> Tensor:
    return parts.base + parts.value * (parts.g > 0)
