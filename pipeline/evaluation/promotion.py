"""The gate between candidate and champion: what must be shown before an activation is recommended to others."""

from pathlib import Path

from pipeline.config.base import Section
from pipeline.config.evaluation import FULL_AUDIT_EXAMPLES
from pipeline.evaluation.records import ARRAYS, AuditReport, Evaluation
from pipeline.evaluation.stats import Difference, difference, mcnemar


class PromotionVerdict(Section):
    """Whether a candidate may become champion."""

    allowed: bool
    """Whether every condition holds."""
    reasons: tuple[str, ...]
    """What is missing, one line each; empty when allowed."""
    gain: Difference | None
    """Robust accuracy minus the control's; none when the two cannot be compared."""
    statement: str
    """The comparison in words, with its interval."""


def promotion_verdict(
    evaluation: Evaluation, control: Evaluation, audit: AuditReport | None, *, paired: Difference | None = None
) -> PromotionVerdict:
    """Allow promotion when the audit passed at full budget, AutoAttack was run, and the control is not better.

    Args:
        evaluation: of a network with the candidate activation.
        control: of the ReLU network of equal budget, on the same data under the same threat and attacks.
        audit: of the candidate; by default `evaluation.audit` is what to pass.
        paired: mcnemar() over the two unions, where the per-example arrays are at hand: a narrower interval.
    """
    reasons = [*_audit_reasons(evaluation, audit), *_attack_reasons(evaluation, "the candidate")]
    reasons += _attack_reasons(control, "the control")
    mismatch = _mismatch(evaluation, control)
    if mismatch:
        reasons.append(f"candidate and control cannot be compared: {mismatch}")
        return PromotionVerdict(allowed=False, reasons=tuple(reasons), gain=None, statement="not compared")
    gain = paired or difference(evaluation.union, control.union)
    statement = f"robust accuracy {evaluation.union} against the control's {control.union}: {gain}"
    if warned := [warning for warning in evaluation.warnings if warning.startswith("autoattack")]:
        statement += f"; warnings: {'; '.join(warned)}"
    if gain.value < 0:
        reasons.append(f"expected at least the control's robust accuracy, got less: {statement}")
    return PromotionVerdict(allowed=not reasons, reasons=tuple(reasons), gain=gain, statement=statement)


def paired_gain(candidate: Path, control: Path) -> Difference | None:
    """Paired difference of the robust accuracies in two evaluation directories; None without the same images in both.

    Raises:
        ValueError: the arrays of one are altered.
    """
    directories = (candidate, control)
    records = [Evaluation.load(directory) for directory in directories]
    same = records[0].data_digest == records[1].data_digest and records[0].n == records[1].n
    if not same or not all((directory / ARRAYS).is_file() for directory in directories):
        return None
    a, b = (
        record.arrays(directory)["correct/union"].astype(bool)
        for record, directory in zip(records, directories, strict=True)
    )
    return mcnemar(a, b)


def _audit_reasons(evaluation: Evaluation, audit: AuditReport | None) -> list[str]:
    if audit is None:
        return ["expected an audit at full budget, got none: evaluate with evaluation.audit.budget=full"]
    reasons = []
    if audit.budget != "full":
        reasons.append(f"expected an audit at full budget, got {audit.budget}: set evaluation.audit.budget=full")
    if audit.n < min(FULL_AUDIT_EXAMPLES, evaluation.n):
        reasons.append(
            f"expected an audit of {min(FULL_AUDIT_EXAMPLES, evaluation.n)} images, got {audit.n}: "
            "leave evaluation.audit.num_examples unset"
        )
    if audit.failed:
        reasons.append(f"the audit failed: {', '.join(audit.failed)}")
    if audit.model_digest != evaluation.model_digest:
        reasons.append("the audit is of other weights than the evaluation: evaluate and audit the same model")
    if audit.threat != evaluation.config.threat:
        reasons.append(
            f"the audit is under {audit.threat.label}, the evaluation under {evaluation.config.threat.label}"
        )
    return reasons


def _attack_reasons(evaluation: Evaluation, who: str) -> list[str]:
    if any(result.name == "autoattack" for result in evaluation.attacks):
        return []
    return [f"expected AutoAttack on {who}, got none: evaluate with evaluation.attacks=full"]


def _mismatch(evaluation: Evaluation, control: Evaluation) -> str | None:
    """What the two evaluations do not share, in words."""
    if evaluation.data_digest != control.data_digest:
        return f"other data ({evaluation.dataset} and {control.dataset})"
    if evaluation.config.threat != control.config.threat:
        return f"other threats ({evaluation.config.threat.label} and {control.config.threat.label})"
    if evaluation.config.attacks != control.config.attacks:
        return "other attacks, or in other strength"
    if evaluation.n != control.n:
        return f"other numbers of examples ({evaluation.n} and {control.n})"
    return None
