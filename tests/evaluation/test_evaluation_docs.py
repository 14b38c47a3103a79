import re
from pathlib import Path

import pytest

from pipeline.config.evaluation import SUITES, CurveConfig, EvaluationConfig, ThreatModel
from pipeline.evaluation import CHECKS, Accuracy, Evaluation, audit
from pipeline.evaluation.records import AttackResult, ClassResult, CurvePoint
from pipeline.evaluation.text import describe

GUIDE = Path(__file__).parents[2] / "docs" / "evaluation.md"


def test_the_guide_names_every_check_with_its_thresholds(gated, robust, digits):
    report = audit(
        gated, digits.test_x[:16], digits.test_y[:16], ThreatModel(eps=0.1), "quick", seed=0, reference=robust
    )
    text = GUIDE.read_text()
    rows = {row.split("|")[2].strip(): row for row in text.splitlines() if row.startswith("| ") and row.count("|") == 6}
    for check in report.checks:
        row = rows[check.name]
        assert row.split("|")[1].strip() == str(check.number)
        if check.verdict != "skip":
            limits = [float(cell) for cell in row.split("|")[4:6]]
            assert limits == [check.warn_above, check.fail_above], check.name


@pytest.mark.parametrize("suite", sorted(SUITES))
def test_the_guide_names_every_kind_of_attack(suite):
    text = GUIDE.read_text()
    for attack in SUITES[suite]:
        assert f"`{attack.kind}" in text


def shape(line: str) -> str:
    """A line without its numbers and its alignment."""
    plain = re.sub(r"weights [0-9a-f]{12}", "weights", line)
    return " ".join(re.sub(r"[+-]?\d+(\.\d+)?", "#", plain).split())


def test_the_evaluation_in_the_guide_is_what_the_command_prints():
    section = GUIDE.read_text().partition("## One evaluation with AutoAttack")[2]
    shown, _, audited = section.partition("```text\n")[2].partition("```")[0].partition("\n\n")
    some, threat = Accuracy.of(1, 2), ThreatModel()
    fields = {"dataset": "digits", "data_digest": "d", "model_digest": "a" * 64, "reference_digest": None, "seed": 0}
    result = Evaluation(
        **fields, config=EvaluationConfig(threat=threat), n=48, split_size=447, clean=some, union=some, warnings=(),
        attacks=tuple(
            AttackResult(name=attack.name, threat=threat, attacked=2, fooled=1, accuracy=some)
            for attack in SUITES["full"]
        ),
        other_threats=(), arrays_sha256="",
        curve=tuple(CurvePoint(eps=multiple, accuracy=some) for multiple in (0, *CurveConfig().multiples)),
        per_class=tuple(ClassResult(name=str(label), clean=some, robust=some) for label in range(10)),
    )  # fmt: skip
    assert [shape(line) for line in shown.splitlines()] == [shape(line) for line in describe(result).splitlines()]
    assert audited.startswith("audit, budget ")
    names = [check.__module__.rpartition(".")[2] for check in CHECKS]
    assert [line.split()[1] for line in audited.splitlines()[1:]] == names
