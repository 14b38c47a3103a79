"""10: no other backward pass through the gates beats the true one (BPDA: Athalye et al., 2018, arXiv 1802.00420).

With phi = sigmoid(g), the forward pass unchanged, the gradient of the gate is
  detached           zero: the gate is a constant
  softened           that of sigmoid(g / 10)
  straight-through   dphi / dg = 1/4 everywhere
  gate only          all there is: value is a constant instead
"""

import torch
from torch import Tensor

from pipeline.evaluation.attacks import Problem, pgd_on
from pipeline.evaluation.audit.chunks import Attack
from pipeline.evaluation.audit.gates import Parts, Rule, gated_sites, gates_replaced
from pipeline.evaluation.audit.subject import Subject
from pipeline.evaluation.audit.verdict import beats, skipped
from pipeline.evaluation.records import Check

TEMPERATURE = 10.0


def _with_backward_of(exact: Tensor, surrogate: Tensor) -> Tensor:
    # Not surrogate + (exact - surrogate): where g is large that rounds, and the forward pass is another.
    return exact.detach() + (surrogate - surrogate.detach())


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
    attacks = {name: _through(rule, subject.effort.steps) for name, rule in RULES.items()}
    return beats(10, "bpda", subject, attacks, "PGD through a doctored gradient of the gates")


def _through(rule: Rule, steps: int) -> Attack:
    def attack(part: Problem) -> Tensor:
        with gates_replaced(part.model, rule):
            return pgd_on(part, steps=steps, loss="margin")

    return attack
