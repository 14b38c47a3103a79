"""Tools of others judge the same models: they must not find our robust accuracy too high, and they take our images."""

import logging
import warnings
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from pipeline.config.base import ThreatModel
from pipeline.config.evaluation import SUITES, AuditConfig, AutoAttack, CurveConfig, EvaluationConfig
from pipeline.evaluation import evaluate
from pipeline.evaluation.attacks import worst_of
from pipeline.evaluation.ensemble import autoattack, square

EPS, N = 0.1, 200
SLACK = 0.01  # of the examples
NOTHING_ELSE = {"curve": CurveConfig(multiples=()), "audit": AuditConfig(budget="off"), "save_adversarial": True}


class Ours(NamedTuple):
    """What our suite made of a model: test images, labels, and the images of its worst case."""

    model: nn.Module
    x: Tensor
    y: Tensor
    x_adv: Tensor

    def refuted(self, theirs: Tensor) -> float:
        """Share of the examples that we report as robust, and that these images fool."""
        with torch.no_grad():
            held, fooled = self.model(self.x_adv).argmax(1) == self.y, self.model(theirs).argmax(1) != self.y
        return (held & fooled).float().mean().item()


@pytest.fixture(scope="module", params=[("robust", "gated"), ("gated", "robust")], ids=["robust", "gated"])
def ours(request, prepared, tmp_path_factory) -> Ours:
    """The standard suite, as a user runs it: each model with the other as its reference."""
    model, reference = map(request.getfixturevalue, request.param)
    config = EvaluationConfig(
        threat=ThreatModel(eps=EPS), attacks=SUITES["standard"], num_examples=N, block_size=N, **NOTHING_ELSE
    )
    output = tmp_path_factory.mktemp("ours")
    result = evaluate(model, prepared, config, output, seed=0, reference=reference)
    x, y, x_adv = (torch.from_numpy(result.arrays(output)[name]) for name in ("x", "y", "x_adv"))
    assert accuracy(model, x_adv, y) == pytest.approx(result.union.value)
    return Ours(model, x, y, x_adv)


def accuracy(model, x, y) -> float:
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def test_torchattacks_fools_nothing_that_we_report_as_robust(ours):
    torchattacks = pytest.importorskip("torchattacks")
    model, x, y, _ = ours
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = [torchattacks.PGD(model, eps=EPS, alpha=EPS / 8, steps=20)(x, y)]
        theirs.append(torchattacks.APGD(model, eps=EPS, steps=20, n_restarts=2, loss="dlr")(x, y))
    assert ours.refuted(worst_of(model, x, y, theirs)) <= SLACK


def test_foolbox_fools_nothing_that_we_report_as_robust_and_takes_our_images(ours):
    foolbox = pytest.importorskip("foolbox")
    model, x, y, x_adv = ours
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own deprecations are not ours to fix
        torch.manual_seed(0)
        judge = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        _, theirs, _ = foolbox.attacks.LinfPGD(steps=20)(judge, x, y, epsilons=EPS)
        valid = foolbox.utils.accuracy(judge, x_adv, y)
    assert ours.refuted(theirs) <= SLACK
    assert valid == pytest.approx(accuracy(model, x_adv, y))
    assert foolbox.distances.linf(x, x_adv).max() <= EPS + 1e-6


@pytest.mark.slow
def test_autoattack_fools_nothing_that_we_report_as_robust_and_warns_of_nothing(ours):
    pytest.importorskip("pyautoattack")
    # What we fooled is known to be foolable: only what we report as robust can refute us, the most fragile first.
    with torch.no_grad():
        logits = ours.model(ours.x_adv)
    right = logits.gather(1, ours.y[:, None])[:, 0]
    margin = right - logits.scatter(1, ours.y[:, None], -torch.inf).amax(1)
    fragile = margin.masked_fill(margin <= 0, torch.inf).topk(32, largest=False).indices
    assert (margin[fragile] > 0).all()
    theirs = ours.x_adv.clone()
    theirs[fragile], messages = autoattack(ours.model, ours.x[fragile], ours.y[fragile], ThreatModel(eps=EPS), seed=0)
    assert ours.refuted(theirs) <= SLACK
    assert messages == []


class Noisy(nn.Module):
    """Logits with noise that is drawn anew in every call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        logits = self.model(x)
        return logits + 0.3 * logits.std() * torch.randn_like(logits)


def test_what_autoattack_warns_of_is_in_the_record(robust, prepared, tmp_path):
    pytest.importorskip("pyautoattack")
    config = EvaluationConfig(threat=ThreatModel(eps=0.3), attacks=(AutoAttack(),), num_examples=4, **NOTHING_ELSE)
    result = evaluate(Noisy(robust), prepared, config, tmp_path, seed=0)
    assert [attack.name for attack in result.attacks] == ["autoattack"]
    assert any(w.startswith("autoattack: ") and "randomized defense" in w for w in result.warnings)


@pytest.mark.slow
def test_autoattack_in_l2_runs_in_the_suite(robust, prepared, tmp_path):
    pytest.importorskip("pyautoattack")
    threat = ThreatModel(norm="l2", eps=1.0)
    config = EvaluationConfig(threat=threat, attacks=(AutoAttack(),), num_examples=16, **NOTHING_ELSE)
    result = evaluate(robust, prepared, config, tmp_path, seed=0)
    arrays = result.arrays(tmp_path)
    length = torch.from_numpy(arrays["x_adv"] - arrays["x"]).flatten(1).norm(dim=1)
    assert [(attack.name, attack.fooled > 0) for attack in result.attacks] == [("autoattack", True)]
    assert 0 < length.max() <= 1 + 1e-4
    assert result.warnings == ()


def test_no_setting_of_logging_keeps_the_warnings_away(robust, digits):
    pytest.importorskip("pyautoattack")
    root, logger = logging.getLogger(), logging.getLogger("auto-attack")
    before = root.level, logger.level, logger.disabled
    root.setLevel(logging.CRITICAL)
    try:
        for level, disabled in ((logging.NOTSET, False), (logging.CRITICAL, False), (logging.NOTSET, True)):
            logger.setLevel(level)
            logger.disabled = disabled
            _, messages = autoattack(Noisy(robust), digits.test_x[:2], digits.test_y[:2], ThreatModel(eps=0.3), seed=0)
            assert any("randomized defense" in message for message in messages)
            assert (logger.level, logger.disabled) == (level, disabled)
    finally:
        root.setLevel(before[0])
        logger.setLevel(before[1])
        logger.disabled = before[2]


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
