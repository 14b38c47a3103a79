import re
from pathlib import Path

import pytest
import torch

from pipeline.config.base import ThreatModel
from pipeline.config.evaluation import EvaluationConfig
from pipeline.evaluation import CHECKS, Accuracy, AuditReport, Check, Evaluation, difference, mcnemar, promotion_verdict
from pipeline.evaluation.promotion import control_reasons, paired_gain
from pipeline.evaluation.records import AttackResult
from pipeline.training.model_io import ModelMeta, save_model

THREAT = ThreatModel(eps=0.1)


def evaluation(
    correct: int, *, n: int = 200, of: int = 200, data: str = "d", attacks=("autoattack",), threat=THREAT, own="m",
    other="c",
) -> Evaluation:  # fmt: skip
    """Of the candidate "m" with the control "c" as its reference, unless told otherwise."""
    union, clean = Accuracy.of(correct, n), Accuracy.of(min(n, 180), n)
    results = tuple(
        AttackResult(name=name, threat=threat, attacked=180, fooled=180 - correct, accuracy=union) for name in attacks
    )
    return Evaluation(
        dataset=data, data_digest=data, model_digest=own, reference_digest=other, seed=0, n=n, split_size=of,
        clean=clean, union=union, config=EvaluationConfig(threat=threat), attacks=results, other_threats=(), curve=(),
        per_class=(), warnings=(), arrays_sha256="",
    )  # fmt: skip


def control(correct: int, *, own="c", other="m", **changes) -> Evaluation:
    return evaluation(correct, own=own, other=other, **changes)


def report(*, budget="full", verdict="pass", digest="m", threat=THREAT) -> AuditReport:
    checks = tuple(
        Check(
            number=number, name="black_box" if number == 4 else f"check {number}", figure=0.0, warn_above=0.0,
            verdict=verdict if number == 4 else "pass", fail_above=0.0, summary="", details={},
        )
        for number in range(1, len(CHECKS) + 1)
    )  # fmt: skip
    return AuditReport(budget=budget, n=1000, threat=threat, model_digest=digest, checks=checks)


def test_an_audit_of_before_a_check_was_made_is_not_enough():
    older = report()
    older = older.model_copy(update={"checks": older.checks[:15]})
    verdict = promotion_verdict(evaluation(120), control(100), older)
    assert not verdict.allowed
    assert verdict.reasons == ("the audit is an older one, without check 16, 17: evaluate again",)


def test_a_better_audited_candidate_is_allowed_with_the_interval_stated():
    verdict = promotion_verdict(evaluation(120), control(100), report())
    assert verdict.allowed
    assert verdict.reasons == ()
    assert verdict.gain == difference(Accuracy.of(120, 200), Accuracy.of(100, 200))
    assert "60.0 % [53.1, 66.5]" in verdict.statement
    assert "+10.0 points [+0.3, +19.5]" in verdict.statement


def test_an_equal_candidate_is_allowed():
    assert promotion_verdict(evaluation(100), control(100), report()).allowed


WITHOUT = ("fgsm",)
SKIPPED = ("autoattack", "transfer-margin-20")


@pytest.mark.parametrize(
    ("candidate", "control", "audit", "reason"),
    [
        (evaluation(99), control(100), report(), "at least the control's robust accuracy, got less"),
        (evaluation(120), control(100), None, "got none: evaluate with evaluation.audit.budget=full"),
        (evaluation(120), control(100), report(budget="quick"), "audit at full budget, got quick"),
        (evaluation(120), control(100), report(verdict="fail"), "the audit failed: black_box"),
        (evaluation(120), control(100), report(digest="other"), "audit is of other weights"),
        (evaluation(120), control(100), report(threat=ThreatModel(eps=0.2)), "audit is under linf 0.2"),
        (evaluation(120), control(100, data="e"), report(), r"other data \(d and e\)"),
        (evaluation(120), control(100, n=190), report(), r"other numbers of examples \(200 and 190\)"),
        (evaluation(120), control(100, threat=ThreatModel(eps=0.2)), report(), "other threats"),
        (evaluation(100), evaluation(100), report(), "they are of the same weights"),
        (evaluation(120, attacks=SKIPPED), control(100), report(), r"ran \(autoattack, transfer-margin-20 and autoat"),
        (evaluation(120, other=None), control(100), report(), "each needs the other as its reference"),
        (evaluation(120, other="m"), control(100), report(), "each needs the other as its reference"),
        (evaluation(120), control(100, other="c"), report(), "each needs the other as its reference"),
        (evaluation(10, n=16), control(8, n=16), report(), "expected at least 200 of the 200 test images, got 16"),
        (
            evaluation(120, of=10_000),
            control(100, of=10_000),
            report(),
            "expected at least 1000 of the 10000 test images, got 200",
        ),
    ],
)
def test_promotion_is_refused_with_the_reason(candidate, control, audit, reason):
    verdict = promotion_verdict(candidate, control, audit)
    assert not verdict.allowed
    assert len(verdict.reasons) == 1
    assert re.search(reason, verdict.reasons[0])


def test_a_thousand_of_many_images_are_enough():
    assert promotion_verdict(evaluation(600, n=1000, of=10_000), control(500, n=1000, of=10_000), report()).allowed


def test_autoattack_is_asked_of_both():
    verdict = promotion_verdict(evaluation(120, attacks=WITHOUT), control(100, attacks=WITHOUT), report())
    assert [re.findall("AutoAttack on the (.*), got none", reason) for reason in verdict.reasons] == [
        ["candidate"],
        ["control"],
    ]


def test_a_full_audit_of_few_images_is_not_one():
    few = report().model_copy(update={"n": 199})
    verdict = promotion_verdict(evaluation(120), control(100), few)
    assert verdict.reasons == ("expected an audit of 200 images, got 199: leave evaluation.audit.num_examples unset",)


def test_a_candidate_that_was_attacked_otherwise_than_its_control_is_not_compared():
    other = control(100)
    weaker = other.config.model_copy(update={"attacks": other.config.attacks[:1]})
    verdict = promotion_verdict(evaluation(120), other.model_copy(update={"config": weaker}), report())
    assert verdict.reasons == ("candidate and control cannot be compared: other attacks, or in other strength",)


def test_what_autoattack_warned_of_stands_in_the_statement():
    warned = evaluation(120).model_copy(update={"warnings": ("autoattack: randomized defense",)})
    assert "autoattack: randomized defense" in promotion_verdict(warned, control(100), report()).statement


def test_arrays_of_both_evaluations_make_the_comparison_paired(tmp_path):
    import numpy as np

    from pipeline.artifacts import digest_file

    unions = np.arange(200) < 120, np.arange(200) < 100
    for name, union in zip("ab", unions, strict=True):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "evaluation.npz", **{"correct/union": union, "correct/clean": ~union})
        sealed = {"arrays_sha256": digest_file(tmp_path / name / "evaluation.npz").sha256}
        evaluation(int(union.sum())).model_copy(update=sealed).save(tmp_path / name)
    assert paired_gain(tmp_path / "a", tmp_path / "b") == mcnemar(*unions)
    assert paired_gain(tmp_path / "a", tmp_path / "b", "clean") == mcnemar(~unions[0], ~unions[1])
    (tmp_path / "b" / "evaluation.npz").unlink()
    assert paired_gain(tmp_path / "a", tmp_path / "b") is None


def test_all_reasons_are_given_at_once():
    verdict = promotion_verdict(evaluation(90, attacks=()), control(100), report(budget="quick", verdict="fail"))
    assert len(verdict.reasons) == 4


def saved(directory: Path, activation: str, **options) -> Path:
    torch.manual_seed(0)
    meta = ModelMeta(
        name="resnet8", options={"width": 4, **options}, activation={"name": activation}, num_classes=10, in_channels=1,
        mean=(0.3,), std=(0.4,), image_size=8, dataset="digits",
    )  # fmt: skip
    save_model(directory, meta.build(), meta)
    return directory


@pytest.mark.parametrize(
    ("activation", "options", "reason"),
    [
        ("silu", {}, "expected ReLU at every site of the control, got SiLU"),
        ("sparta", {}, "expected ReLU at every site of the control, got Sparta"),
        ("relu6", {}, "expected ReLU at every site of the control, got ReLU6"),
        ("relu", {"width": 8}, r"architecture, resnet8 \{'width': 4\}, got resnet8 \{'width': 8\}"),
    ],
)
def test_a_control_is_a_relu_network_of_the_same_architecture(tmp_path, activation, options, reason):
    candidate = saved(tmp_path / "candidate", "sparta")
    assert control_reasons(candidate, saved(tmp_path / "relu", "relu")) == []
    (found,) = control_reasons(candidate, saved(tmp_path / "control", activation, **options))
    assert re.search(reason, found)


def test_a_control_that_is_not_there_is_bad_input(tmp_path):
    with pytest.raises(ValueError, match="expected a complete directory"):
        control_reasons(saved(tmp_path / "candidate", "sparta"), tmp_path / "nowhere")
