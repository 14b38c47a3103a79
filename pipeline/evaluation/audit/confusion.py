"""The audit's own test: which planted defences it flags, which honest models it lets pass, and by which checks."""

from collections.abc import Iterator
from typing import Literal

from pipeline.config.base import ThreatModel
from pipeline.evaluation.audit import audit
from pipeline.evaluation.audit.planted import HONEST, PLANTED, Case, Digits
from pipeline.evaluation.records import AuditReport


def audited(
    num_examples: int, budget: Literal["quick", "full"], *, seed: int = 0
) -> Iterator[tuple[str, bool, AuditReport]]:
    """(name, whether it is planted, report) of every case; models are trained on the way."""
    digits = Digits.load()
    for planted, cases in ((False, HONEST), (True, PLANTED)):
        for name, case in cases.items():
            yield name, planted, audit_case(case, digits, num_examples, budget, seed=seed)


def audit_case(
    case: Case, digits: Digits, num_examples: int, budget: Literal["quick", "full"], *, seed: int = 0
) -> AuditReport:
    """Train one case and audit it on the first test images."""
    reference = None if case.reference is None else case.reference(digits)
    x, y = digits.test_x[:num_examples], digits.test_y[:num_examples]
    return audit(case.make(digits), x, y, ThreatModel(eps=case.eps), budget, seed=seed, reference=reference)


def confusion_table(*, num_examples: int, budget: Literal["quick", "full"]) -> str:
    """A Markdown table of every case, and the four counts below it."""
    rows = ["| model | truth | verdict | failed | warned |", "|---|---|---|---|---|"]
    counts = {(planted, passed): 0 for planted in (False, True) for passed in (False, True)}
    for name, planted, report in audited(num_examples, budget):
        counts[planted, report.passed] += 1
        warned = [check.name for check in report.checks if check.verdict == "warn"]
        verdict = "passed" if report.passed else "flagged"
        truth = "planted" if planted else "honest"
        rows.append(f"| {name} | {truth} | {verdict} | {', '.join(report.failed)} | {', '.join(warned)} |")
    rows += [
        "",
        "| | flagged | passed |",
        "|---|---|---|",
        f"| planted | {counts[True, False]} | {counts[True, True]} |",
        f"| honest | {counts[False, False]} | {counts[False, True]} |",
    ]
    return "\n".join(rows)
