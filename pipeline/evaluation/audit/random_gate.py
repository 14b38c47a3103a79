"""15: gates that cannot answer the attack: does robustness survive, and does an attack on them beat the true one?

frozen   the gates keep the values they have on the clean image
random   the gates of every channel are shuffled over positions and images (of a chunk), and then keep these values
Images made on either network are tried on the true one; the accuracies of the random one are in the details.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.evaluation.attacks import Problem, pgd_on
from pipeline.evaluation.audit.chunks import Attack, chunks
from pipeline.evaluation.audit.equal_cost import beside_equal_cost
from pipeline.evaluation.audit.gates import Parts, Rule, gate_maps, gated_sites, gates_replaced
from pipeline.evaluation.audit.subject import Subject
from pipeline.evaluation.audit.verdict import beats, skipped
from pipeline.evaluation.judged_model import predict
from pipeline.evaluation.records import Check


def check(subject: Subject) -> Check:
    """Share of examples that only an attack on frozen or shuffled gates fools."""
    if not gated_sites(subject.model):
        return skipped(15, "random_gate", "the model has no gates")
    steps = subject.effort.steps
    attacks = {"frozen": _on_gates(_maps, steps), "random": _on_gates(_shuffled, steps)}
    found = beats(15, "random_gate", subject, attacks, "an attack on frozen or shuffled gates")
    found = found.model_copy(update={"details": {**found.details, **_survival(subject)}})
    return beside_equal_cost(subject, found) if subject.matched else found


def _on_gates(maps: Callable[[Problem], list[Tensor]], steps: int) -> Attack:
    def attack(part: Problem) -> Tensor:
        with gates_replaced(part.model, _kept(maps(part))):
            return pgd_on(part, steps=steps, loss="margin")

    return attack


def _survival(subject: Subject) -> dict[str, float | list[float]]:
    clean, robust = 0, 0
    for part in chunks(subject.problem("random gate")):
        with gates_replaced(part.model, _kept(_shuffled(part))):
            clean += int((predict(part.model, part.x) == part.y).sum())
            robust += int((predict(part.model, pgd_on(part, steps=subject.effort.steps)) == part.y).sum())
    return {"clean, random gates": clean / subject.n, "robust, random gates": robust / subject.n}


def _maps(problem: Problem) -> list[Tensor]:
    with torch.no_grad():
        return gate_maps(problem.model, problem.x)[1]


def _shuffled(problem: Problem) -> list[Tensor]:
    generator, found = problem.generator(), []
    for phi in _maps(problem):
        by_channel = phi.transpose(0, 1).flatten(1)  # (C, B H W)
        order = torch.rand(by_channel.shape, generator=generator).argsort(1).to(phi.device)
        found.append(by_channel.gather(1, order).view_as(phi.transpose(0, 1)).transpose(0, 1))
    return found


def _kept(maps: list[Tensor]) -> Rule:
    def rule(call: int, parts: Parts) -> Tensor:
        return parts.base + parts.value * maps[call]

    return rule
