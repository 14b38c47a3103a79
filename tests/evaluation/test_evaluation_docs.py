from pathlib import Path

import pytest

from pipeline.config.evaluation import SUITES, ThreatModel
from pipeline.evaluation import audit

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
