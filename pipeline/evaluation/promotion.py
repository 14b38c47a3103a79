"""The gate between candidate and champion: what must be shown before an activation is recommended to others."""

from pathlib import Path

from pipeline.config.base import Section
from pipeline.config.evaluation import FULL_AUDIT_EXAMPLES
from pipeline.evaluation.audit import CHECKS
from pipeline.evaluation.records import ARRAYS, AuditReport, Evaluation
from pipeline.evaluation.stats import Difference, difference, mcnemar
from pipeline.training.files import read_directory
from pipeline.training.model_io import ModelMeta, load_model, model_directory
from sparta_models import ACTIVATIONS, Activation


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

    The records do not say what networks they are of: see `control_reasons`.

    Args:
        evaluation: of a network with the candidate activation.
        control: of the ReLU network of equal budget, on the same data under the same threat and attacks.
        audit: of the candidate; by default `evaluation.audit` is what to pass.
        paired: mcnemar() over the two unions, where the per-example arrays are at hand: a narrower interval.
    """
    reasons = [*_audit_reasons(evaluation, audit), *_sample_reasons(evaluation)]
    reasons += [*_attack_reasons(evaluation, "the candidate"), *_attack_reasons(control, "the control")]
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


def control_reasons(candidate: Path, control: Path) -> list[str]:
    """Why the network saved in `control` is no ReLU control of the one saved in `candidate`; empty where it is.

    Raises:
        ValueError: one of the directories is missing, incomplete or altered.
    """
    reasons = []
    kinds = {type(module) for module in load_model(control).modules() if isinstance(module, Activation)}
    if kinds != {ACTIVATIONS["relu"]}:
        found = ", ".join(sorted(kind.__name__ for kind in kinds)) or "no activation"
        reasons.append(f"expected ReLU at every site of the control, got {found}")
    ours, theirs = (
        ModelMeta.model_validate(read_directory(model_directory(path), record="model.json")[1])
        for path in (candidate, control)
    )
    if (ours.name, ours.options) != (theirs.name, theirs.options):
        reasons.append(
            f"expected a control of the candidate's architecture, {ours.name} {ours.options}, "
            f"got {theirs.name} {theirs.options}"
        )
    return reasons


def paired_gain(candidate: Path, control: Path, what: str = "union") -> Difference | None:
    """Paired difference of the robust accuracies (`what`: of the clean ones) in two evaluation directories.

    Returns:
        None where they are not over the same images, the arrays of one are not there, or robust accuracies are under
        another threat or other attacks.

    Raises:
        ValueError: the arrays of one are altered.
    """
    directories = (candidate, control)
    records = [Evaluation.load(directory) for directory in directories]
    same = records[0].data_digest == records[1].data_digest and records[0].n == records[1].n
    if what == "union":
        one, other = ((record.config.threat, record.config.attacks) for record in records)
        same = same and one == other
    if not same or not all((directory / ARRAYS).is_file() for directory in directories):
        return None
    a, b = (record.arrays(directory) for record, directory in zip(records, directories, strict=True))
    return mcnemar(a[f"correct/{what}"].astype(bool), b[f"correct/{what}"].astype(bool))


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
    if missing := [number for number in range(1, len(CHECKS) + 1) if number not in {c.number for c in audit.checks}]:
        reasons.append(f"the audit is an older one, without check {', '.join(map(str, missing))}: evaluate again")
    if audit.failed:
        reasons.append(f"the audit failed: {', '.join(audit.failed)}")
    if audit.model_digest != evaluation.model_digest:
        reasons.append("the audit is of other weights than the evaluation: evaluate and audit the same model")
    if audit.threat != evaluation.config.threat:
        reasons.append(
            f"the audit is under {audit.threat.label}, the evaluation under {evaluation.config.threat.label}"
        )
    return reasons


def _sample_reasons(evaluation: Evaluation) -> list[str]:
    wanted = min(FULL_AUDIT_EXAMPLES, evaluation.split_size)
    if evaluation.n >= wanted:
        return []
    return [
        f"expected at least {wanted} of the {evaluation.split_size} test images, got {evaluation.n}: "
        "leave evaluation.num_examples unset, or raise it"
    ]


def _attack_reasons(evaluation: Evaluation, who: str) -> list[str]:
    if any(result.name == "autoattack" for result in evaluation.attacks):
        return []
    return [f"expected AutoAttack on {who}, got none: evaluate with evaluation.attacks=full"]


def _mismatch(evaluation: Evaluation, control: Evaluation) -> str | None:
    """What the two evaluations do not share, or why they are no pair, in words."""
    a, b = evaluation, control
    ran = [", ".join(result.name for result in found.attacks) for found in (a, b)]
    references = (a.reference_digest, b.reference_digest)
    conditions = (
        (a.model_digest != b.model_digest, "they are of the same weights"),
        (a.data_digest == b.data_digest, f"other data ({a.dataset} and {b.dataset})"),
        (a.config.threat == b.config.threat, f"other threats ({a.config.threat.label} and {b.config.threat.label})"),
        (a.config.attacks == b.config.attacks, "other attacks, or in other strength"),
        (ran[0] == ran[1], f"other attacks ran ({ran[0]} and {ran[1]})"),
        (references == (b.model_digest, a.model_digest), "each needs the other as its reference (--reference)"),
        (a.n == b.n, f"other numbers of examples ({a.n} and {b.n})"),
    )
    return next((reason for holds, reason in conditions if not holds), None)
