"""5: adversarial images made on a twin never beat those made on the model itself.

Twins: the reference model (say, the ReLU control), and the same weights with every gate hardened to 1[g > 0].
"""

from torch import Tensor

from pipeline.evaluation.attacks import pgd_on
from pipeline.evaluation.audit.gates import Parts, gated_sites, gates_replaced
from pipeline.evaluation.audit.subject import Subject, beats, skipped
from pipeline.evaluation.records import Check


def check(subject: Subject) -> Check:
    """Share of examples that only a transferred image fools; skipped without a reference and without gates."""
    problem, steps = subject.survivors, subject.effort.steps
    has_gates = bool(gated_sites(subject.model))
    if subject.reference is None and not has_gates:
        return skipped(5, "transfer", "there is no reference model, and no gate to replace")
    attacks: dict[str, Tensor] = {}
    if len(problem.y) and subject.reference is not None:
        attacks["the reference"] = pgd_on(problem, steps=steps, loss="margin", model=subject.reference)
    if len(problem.y) and has_gates:
        with gates_replaced(subject.model, _hard):
            attacks["hard gates"] = pgd_on(problem, steps=steps, loss="margin")
    return beats(5, "transfer", subject, attacks, "an image made on a twin")


def _hard(_: int, parts: Parts) -> Tensor:
    return parts.base + parts.value * (parts.g > 0)
