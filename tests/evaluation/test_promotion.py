import pytest

from pipeline.config.evaluation import EvaluationConfig, ThreatModel
from pipeline.evaluation import Accuracy, AuditReport, Check, Evaluation, difference, mcnemar, promotion_verdict
from pipeline.evaluation.promotion import paired_gain
from pipeline.evaluation.records import AttackResult

THREAT = ThreatModel(eps=0.1)


def evaluation(correct: int, *, n: int = 200, data: str = "d", attacks=("autoattack",), threat=THREAT) -> Evaluation:
    union, clean = Accuracy.of(correct, n), Accuracy.of(180, n)
    results = tuple(
        AttackResult(name=name, threat=threat, attacked=180, fooled=180 - correct, accuracy=union) for name in attacks
    )
    return Evaluation(
        dataset=data, data_digest=data, model_digest="m", reference_digest=None, seed=0, n=n, clean=clean, union=union,
        config=EvaluationConfig(threat=threat), attacks=results, other_threats=(), curve=(), per_class=(), warnings=(),
        arrays_sha256="",
    )  # fmt: skip


def report(*, budget="full", verdict="pass", digest="m", threat=THREAT) -> AuditReport:
    check = Check(
        number=4, name="black_box", verdict=verdict, figure=0.0, warn_above=0.0, fail_above=0.0, summary="", details={}
    )
    return AuditReport(budget=budget, n=1000, threat=threat, model_digest=digest, checks=(check,))


def test_a_better_audited_candidate_is_allowed_with_the_interval_stated():
    verdict = promotion_verdict(evaluation(120), evaluation(100), report())
    assert verdict.allowed
    assert verdict.reasons == ()
    assert verdict.gain == difference(Accuracy.of(120, 200), Accuracy.of(100, 200))
    assert "60.0 % [53.1, 66.5]" in verdict.statement
    assert "+10.0 points [+0.3, +19.5]" in verdict.statement


def test_an_equal_candidate_is_allowed():
    assert promotion_verdict(evaluation(100), evaluation(100), report()).allowed


@pytest.mark.parametrize(
    ("candidate", "control", "audit", "reason"),
    [
        (evaluation(99), evaluation(100), report(), "at least the control's robust accuracy, got less"),
        (evaluation(120), evaluation(100), None, "got none: evaluate with evaluation.audit.budget=full"),
        (evaluation(120), evaluation(100), report(budget="quick"), "audit at full budget, got quick"),
        (evaluation(120), evaluation(100), report(verdict="fail"), "the audit failed: black_box"),
        (evaluation(120), evaluation(100), report(digest="other"), "audit is of other weights"),
        (evaluation(120), evaluation(100), report(threat=ThreatModel(eps=0.2)), "audit is under linf 0.2"),
        (evaluation(120, attacks=("fgsm",)), evaluation(100), report(), "AutoAttack on the candidate, got none"),
        (evaluation(120), evaluation(100, attacks=("fgsm",)), report(), "AutoAttack on the control, got none"),
        (evaluation(120), evaluation(100, data="e"), report(), r"other data \(d and e\)"),
        (evaluation(120), evaluation(100, n=190), report(), r"other numbers of examples \(200 and 190\)"),
        (
            evaluation(120, threat=ThreatModel(eps=0.1)),
            evaluation(100, threat=ThreatModel(eps=0.2)),
            report(),
            "threats",
        ),
    ],
)
def test_promotion_is_refused_with_the_reason(candidate, control, audit, reason):
    import re

    verdict = promotion_verdict(candidate, control, audit)
    assert not verdict.allowed
    assert len(verdict.reasons) == 1
    assert re.search(reason, verdict.reasons[0])


def test_a_full_audit_of_few_images_is_not_one():
    few = report().model_copy(update={"n": 199})
    verdict = promotion_verdict(evaluation(120), evaluation(100), few)
    assert verdict.reasons == ("expected an audit of 200 images, got 199: leave evaluation.audit.num_examples unset",)


def test_a_candidate_that_was_attacked_otherwise_than_its_control_is_not_compared():
    control = evaluation(100)
    stronger = control.config.model_copy(update={"attacks": control.config.attacks[:1]})
    verdict = promotion_verdict(evaluation(120), control.model_copy(update={"config": stronger}), report())
    assert verdict.reasons == ("candidate and control cannot be compared: other attacks, or in other strength",)


def test_what_autoattack_warned_of_stands_in_the_statement():
    warned = evaluation(120).model_copy(update={"warnings": ("autoattack: randomized defense",)})
    assert "autoattack: randomized defense" in promotion_verdict(warned, evaluation(100), report()).statement


def test_arrays_of_both_evaluations_make_the_comparison_paired(tmp_path):
    import numpy as np

    from pipeline.artifacts import digest_file

    unions = np.arange(200) < 120, np.arange(200) < 100
    for name, union in zip("ab", unions, strict=True):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "evaluation.npz", **{"correct/union": union})
        sealed = {"arrays_sha256": digest_file(tmp_path / name / "evaluation.npz").sha256}
        evaluation(int(union.sum())).model_copy(update=sealed).save(tmp_path / name)
    assert paired_gain(tmp_path / "a", tmp_path / "b") == mcnemar(*unions)
    (tmp_path / "b" / "evaluation.npz").unlink()
    assert paired_gain(tmp_path / "a", tmp_path / "b") is None


def test_all_reasons_are_given_at_once():
    verdict = promotion_verdict(evaluation(90, attacks=()), evaluation(100), report(budget="quick", verdict="fail"))
    assert len(verdict.reasons) == 4
