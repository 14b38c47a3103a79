import re
import sys
from pathlib import Path

import pytest

from pipeline.config.base import ThreatModel
from pipeline.config.evaluation import SUITES, CurveConfig, EvaluationConfig
from pipeline.evaluation import CHECKS, Accuracy, Evaluation
from pipeline.evaluation.audit.verdict import BEATEN_FAIL, BEATEN_WARN, judged_share
from pipeline.evaluation.records import AttackResult, ClassResult, CurvePoint
from pipeline.evaluation.text import describe

BEATEN = [4, 5, 6, 10, 11, 15]
"""Numbers of the checks whose attack must not beat the white-box attack."""
GUIDE = Path(__file__).parents[2] / "docs" / "evaluation.md"


def test_the_guide_names_every_check_with_its_thresholds():
    text = GUIDE.read_text()
    rows = {row.split("|")[2].strip(): row for row in text.splitlines() if row.startswith("| ") and row.count("|") == 6}
    for number, check in enumerate(CHECKS, start=1):
        module = sys.modules[check.__module__]
        cells = rows[check.__module__.rpartition(".")[2]].split("|")
        assert cells[1].strip() == str(number)
        limits = getattr(module, "WARN", BEATEN_WARN), getattr(module, "FAIL", BEATEN_FAIL)
        assert tuple(float(cell) for cell in cells[4:6]) == limits, check.__module__


def test_a_check_without_thresholds_of_its_own_asks_that_nothing_beats_the_white_box_attack():
    own = {check.__module__ for check in CHECKS if hasattr(sys.modules[check.__module__], "WARN")}
    assert [number for number, check in enumerate(CHECKS, start=1) if check.__module__ not in own] == BEATEN


@pytest.mark.parametrize(("count", "n", "verdict"), [(4, 128, "warn"), (40, 1280, "fail")])
def test_the_guides_example_of_a_share_is_true(count, n, verdict):
    check = judged_share(4, "black_box", count, n, warn=BEATEN_WARN, fail=BEATEN_FAIL, summary="")
    assert check.verdict == verdict
    assert f"({check.figure:.3f})" in GUIDE.read_text()


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
    some, threat = Accuracy.of(1, 2), ThreatModel(eps=0.15)
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
