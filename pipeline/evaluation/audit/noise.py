"""6: random noise of the same size is weaker than the white-box attack."""

from pipeline.evaluation.attacks import uniform_noise
from pipeline.evaluation.audit.subject import Subject, beats
from pipeline.evaluation.records import Check


def check(subject: Subject) -> Check:
    """Share of examples that only noise fools."""
    problem = subject.survivors
    generator = problem.generator()
    draws = [uniform_noise(problem.x, problem.threat, generator) for _ in range(subject.effort.noise_draws)]
    attacks = {f"draw {i}": x_adv for i, x_adv in enumerate(draws)} if len(problem.y) else {}
    return beats(6, "noise", subject, attacks, "random noise in the ball")
