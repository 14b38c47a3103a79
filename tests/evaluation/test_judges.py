"""Tools of others judge the same models: they must not find our robust accuracy too high, and they take our images."""

import warnings

import pytest
import torch
from torch import nn

from pipeline.config.evaluation import ThreatModel
from pipeline.evaluation.attacks import Problem, pgd_on, worst_of
from pipeline.evaluation.audit.subject import margin
from pipeline.evaluation.ensemble import autoattack, square

EPS, N = 0.1, 200
SLACK = 0.01  # of the examples


@pytest.fixture(scope="module", params=["robust", "gated"])
def model(request):
    return request.getfixturevalue(request.param)


def accuracy(model, x, y) -> float:
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


@pytest.fixture(scope="module")
def ours(model, digits):
    """Our white-box suite: per example the worst of cross-entropy and margin, and its images."""
    x, y = digits.test_x[:N], digits.test_y[:N]
    problem = Problem(model, x, y, ThreatModel(eps=EPS), seed=0)
    attacks = [pgd_on(problem, steps=20, restarts=2), pgd_on(problem, steps=20, restarts=2, loss="margin")]
    return worst_of(model, x, y, attacks)


def test_torchattacks_finds_no_lower_robustness(model, ours, digits):
    torchattacks = pytest.importorskip("torchattacks")
    x, y = digits.test_x[:N], digits.test_y[:N]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = [torchattacks.PGD(model, eps=EPS, alpha=EPS / 8, steps=20)(x, y)]
        theirs.append(torchattacks.APGD(model, eps=EPS, steps=20, n_restarts=2, loss="dlr")(x, y))
    assert accuracy(model, ours, y) <= accuracy(model, worst_of(model, x, y, theirs), y) + SLACK


def test_foolbox_finds_no_lower_robustness_and_takes_our_images(model, ours, digits):
    foolbox = pytest.importorskip("foolbox")
    x, y = digits.test_x[:N], digits.test_y[:N]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own deprecations are not ours to fix
        torch.manual_seed(0)
        judge = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        _, theirs, _ = foolbox.attacks.LinfPGD(steps=20)(judge, x, y, epsilons=EPS)
        valid = foolbox.utils.accuracy(judge, ours, y)
    assert accuracy(model, ours, y) <= accuracy(model, theirs, y) + SLACK
    assert valid == pytest.approx(accuracy(model, ours, y))
    assert foolbox.distances.linf(x, ours).max() <= EPS + 1e-6


def test_autoattack_finds_no_lower_robustness_and_warns_of_nothing(model, ours, digits):
    pytest.importorskip("pyautoattack")
    x, y = digits.test_x[:N], digits.test_y[:N]
    # What we fooled is known to be foolable: only what we report as robust can refute us, the most fragile first.
    with torch.no_grad():
        logits = model(ours)
    wrong_by = margin(logits, y)
    fragile = wrong_by.masked_fill(logits.argmax(1) != y, -torch.inf).topk(32).indices
    x, y = x[fragile], y[fragile]
    found, messages = autoattack(model, x, y, ThreatModel(eps=EPS), seed=0)
    assert len(y) * (1 - accuracy(model, found, y)) <= SLACK * N
    assert messages == []


def test_autoattack_warns_of_a_random_model(robust, digits):
    pytest.importorskip("pyautoattack")

    class Noisy(nn.Module):
        def forward(self, x):
            logits = robust(x)
            return logits + 0.3 * logits.std() * torch.randn_like(logits)

    _, messages = autoattack(Noisy(), digits.test_x[:4], digits.test_y[:4], ThreatModel(eps=0.3), seed=0)
    assert any("randomized defense" in message for message in messages)


@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_autoattack_runs_with_few_classes(num_classes):
    pytest.importorskip("pyautoattack")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
    x = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        y = model(x).argmax(1)
    x_adv, messages = autoattack(model, x, y, ThreatModel(eps=0.5), seed=0)
    assert accuracy(model, x_adv, y) == 0
    assert ("not the standard one" in " ".join(messages)) == (num_classes < 4)


def test_the_library_leaves_no_trace(robust, digits):
    pytest.importorskip("pyautoattack")
    import sys

    def trace(*_):
        return None

    state, before = torch.get_rng_state(), sys.gettrace()
    sys.settrace(trace)
    try:
        autoattack(robust, digits.test_x[:2], digits.test_y[:2], ThreatModel(eps=0.5), seed=0)
        square(robust, digits.test_x[:2], digits.test_y[:2], ThreatModel(eps=0.5), num_queries=5, seed=0)
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)
    assert torch.equal(state, torch.get_rng_state())
