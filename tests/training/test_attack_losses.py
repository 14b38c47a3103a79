"""The objectives against their formulas, written out example by example."""

import math

import pytest
import torch

from pipeline.training.attacks import LOSSES, TARGETED_LOSSES, objective

Z = torch.tensor([[3.0, 1.0, 0.5, -1.0], [0.2, 0.1, 2.0, 1.5]], dtype=torch.float64)
Y = torch.tensor([0, 3])
T = torch.tensor([2, 0])


def log_softmax(z, k):
    return z[k] - math.log(sum(math.exp(v) for v in z))


FORMULAS = {
    "ce": lambda z, y: -log_softmax(z, y),
    "margin": lambda z, y: max(v for i, v in enumerate(z) if i != y) - z[y],
    "dlr": lambda z, y: -(z[y] - max(v for i, v in enumerate(z) if i != y)) / (sorted(z)[-1] - sorted(z)[-3]),
}
TARGETED_FORMULAS = {
    "ce": lambda z, y, t: log_softmax(z, t),
    "margin": lambda z, y, t: z[t] - max(v for i, v in enumerate(z) if i != t),
    "dlr": lambda z, y, t: -(z[y] - z[t]) / (sorted(z)[-1] - (sorted(z)[-3] + sorted(z)[-4]) / 2),
}


@pytest.mark.parametrize("name", LOSSES)
def test_objective_is_its_formula(name):
    expected = [FORMULAS[name](z.tolist(), y) for z, y in zip(Z, Y.tolist(), strict=True)]
    torch.testing.assert_close(objective(name, Y)(Z), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("name", TARGETED_LOSSES)
def test_targeted_objective_is_its_formula(name):
    rows = zip(Z, Y.tolist(), T.tolist(), strict=True)
    expected = [TARGETED_FORMULAS[name](z.tolist(), y, t) for z, y, t in rows]
    torch.testing.assert_close(objective(name, Y, targets=T)(Z), torch.tensor(expected, dtype=torch.float64))


def test_kl_is_its_formula_and_zero_at_the_clean_prediction():
    clean = Z.flip(1)
    p, q = clean.softmax(1), Z.softmax(1)
    kl = objective("kl", Y, reference=clean)
    torch.testing.assert_close(kl(Z), (p * (p / q).log()).sum(1))
    torch.testing.assert_close(kl(clean), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("name", LOSSES)
def test_objective_and_gradient_are_finite_for_extreme_logits(name):
    z = torch.tensor([[1e4, -1e4, 0.0], [5.0, 5.0, 5.0]], requires_grad=True)
    value = objective(name, torch.tensor([0, 1]))(z)
    (g,) = torch.autograd.grad(value.sum(), z)
    assert value.isfinite().all()
    assert g.isfinite().all()
