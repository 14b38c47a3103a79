"""1: an iterative attack beats a one-step attack (Athalye et al., 2018, arXiv 1802.00420, section 3.1).

Two signs of a broken gradient: images that FGSM fools and PGD does not; and label leaking (Kurakin et al., 2017), where
FGSM with the true label makes the model right on images that it had wrong, or right far more often than PGD leaves it.
"""

from pipeline.evaluation.audit.subject import Subject
from pipeline.evaluation.audit.verdict import judged
from pipeline.evaluation.records import Check
from pipeline.evaluation.stats import Accuracy
from pipeline.training.attacks import fgsm

WARN, FAIL = 0.02, 0.05
COLLAPSE = 0.3
"""FGSM's accuracy this far above PGD's is not a harder attack but a gradient at x that leads nowhere."""


def check(subject: Subject) -> Check:
    """Figure: the worst of the three shares, as lower ends of their intervals, the collapse beyond its allowance."""
    threat, clean = subject.threat, subject.clean_correct
    right = ~subject.fooled(lambda p: fgsm(p.model, p.x, p.y, eps=threat.eps, norm=threat.norm), subject.everyone)
    iterated = int(subject.survives.sum())
    only_fgsm = int((~right[clean] & subject.survives).sum())
    repaired = int((right & ~clean).sum())
    gap = int(right.sum()) - iterated
    collapse = max(0.0, Accuracy.of(max(gap, 0), subject.n).low - COLLAPSE)
    shares = {"FGSM alone": only_fgsm, "repaired by FGSM": repaired}
    lows = [Accuracy.of(count, subject.n).low if count else 0.0 for count in shares.values()]
    return judged(
        1, "one_step", max(*lows, collapse), warn=WARN, fail=FAIL,
        summary=f"{only_fgsm} of {subject.n} examples are fooled by FGSM and not by PGD, FGSM repairs {repaired}, "
        f"and leaves {gap} more correct than PGD does (allowed: {COLLAPSE:.0%})",
        details={"accuracy FGSM": float(right.float().mean()), "accuracy PGD": iterated / subject.n},
    )  # fmt: skip
