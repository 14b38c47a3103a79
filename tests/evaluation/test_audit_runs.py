"""How an audit is run: in chunks, from the files of one that was killed, and by the command for the confusion table."""

from types import MethodType

import pytest
import torch
from torch import nn

from pipeline.config.base import ThreatModel
from pipeline.evaluation import audit
from pipeline.evaluation.__main__ import main
from pipeline.evaluation.attacks import Problem, uniform_noise
from pipeline.evaluation.audit import chunks, confusion
from pipeline.evaluation.audit.gates import gated_sites
from pipeline.evaluation.audit.planted import HONEST, PLANTED, Case, named, small_cnn
from sparta_models import ActivationBank, build_model

THREAT = ThreatModel(eps=0.1)


class Watched(nn.Module):
    """Counts the images that come at once."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.most = inner, 0

    def forward(self, x):
        self.most = max(self.most, len(x))
        return self.inner(x)


def test_the_model_never_sees_more_images_than_a_chunk(gated, robust, digits, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 32)  # checks that look closely take 16 images, and 16 more as company
    model, reference = Watched(gated), Watched(robust)
    x, y = digits.test_x[:80], digits.test_y[:80]
    report = audit(model, x, y, THREAT, "quick", seed=0, reference=reference, matched={"other": reference})
    assert model.most == reference.most == 32
    assert report.n == 80
    assert report.passed
    assert sum(report.checks[8].details["histogram clean 0"]) == pytest.approx(1, abs=1e-5)


def test_the_first_chunk_is_what_it_would_be_alone_and_the_others_draw_their_own_numbers(robust, digits, monkeypatch):
    x, y = digits.test_x[:8].repeat(2, 1, 1, 1), digits.test_y[:8].repeat(2)

    def attack(problem):
        return uniform_noise(problem.x, problem.threat, problem.generator())

    alone = attack(Problem(robust, x[:8], y[:8], THREAT, seed=0))
    monkeypatch.setattr(chunks, "CHUNK", 8)
    both = chunks.attacked(attack, Problem(robust, x, y, THREAT, seed=0))
    assert torch.equal(both[:8], alone)
    assert not torch.equal(both[8:], alone)


def test_nothing_is_asked_of_a_model_about_no_images(robust, digits):
    none = Problem(robust, digits.test_x[:0], digits.test_y[:0], THREAT, seed=0)

    def attack(problem):
        raise AssertionError

    assert chunks.fooled(attack, none).shape == (0,)
    assert chunks.attacked(attack, none).shape == (0, 1, 8, 8)
    assert chunks.predicted(robust, none.x).dtype == torch.int64


class KilledError(Exception):
    pass


@pytest.mark.parametrize("name", ["gated", "random"])
def test_a_killed_audit_goes_on_and_ends_as_if_nothing_had_happened(name, gated, digits, tmp_path, monkeypatch):
    model = gated if name == "gated" else PLANTED["randomised logits"].make(digits)
    x, y = digits.test_x[:16], digits.test_y[:16]
    asked = []

    def counted(check, *, kill):
        def run(subject):
            if kill:
                raise KilledError
            found = check(subject)
            asked.append(found.number)
            return found

        return run

    checks = audit.__globals__["CHECKS"]
    whole = audit(model, x, y, THREAT, "quick", seed=0)
    monkeypatch.setitem(audit.__globals__, "CHECKS", [counted(c, kill=i == 9) for i, c in enumerate(checks)])
    with pytest.raises(KilledError):
        audit(model, x, y, THREAT, "quick", seed=0, directory=tmp_path)
    assert asked == list(range(1, 10))
    (damaged,) = tmp_path.glob("audit/*/check-03.json")
    damaged.write_text("{")
    asked.clear()
    monkeypatch.setitem(audit.__globals__, "CHECKS", [counted(c, kill=False) for c in checks])
    assert audit(model, x, y, THREAT, "quick", seed=0, directory=tmp_path) == whole
    assert asked == [3, *range(10, 18)]


def test_checks_of_another_audit_are_never_taken_for_those_of_this_one(robust, gated, digits, tmp_path):
    x, y = digits.test_x[:8], digits.test_y[:8]

    def again(model=gated, x=x, y=y, threat=THREAT, seed=0, **others):
        audit(model, x, y, threat, "quick", seed=seed, directory=tmp_path, **others)
        return len(list((tmp_path / "audit").iterdir()))

    assert again() == again() == 1
    assert again(model=robust) == 2
    assert again(x=digits.test_x[8:16]) == 3
    assert again(y=(y + 1) % 10) == 4
    assert again(threat=ThreatModel(eps=0.2)) == 5
    assert again(seed=1) == 6
    assert again(reference=robust) == 7
    assert again(matched={"other": robust}) == 8


def test_whether_an_activation_is_frozen_is_looked_at_again(digits, tmp_path):
    x, y = digits.test_x[:8], digits.test_y[:8]
    source, model = (build_model("resnet8", activation="sparta", in_channels=1, width=4).eval() for _ in range(2))
    ActivationBank.from_model(source).apply_to(model, freeze=True)
    assert audit(model, x, y, THREAT, "quick", seed=0, directory=tmp_path).checks[15].verdict == "pass"
    site = next(iter(gated_sites(model).values()))
    site.train = MethodType(nn.Module.train, site)  # no longer that of a frozen activation
    site.requires_grad_(requires_grad=True)
    assert audit(model, x, y, THREAT, "quick", seed=0, directory=tmp_path).checks[15].verdict == "fail"


def test_the_confusion_command_takes_budget_and_number_of_images(digits, monkeypatch, capsys):
    asked = []
    real = confusion.audit

    def counted(model, x, y, threat, budget, **others):
        asked.append((len(y), budget, others["reference"] is not None))
        return real(model, x, y, threat, "quick", **others)

    monkeypatch.setattr(confusion, "audit", counted)
    monkeypatch.setattr(confusion, "HONEST", {"a": Case(lambda _: small_cnn(named("silu")).eval())})
    killed = PLANTED["gradient killer"]
    monkeypatch.setattr(confusion, "PLANTED", {"b": Case(killed.make, reference=HONEST["ReLU, not robust"].make)})
    assert main(["confusion", "--num-examples", "24", "--budget", "full"]) == 0
    printed = capsys.readouterr().out
    assert asked == [(24, "full", False), (24, "full", True)]
    assert "| a | honest | passed |" in printed
    assert "| b | planted | flagged | " in printed
    assert "| planted | 1 | 0 |" in printed
