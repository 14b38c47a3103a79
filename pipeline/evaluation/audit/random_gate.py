"""15: gates that cannot answer the attack: does robustness survive, and does an attack on them beat the true one?

frozen   the gates keep the values they have on the clean image
random   the gates of every channel are shuffled over positions and images, and then keep these values
Images made on either network are tried on the true one; the accuracies of the random one are in the details.
"""

import torch
from torch import Tensor

from pipeline.evaluation.attacks import Problem, pgd_on
from pipeline.evaluation.audit.equal_cost import beside_equal_cost
from pipeline.evaluation.audit.gates import Parts, Rule, gate_maps, gated_sites, gates_replaced
from pipeline.evaluation.audit.subject import Subject, beats, skipped
from pipeline.evaluation.blocks import predict
from pipeline.evaluation.records import Check


def check(subject: Subject) -> Check:
    """Share of examples that only an attack on frozen or shuffled gates fools."""
    if not gated_sites(subject.model):
        return skipped(15, "random_gate", "the model has no gates")
    problem, attacks = subject.survivors, {}
    if len(problem.y):
        for name, maps in (("frozen", _maps(subject, problem.x)), ("random", _shuffled(subject, problem))):
            with gates_replaced(subject.model, _kept(maps)):
                attacks[name] = pgd_on(problem, steps=subject.effort.steps, loss="margin")
    found = beats(15, "random_gate", subject, attacks, "an attack on frozen or shuffled gates")
    found = found.model_copy(update={"details": {**found.details, **_survival(subject)}})
    return beside_equal_cost(subject, found) if subject.matched else found


def _survival(subject: Subject) -> dict[str, float | list[float]]:
    problem = subject.problem("random gate")
    if not len(problem.y):
        return {}
    with gates_replaced(subject.model, _kept(_shuffled(subject, problem))):
        clean = predict(subject.model, problem.x) == problem.y
        robust = predict(subject.model, pgd_on(problem, steps=subject.effort.steps)) == problem.y
    return {"clean, random gates": int(clean.sum()) / subject.n, "robust, random gates": int(robust.sum()) / subject.n}


def _maps(subject: Subject, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return gate_maps(subject.model, x)[1]


def _shuffled(subject: Subject, problem: Problem) -> list[Tensor]:
    generator, found = problem.generator(), []
    for phi in _maps(subject, problem.x):
        by_channel = phi.transpose(0, 1).flatten(1)  # (C, B H W)
        order = torch.rand(by_channel.shape, generator=generator).argsort(1).to(phi.device)
        found.append(by_channel.gather(1, order).view_as(phi.transpose(0, 1)).transpose(0, 1))
    return found


def _kept(maps: list[Tensor]) -> Rule:
    def rule(call: int, parts: Parts) -> Tensor:
        return parts.base + parts.value * maps[call]

    return rule
