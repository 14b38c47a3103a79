"""10: no other backward pass through the gates beats the true one (BPDA: Athalye et al., 2018, arXiv 1802.00420).

With phi = sigmoid(g), the forward pass unchanged, the gradient of the gate is
  detached           zero: the gate is a constant
  softened           that of sigmoid(g / 10)
  straight-through   dphi / dg = 1/4 everywhere
  gate only          all there is: value is a constant instead
"""

import torch
from torch import Tensor

from pipeline.evaluation.attacks import pgd_on
from pipeline.evaluation.audit.gates import Parts, Rule, gated_sites, gates_replaced
from pipeline.evaluation.audit.subject import Subject, beats, skipped
from pipeline.evaluation.records import Check

TEMPERATURE = 10.0


def _with_backward_of(exact: Tensor, surrogate: Tensor) -> Tensor:
    return surrogate + (exact - surrogate).detach()


def _detached(_: int, parts: Parts) -> Tensor:
    return parts.base + parts.value * torch.sigmoid(parts.g).detach()


def _softened(_: int, parts: Parts) -> Tensor:
    return parts.base + parts.value * _with_backward_of(torch.sigmoid(parts.g), torch.sigmoid(parts.g / TEMPERATURE))


def _straight_through(_: int, parts: Parts) -> Tensor:
    return parts.base + parts.value * _with_backward_of(torch.sigmoid(parts.g), parts.g / 4)


def _gate_only(_: int, parts: Parts) -> Tensor:
    return parts.base + parts.value.detach() * torch.sigmoid(parts.g)


RULES: dict[str, Rule] = {
    "detached": _detached,
    "softened": _softened,
    "straight-through": _straight_through,
    "gate only": _gate_only,
}


def check(subject: Subject) -> Check:
    """Share of examples that only a doctored backward pass fools."""
    if not gated_sites(subject.model):
        return skipped(10, "bpda", "the model has no gates")
    problem, attacks = subject.survivors, {}
    for name, rule in RULES.items():
        if len(problem.y):
            with gates_replaced(subject.model, rule):
                attacks[name] = pgd_on(problem, steps=subject.effort.steps, loss="margin")
    return beats(10, "bpda", subject, attacks, "PGD through a doctored gradient of the gates")
