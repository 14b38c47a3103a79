"""2: more steps and restarts change nothing: the attack has converged (Carlini et al., 2019, arXiv 1902.06705)."""

from pipeline.evaluation.attacks import pgd_on
from pipeline.evaluation.audit.subject import Subject
from pipeline.evaluation.audit.verdict import in_vain, judged_share
from pipeline.evaluation.records import Check

WARN, FAIL = 0.01, 0.04


def check(subject: Subject) -> Check:
    """Share of examples that plain PGD leaves correct and PGD with doubled steps and restarts fools."""
    left = subject.correct(subject.ce_adv)
    if (vain := in_vain(2, "convergence", int(left.sum()), subject.n, WARN)) is not None:
        return vain
    problem, steps = subject.problem("convergence", keep=left), 2 * subject.effort.steps
    count = int(subject.fooled(lambda part: pgd_on(part, steps=steps, restarts=2), problem).sum())
    return judged_share(
        2, "convergence", count, subject.n, warn=WARN, fail=FAIL,
        summary=f"are correct after PGD-{subject.effort.steps} and fooled by PGD-{steps} x 2",
        details={"accuracy": int(left.sum()) / subject.n, "accuracy doubled": (int(left.sum()) - count) / subject.n},
    )  # fmt: skip
