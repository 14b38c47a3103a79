"""6: random noise of the same size is weaker than the white-box attack."""

import torch
from torch import Tensor

from pipeline.evaluation.attacks import Problem, uniform_noise
from pipeline.evaluation.audit.subject import Subject
from pipeline.evaluation.audit.verdict import beats
from pipeline.evaluation.judged_model import predict
from pipeline.evaluation.records import Check


def check(subject: Subject) -> Check:
    """Share of examples that only noise fools."""
    draws = subject.effort.noise_draws
    attacks = {f"{draws} draws": lambda part: _worst_noise(part, draws)}
    return beats(6, "noise", subject, attacks, "random noise in the ball")


def _worst_noise(problem: Problem, num_draws: int) -> Tensor:
    """One draw in memory at a time: there may be many."""
    generator, worst = problem.generator(), problem.x
    for _ in range(num_draws):
        x_adv = uniform_noise(problem.x, problem.threat, generator)
        wrong = predict(problem.model, x_adv) != problem.y
        worst = torch.where(wrong.view(-1, 1, 1, 1), x_adv, worst)
    return worst
