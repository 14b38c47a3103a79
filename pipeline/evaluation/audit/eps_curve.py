"""3: accuracy falls with eps, and an unbounded attack reaches 0 % (Athalye et al., 2018; Carlini et al., 2019)."""

import itertools
import math

from pipeline.config.base import ThreatModel
from pipeline.evaluation.attacks import pgd_on
from pipeline.evaluation.audit.subject import Subject
from pipeline.evaluation.audit.verdict import judged
from pipeline.evaluation.records import Check
from pipeline.evaluation.stats import Accuracy

WARN, FAIL = 0.01, 0.03
MULTIPLES = (0.5, 1.0, 2.0)


def check(subject: Subject) -> Check:
    """Figure: the worse of the accuracy left by the unbounded attack and the largest rise, lower ends of intervals."""
    radii = [subject.threat.scaled(multiple).eps for multiple in MULTIPLES] + [_unbounded(subject)]
    radii = sorted(set(radii))
    counts = [len(subject.y), *(_correct(subject, eps) for eps in radii)]
    rise = max(0, *(b - a for a, b in itertools.pairwise(counts)))
    low = max(Accuracy.of(count, subject.n).low if count else 0.0 for count in (counts[-1], rise))
    return judged(
        3, "eps_curve", low, warn=WARN, fail=FAIL,
        summary=f"{counts[-1]} of {subject.n} examples withstand an unbounded attack; accuracy rises by at most {rise} "
        "examples from one radius to the next",
        details={"eps": [0.0, *radii], "accuracy": [count / subject.n for count in counts]},
    )  # fmt: skip


def _unbounded(subject: Subject) -> float:
    """The radius of the whole box [0, 1]^d."""
    return 1.0 if subject.threat.norm == "linf" else math.sqrt(subject.all_x[0].numel())


def _correct(subject: Subject, eps: float) -> int:
    """Examples that are correct after PGD on cross-entropy and, where that fails, on the margin, at this radius."""
    threat, steps = ThreatModel(norm=subject.threat.norm, eps=eps), subject.effort.steps
    left = ~subject.fooled(lambda part: pgd_on(part, steps=steps), subject.problem(f"eps {eps}", threat=threat))
    problem = subject.problem(f"eps {eps} margin", keep=left, threat=threat)
    return int((~subject.fooled(lambda part: pgd_on(part, steps=steps, loss="margin"), problem)).sum())
