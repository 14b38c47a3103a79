from types import MethodType

import pytest
import torch
from torch import nn

from pipeline.config.base import ThreatModel
from pipeline.evaluation import CHECKS, audit
from pipeline.evaluation.attacks import Problem
from pipeline.evaluation.audit.confusion import audit_case
from pipeline.evaluation.audit.gates import gate_maps, gated_sites, gates_replaced, parts
from pipeline.evaluation.audit.gradient_free import rays, spsa
from pipeline.evaluation.audit.planted import HONEST, PLANTED, small_cnn
from pipeline.evaluation.audit.verdict import judged, judged_share
from sparta_models import ActivationBank, Sparta, build_activation, build_model
from sparta_models.activations.gates import GATES

N = 128
CAUGHT_BY = {
    "gradient killer": {"eps_curve", "black_box", "gradient_census", "finite_difference"},
    "detached input": {"eps_curve", "black_box", "gradient_census", "finite_difference"},
    "shattered gradient": {"black_box", "finite_difference"},
    "k-WTA": {"black_box", "loss_surface"},
    "k-WTA, adversarially trained": {"black_box", "loss_surface"},
    "saturated gates": {"gate_saturation"},
    "one saturated site": {"gate_saturation"},
    "randomised logits": {"determinism", "finite_difference", "loss_surface"},
    "batch-dependent": {"determinism"},
    "label leaking": {"one_step"},
    "quantised input": {"eps_curve", "black_box", "gradient_census", "loss_surface"},
    "decoy margin": {"boundary"},
    "remembered queries": {"determinism"},
    "underflowing logits": {"losses", "gradient_census"},
}


@pytest.mark.parametrize("name", sorted(PLANTED))
def test_a_planted_defence_is_flagged_by_the_checks_made_for_it(name, digits):
    report = audit_case(PLANTED[name], digits, N, "quick")
    assert not report.passed
    assert set(report.failed) >= CAUGHT_BY[name]


@pytest.mark.parametrize("name", sorted(HONEST))
def test_an_honest_model_passes(name, digits):
    report = audit_case(HONEST[name], digits, N, "quick")
    assert report.passed, report.failed
    assert report.n == N
    by_name = {check.name: check for check in report.checks}
    assert ("fooled by the reference" in by_name["transfer"].details) is (name == "Sparta, with a reference")
    assert (by_name["frozen"].verdict != "skip") is (name == "Sparta, frozen and transferred")


def test_every_check_reports_once_in_its_order(gated, robust, digits):
    report = audit(
        gated,
        digits.test_x[:32],
        digits.test_y[:32],
        ThreatModel(norm="l2", eps=0.5),
        "quick",
        seed=0,
        reference=robust,
    )
    assert [check.number for check in report.checks] == list(range(1, 18))
    assert len(CHECKS) == len({check.name for check in report.checks}) == 17
    judged_ones = [check for check in report.checks if check.verdict != "skip"]
    assert all(check.figure is not None and check.fail_above is not None for check in judged_ones)
    assert [check.name for check in report.checks if check.verdict == "skip"] == ["frozen"]


def test_networks_of_equal_cost_are_set_beside_the_gate(digits, gated, robust):
    class Constant(nn.Module):
        """As costly as the gated network, and always right on images of the class of `clean`."""

        def __init__(self, clean):
            super().__init__()
            self.inner, self.clean = gated, clean

        def forward(self, x):
            return self.inner(x * 0 + self.clean)

    with torch.no_grad():
        right = gated(digits.test_x).argmax(1) == digits.test_y
    x, y = digits.test_x[right], digits.test_y[right]
    x, y = x[y == y[0]][:32], y[y == y[0]][:32]
    matched = {"constant": Constant(x[:1]), "relu": robust}
    report = audit(gated, x, y, ThreatModel(eps=0.3), "quick", seed=0, matched=matched)
    check = report.checks[14]
    assert (check.details["robust, constant"], check.details["cost, constant"]) == (1.0, 1.0)
    assert check.details["robust"] < 0.5
    assert check.details["gain over constant"][2] < 0
    assert (check.verdict, "more robust at no more cost: constant" in check.summary) == ("warn", True)
    assert check.details["cost, relu"] < 1  # the gates of a fused kernel are counted too
    assert set(report.matched) == set(matched)


def test_checks_of_gates_are_skipped_without_gates(robust, digits):
    report = audit(robust, digits.test_x[:16], digits.test_y[:16], ThreatModel(eps=0.1), "quick", seed=0)
    skipped = {check.name for check in report.checks if check.verdict == "skip"}
    assert skipped == {"transfer", "gate_saturation", "bpda", "gate_attack", "random_gate", "frozen"}


def test_an_audit_repeats_exactly_even_on_a_random_model(digits):
    model = PLANTED["randomised logits"].make(digits)
    x, y = digits.test_x[:32], digits.test_y[:32]
    first, second = (audit(model, x, y, ThreatModel(eps=0.1), "quick", seed=0) for _ in range(2))
    assert first == second


def test_the_full_budget_runs_and_an_honest_model_passes_it(gated, digits):
    report = audit(gated, digits.test_x[:16], digits.test_y[:16], ThreatModel(eps=0.1), "full", seed=0)
    assert (report.budget, report.passed) == ("full", True)


def test_an_audit_without_images_is_refused(robust, digits):
    with pytest.raises(ValueError, match="expected images to audit, got none"):
        audit(robust, digits.test_x[:0], digits.test_y[:0], ThreatModel(eps=0.1), "quick", seed=0)


def test_a_model_that_is_always_wrong_has_nothing_to_hide(digits):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        wrong = (model(digits.test_x).argmax(1) + 1) % 10
    report = audit(model, digits.test_x[:16], wrong[:16], ThreatModel(eps=0.01), "quick", seed=0)
    assert report.passed


def transferred(digits) -> nn.Module:
    options = {"num_classes": 10, "in_channels": 1, "width": 4}
    torch.manual_seed(0)
    bank = ActivationBank.from_model(build_model("resnet8", activation="sparta", **options))
    target = build_model("resnet8", activation="sparta", **options)
    bank.apply_to(target, freeze=True)
    return target.eval()


def test_a_frozen_transferred_model_is_checked_for_being_frozen(digits):
    model, x, y = transferred(digits), digits.test_x[:16], digits.test_y[:16]
    report = audit(model, x, y, ThreatModel(eps=0.1), "quick", seed=0)
    assert (report.checks[15].name, report.checks[-1].verdict) == ("frozen", "pass")
    site = next(iter(gated_sites(model).values()))
    site.train = MethodType(nn.Module.train, site)  # no longer that of a frozen activation
    site.requires_grad_(requires_grad=True)
    report = audit(model, x, y, ThreatModel(eps=0.1), "quick", seed=0)
    assert report.checks[15].verdict == "fail"
    assert "not frozen after all" in report.checks[15].summary


@pytest.mark.parametrize("variant", sorted(GATES))
def test_the_parts_of_a_gated_site_give_its_output(variant):
    torch.manual_seed(0)
    site = build_activation("sparta", 8, variant=variant, bias=True)
    assert isinstance(site, Sparta)
    with torch.no_grad():
        for parameter in site.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, 8, 5, 5)
    base, value, g = parts(site, x)
    torch.testing.assert_close(base + value * torch.sigmoid(g), site(x))


def test_recording_gates_changes_no_logit_and_leaves_no_hook(gated, digits):
    x = digits.test_x[:4]
    logits, maps = gate_maps(gated, x)
    torch.testing.assert_close(logits, gated(x))
    assert [tuple(phi.shape) for phi in maps] == [(4, 16, 8, 8), (4, 32, 4, 4)]
    assert all(((phi > 0) & (phi < 1)).all() for phi in maps)
    with pytest.raises(RuntimeError, match="inside"), gates_replaced(gated, lambda *_: 1 / 0):
        raise RuntimeError("inside")
    torch.testing.assert_close(gated(x), logits)


def test_a_shared_gate_is_recorded_once_per_call():
    torch.manual_seed(0)
    shared = build_activation("sparta", 4)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), shared, nn.Conv2d(4, 4, 3, padding=1), shared)
    for _ in range(2):
        assert len(gate_maps(model, torch.rand(1, 1, 6, 6))[1]) == 2


def linear_problem(eps: float, norm: str) -> tuple[Problem, torch.Tensor]:
    """Two classes, logits (0, w x + b) with x in the middle of the box: the boundary is |w x + b| / |w|_dual away."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with torch.no_grad():
        model[1].weight[0], model[1].bias[0] = 0, 0
        model[1].weight[1] = torch.where(torch.arange(16) < 8, 1.0, -1.0)
        model[1].bias[1] = -0.8
    x = torch.full((1, 1, 4, 4), 0.5)
    return Problem(model, x, torch.zeros(1, dtype=torch.int64), ThreatModel(norm=norm, eps=eps), seed=0), x


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    "attack", [lambda p: spsa(p, steps=20, num_samples=64), lambda p: rays(p, num_flips=200)], ids=["SPSA", "RayS"]
)
def test_a_gradient_free_attack_finds_a_linear_boundary_just_inside_the_ball_and_none_outside(attack, norm):
    # |w|_1 = 16 and |w|_2 = 4: the distance is 0.8 / 16 = 0.05 in linf and 0.2 in l2.
    distance = 0.05 if norm == "linf" else 0.2
    for factor, succeeds in ((1.1, True), (0.95, False)):
        problem, x = linear_problem(factor * distance, norm)
        x_adv = attack(problem)
        delta = x_adv - x
        size = delta.abs().max() if norm == "linf" else delta.norm()
        assert size <= problem.threat.eps + 1e-6
        assert (problem.model(x_adv).argmax(1).item() == 1) == succeeds


def test_verdicts_follow_the_thresholds():
    verdicts = [judged(1, "x", f, warn=0.1, fail=0.2, summary="").verdict for f in (0.1, 0.15, 0.2, 0.21, float("nan"))]
    assert verdicts == ["pass", "warn", "warn", "fail", "fail"]


def test_a_share_is_judged_by_the_lower_end_of_its_interval():
    few = judged_share(1, "x", 1, 20, warn=0.01, fail=0.04, summary="")
    many = judged_share(1, "x", 100, 2000, warn=0.01, fail=0.04, summary="")
    assert (few.verdict, many.verdict) == ("pass", "fail")  # both are 5 %


def test_planted_models_do_not_move_the_random_state(digits):
    before = torch.get_rng_state()
    HONEST["ReLU, not robust"].make(digits)
    assert torch.equal(before, torch.get_rng_state())
    assert small_cnn(lambda _: nn.ReLU(), width=4)(digits.test_x[:2]).shape == (2, 10)
