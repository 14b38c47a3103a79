"""An evaluation as plain text for a terminal."""

from pipeline.evaluation.records import AuditReport, Evaluation


def describe(result: Evaluation) -> str:
    """Accuracies, curve, warnings and audit, one line each."""
    threat = result.config.threat.label
    lines = [f"{result.dataset}, {threat}, seed {result.seed}, weights {result.model_digest[:12]}"]
    lines.append(f"{'clean':<24} {result.clean}")
    lines += [
        f"{attack.name:<24} {attack.accuracy}  {attack.fooled} of {attack.attacked} fooled" for attack in result.attacks
    ]
    lines.append(f"{'union':<24} {result.union}")
    lines += [f"{attack.threat.label + ' ' + attack.name:<24} {attack.accuracy}" for attack in result.other_threats]
    lines += [f"{f'eps {point.eps:.4g}':<24} {point.accuracy}" for point in result.curve]
    lines += [f"warning: {warning}" for warning in result.warnings]
    if result.audit is not None:
        lines += ["", *_audit_lines(result.audit)]
    return "\n".join(lines)


def _audit_lines(report: AuditReport) -> list[str]:
    verdict = "passed" if report.passed else f"FAILED ({', '.join(report.failed)})"
    lines = [f"audit, budget {report.budget}, n = {report.n}: {verdict}"]
    for check in report.checks:
        figure = f"{'':>9}" if check.figure is None else f"{check.figure:9.4f}"
        limit = "" if check.fail_above is None else f" (fails above {check.fail_above:g})"
        lines.append(f"{check.number:3d} {check.name:<18} {check.verdict:<5} {figure}  {check.summary}{limit}")
    return lines
