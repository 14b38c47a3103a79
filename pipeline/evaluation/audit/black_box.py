"""4: attacks that see scores (Square, SPSA) or decisions (RayS) alone never beat the white-box attack."""

from torch import Tensor

from pipeline.evaluation.audit.gradient_free import rays, spsa
from pipeline.evaluation.audit.subject import Subject, beats
from pipeline.evaluation.ensemble import square
from pipeline.evaluation.records import Check


def check(subject: Subject) -> Check:
    """Share of examples that only a black-box attack fools."""
    problem, effort = subject.survivors, subject.effort
    attacks: dict[str, Tensor] = {}
    if len(problem.y):
        attacks = {
            "Square": square(
                problem.model,
                problem.x,
                problem.y,
                problem.threat,
                num_queries=effort.square_queries,
                seed=problem.seed,
            ),
            "SPSA": spsa(problem, steps=effort.spsa_steps, num_samples=effort.spsa_samples),
            "RayS": rays(problem, num_flips=effort.hard_label_flips),
        }
    return beats(4, "black_box", subject, attacks, "an attack that sees no gradient")
