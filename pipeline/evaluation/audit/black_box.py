"""4: attacks that see scores (Square, SPSA) or decisions (RayS) alone never beat the white-box attack."""

from pipeline.evaluation.audit.gradient_free import rays, spsa
from pipeline.evaluation.audit.subject import Subject
from pipeline.evaluation.audit.verdict import beats
from pipeline.evaluation.ensemble import square
from pipeline.evaluation.records import Check


def check(subject: Subject) -> Check:
    """Share of examples that only a black-box attack fools."""
    effort = subject.effort
    queries = effort.square_queries
    return beats(
        4, "black_box", subject,
        {
            "Square": lambda p: square(p.model, p.x, p.y, p.threat, num_queries=queries, seed=p.seed),
            "SPSA": lambda p: spsa(p, steps=effort.spsa_steps, num_samples=effort.spsa_samples),
            "RayS": lambda p: rays(p, num_flips=effort.hard_label_flips),
        },
        "an attack that sees no gradient",
    )  # fmt: skip
