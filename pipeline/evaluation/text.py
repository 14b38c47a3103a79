"""An evaluation as plain text for a terminal."""

from collections.abc import Sequence

from pipeline.config.base import radius_label
from pipeline.evaluation.records import AuditReport, ClassResult, Evaluation

_NUM_CLASSES = 10


def describe(result: Evaluation) -> str:
    """Accuracies, curve, classes, warnings and audit, one line each."""
    images = f"{result.n} of {result.split_size} test images of {result.dataset}"
    lines = [f"{images}, {result.config.threat.label}, seed {result.seed}, weights {result.model_digest[:12]}"]
    lines.append(f"{'clean':<24} {result.clean}")
    lines += [
        f"{attack.name:<24} {attack.accuracy}  {attack.fooled} of {attack.attacked} fooled" for attack in result.attacks
    ]
    lines.append(f"{'union':<24} {result.union}")
    lines += [f"{attack.threat.label + ' ' + attack.name:<24} {attack.accuracy}" for attack in result.other_threats]
    lines += [f"{f'eps {radius_label(point.eps)}':<24} {point.accuracy}" for point in result.curve]
    lines += _class_lines(result.per_class)
    lines += [f"warning: {warning}" for warning in result.warnings]
    if result.audit is not None:
        lines += ["", *_audit_lines(result.audit)]
    return "\n".join(lines)


def _class_lines(classes: Sequence[ClassResult]) -> list[str]:
    """Robust and clean accuracy of every class, of the least robust ones where there are many."""
    worst = sorted(range(len(classes)), key=lambda number: classes[number].robust.value)[:_NUM_CLASSES]
    shown = [classes[number] for number in sorted(worst)]
    lines = [f"{f'class {found.name}':<24} {found.robust}, clean {found.clean}" for found in shown]
    left = len(classes) - len(shown)
    return [*lines, f"and {left} classes that are no less robust"] if left else lines


def _audit_lines(report: AuditReport) -> list[str]:
    verdict = "passed" if report.passed else f"FAILED ({', '.join(report.failed)})"
    lines = [f"audit, budget {report.budget}, n = {report.n}: {verdict}"]
    for check in report.checks:
        figure = f"{'':>9}" if check.figure is None else f"{check.figure:9.4f}"
        limit = "" if check.fail_above is None else f" (fails above {check.fail_above:g})"
        lines.append(f"{check.number:3d} {check.name:<18} {check.verdict:<5} {figure}  {check.summary}{limit}")
    return lines
