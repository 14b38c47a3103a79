"""Single checks of the audit, on models made so that only the matter at hand can decide."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from pipeline.config.base import ThreatModel
from pipeline.evaluation import AuditReport, Check, audit
from pipeline.evaluation.audit import (
    boundary,
    determinism,
    equal_cost,
    finite_difference,
    frozen,
    gate_attack,
    gate_saturation,
    gradient_census,
    loss_surface,
    noise,
    random_gate,
)
from pipeline.evaluation.audit.bpda import RULES
from pipeline.evaluation.audit.chunks import fooled
from pipeline.evaluation.audit.gates import Parts
from pipeline.evaluation.audit.planted import PLANTED, Lambda, small_cnn
from pipeline.evaluation.audit.subject import Subject
from pipeline.evaluation.audit.verdict import in_vain, judged, largest
from sparta_models import Activation, build_activation

THREAT = ThreatModel(eps=0.1)


def subject_of(model, x, y, threat=THREAT) -> Subject:
    return Subject(model, x, y, threat, "quick", 0, None)


def always_wrong(model, x):
    with torch.no_grad():
        return (model(x).argmax(1) + 1) % 10


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_random_line_is_as_long_as_eps_for_every_image(norm, robust):
    x = torch.full((8, 1, 8, 8), 0.5)
    subject = subject_of(robust, x, torch.zeros(8, dtype=torch.int64), ThreatModel(norm=norm, eps=0.3))
    delta = (loss_surface.random_end(subject, x) - x).flatten(1)
    length = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    torch.testing.assert_close(length, torch.full((8,), 0.3))


class _Unpinned(Activation):
    """Frozen by name alone: its gate's batch norm follows `.train()`."""

    def __init__(self, num_channels, norm):
        super().__init__(num_channels)
        self.norm = norm

    def forward(self, x):
        return x * torch.sigmoid(self.norm(x))

    def train(self, mode=True):
        return nn.Module.train(self, mode)


class _Pinned(_Unpinned):
    train = Activation.train


class _PinnedMode(_Unpinned):
    def train(self, mode=True):
        return nn.Module.train(self, False)


@pytest.mark.parametrize(
    ("kind", "norm", "verdict"),
    [
        (_Pinned, lambda: nn.BatchNorm2d(16), "pass"),
        (_Unpinned, lambda: nn.BatchNorm2d(16, affine=False), "fail"),  # its mode moves
        (_PinnedMode, lambda: nn.Conv2d(16, 16, 1), "fail"),  # its parameters may learn
        (_Pinned, lambda: nn.BatchNorm2d(16, track_running_stats=False), "fail"),  # there is nothing to pin
    ],
)
def test_a_frozen_activation_must_keep_its_mode_and_its_statistics(kind, norm, verdict, digits):
    model = small_cnn(lambda c: kind(c, norm()).freeze() if c == 16 else nn.ReLU()).eval()
    subject = subject_of(model, digits.test_x[:4], digits.test_y[:4])
    learning = frozenset(parameter for parameter in model.parameters() if parameter.requires_grad)
    assert frozen.check(replace(subject, learning=learning)).verdict == verdict
    assert not any(module.training for module in model.modules())


def test_a_frozen_activation_that_was_made_to_learn_again_is_noticed_and_left_so(digits):
    model = small_cnn(lambda c: build_activation("sparta", c).freeze()).eval()
    for parameter in (loose := model[1]).parameters():
        parameter.requires_grad_(True)
    report = audit(model, digits.test_x[:4], digits.test_y[:4], THREAT, "quick", seed=0)
    assert report.checks[15].verdict == "fail"
    assert "not frozen after all: 1" in report.checks[15].summary
    assert all(parameter.requires_grad for parameter in loose.parameters())


def test_one_saturated_site_of_nine_is_not_lost_in_the_mean(digits):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1)]
    for i in range(9):
        layers += [build_activation("sparta", 4, beta=1e4 if i == 4 else 1.0), nn.Conv2d(4, 4, 3, padding=1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10)).eval()
    with torch.no_grad():
        y = model(digits.test_x[:16]).argmax(1)
    found = gate_saturation.check(subject_of(model, digits.test_x[:16], y))
    assert sum(found.details["saturated, by site"]) / 9 < gate_saturation.WARN
    assert found.verdict == "fail"
    assert "number 5 of 9" in found.summary


@pytest.mark.parametrize("bias", [True, False])
def test_a_flat_area_on_the_kinks_of_an_honest_network_is_no_fault_of_its_gradient(bias):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1, bias=bias), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)]
    model = nn.Sequential(*layers).eval()
    x = torch.zeros(8, 1, 8, 8)
    assert finite_difference.check(subject_of(model, x, model(x).argmax(1))).verdict == "pass"


class _NotANumber(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * float("nan")


def test_a_derivative_that_is_no_number_is_wrong(robust, digits):
    model = nn.Sequential(Lambda(robust, before=_NotANumber.apply)).eval()
    assert finite_difference.check(subject_of(model, digits.test_x[:8], digits.test_y[:8])).figure == 1


def test_an_image_that_is_no_number_fools_nobody(robust, digits):
    problem = subject_of(robust, digits.test_x[:8], digits.test_y[:8]).problem("nan")
    assert not fooled(lambda part: torch.full_like(part.x, float("nan")), problem).any()
    assert fooled(lambda part: part.x, replace(problem, y=always_wrong(robust, problem.x))).all()


def test_dead_gradients_of_all_correct_images_are_a_failure_however_few_these_are(robust, digits):
    x, y = digits.test_x[:64], always_wrong(robust, digits.test_x[:64])
    y[:8] = robust(x[:8]).argmax(1)
    model = Lambda(robust, before=lambda x: x * 1.0, after=lambda logits: logits.detach() + 0 * logits).eval()
    found = gradient_census.check(subject_of(model, x, y))
    assert (found.verdict, found.details["count"], found.details["share"]) == ("fail", 8, 1)


PARTS_IN_FLOAT32 = {
    "input": {"before": lambda x: x.float().type_as(x)},
    "softmax": {"after": lambda z: torch.log_softmax(z.float(), 1).type_as(z)},
}


@pytest.mark.parametrize("part", sorted(PARTS_IN_FLOAT32))
@pytest.mark.parametrize("side", [8, 224])
def test_an_honest_network_with_parts_in_float32_is_not_condemned(part, side):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(72, 10)
    )
    x = torch.rand(8, 3, side, side)
    model = Lambda(net, **PARTS_IN_FLOAT32[part]).eval()
    found = finite_difference.check(subject_of(model, x, model(x).argmax(1)))
    assert (found.verdict, "parts of the model run in float32" in found.summary) == ("skip", True)
    honest = finite_difference.check(subject_of(net.eval(), x, net(x).argmax(1)))
    assert honest.verdict == "pass"


def test_what_all_logits_of_an_image_have_in_common_hides_no_noise(robust, digits):
    class Shifted(nn.Module):
        def forward(self, x):
            torch.manual_seed(len(x))
            return robust(x) * (1 + 0.05 * torch.randn(len(x), 1)) + 1e3 * x.mean((1, 2, 3))[:, None]

    found = determinism.check(subject_of(Shifted(), digits.test_x[:32], digits.test_y[:32]))
    assert found.verdict == "fail"
    assert found.figure > 0.01


def test_a_change_of_class_needs_two_classes(robust, digits):
    x, y = digits.test_x[:32], digits.test_y[:32]
    alone = boundary.check(subject_of(robust, x[y == y[0]][:1], y[:1]))
    assert (alone.verdict, boundary.check(subject_of(robust, x, y)).verdict) == ("skip", "pass")


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_jump_at_the_change_of_class_is_seen_at_any_scale(scale, robust, digits):
    x, y = digits.test_x[:32], digits.test_y[:32]
    decoy = PLANTED["decoy margin"].make(digits)
    honest, jumping = (boundary.check(subject_of(Lambda(m, after=lambda z: scale * z), x, y)) for m in (robust, decoy))
    assert (honest.figure, jumping.figure) == (0.0, 1.0)


def test_the_largest_figure_is_not_a_number_where_any_is_none():
    nan = float("nan")
    assert largest([1.0, 3.0, 2.0]) == 3.0
    for figures in ([nan, 1.0], [1.0, nan, 2.0], [1.0, nan]):
        assert largest(figures) != largest(figures)
    assert judged(1, "x", largest([0.0, nan]), warn=1, fail=2, summary="").verdict == "fail"


def test_logits_that_are_no_numbers_for_a_lone_image_fail_determinism(robust, digits):
    class NotAlone(nn.Module):
        def forward(self, x):
            return robust(x) if len(x) > 1 else robust(x) * float("nan")

    assert determinism.check(subject_of(NotAlone(), digits.test_x[:4], digits.test_y[:4])).verdict == "fail"


def test_a_loss_that_is_no_number_in_a_random_direction_fails_its_surface(robust, digits):
    x = digits.test_x[:8]

    class OnlyThere(nn.Module):
        def forward(self, z):
            return robust(z) if torch.equal(z, x) else robust(z) * float("nan")

    with torch.no_grad():
        subject = subject_of(OnlyThere(), x, robust(x).argmax(1))
    subject.__dict__["white_adv"] = x  # the attack gets nowhere: that line has no roughness
    found = loss_surface.check(subject)
    assert found.details["adversarial"] == 0
    assert found.verdict == "fail"


def test_checks_over_correct_images_are_skipped_where_there_are_none(gated, digits):
    x = digits.test_x[:8]
    subject = subject_of(gated, x, always_wrong(gated, x))
    assert gradient_census.check(subject).verdict == gate_saturation.check(subject).verdict == "skip"


def test_the_audit_of_a_gated_model_that_is_always_wrong_is_read_back_as_written(gated, digits):
    x = digits.test_x[:16]
    report = audit(gated, x, always_wrong(gated, x), ThreatModel(eps=0.001), "quick", seed=3)
    assert {"gradient_census", "gate_saturation"} <= {c.name for c in report.checks if c.verdict == "skip"}
    assert AuditReport.model_validate_json(report.model_dump_json()) == report


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_doctored_backward_pass_leaves_the_forward_pass_as_it_is(name):
    g = torch.linspace(-3e7, 3e7, 1001)
    parts = Parts(torch.zeros_like(g), torch.ones_like(g), g)
    assert torch.equal(RULES[name](0, parts), torch.sigmoid(g))


def test_a_network_that_runs_in_float32_alone_is_set_beside_the_gate_without_its_cost(gated, robust, digits):
    class Float32Only(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            if x.dtype != torch.float32:
                raise TypeError("float32 alone")
            return self.inner(x)

    x, y = digits.test_x[:8], digits.test_y[:8]
    check = Check(
        number=15,
        name="random_gate",
        verdict="pass",
        figure=0.0,
        warn_above=0.1,
        fail_above=0.2,
        summary="",
        details={},
    )
    for model, other in ((gated, Float32Only(robust)), (Float32Only(gated), robust)):
        subject = Subject(model, x, y, THREAT, "quick", 0, None, {"other": other})
        found = equal_cost.beside_equal_cost(subject, check)
        assert "a cost that could not be counted" in found.summary
        assert "robust, other" in found.details
        assert "cost, other" not in found.details


def test_nobody_is_impersonated_where_all_images_are_of_one_class(gated, digits):
    x = digits.test_x[digits.test_y == 3][:8]
    found = gate_attack.check(subject_of(gated, x, torch.full((8,), 3)))
    assert "fooled by displace" in found.details
    assert "fooled by impersonate" not in found.details


def test_a_report_says_seed_and_reference_and_an_older_one_is_still_read(robust, gated, digits):
    x, y = digits.test_x[:4], digits.test_y[:4]
    report = audit(gated, x, y, THREAT, "quick", seed=7, reference=robust)
    assert report.seed == 7
    assert report.reference_digest not in (None, report.model_digest)
    older = report.model_dump(mode="json", exclude={"seed", "reference_digest"})
    assert AuditReport.model_validate(older).reference_digest is None


def test_a_check_that_could_show_nothing_is_no_pass(gated, digits):
    few, n = 1, 64
    subject = subject_of(gated, digits.test_x[:n], digits.test_y[:n])
    subject.__dict__["survives"] = torch.arange(int(subject.clean_correct.sum())) < few
    for check in (noise.check, gate_attack.check, random_gate.check):
        found = check(subject)
        assert found.verdict == "skip"
        assert f"{few} of {n} examples withstand" in found.summary
    subject.__dict__["survives"] = torch.arange(int(subject.clean_correct.sum())) < 2 * few
    del subject.__dict__["survivors"]
    assert noise.check(subject).verdict != "skip"
    assert in_vain(2, "convergence", 2, 64, 0.01) is not None
    assert in_vain(2, "convergence", 3, 64, 0.01) is None
    assert in_vain(4, "black_box", 0, 64, 0.005) is not None
