from pathlib import Path

import pytest

from pipeline.evaluation.stats import Difference
from pipeline.report import ReportInputs, facts
from sparta_models import ACTIVATIONS
from tests.report.conftest import make_card


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.01, 0.1, "higher"),
        (-0.1, -0.01, "lower"),
        (-0.01, 0.1, "no clear difference"),
        (0.0, 0.1, "no clear difference"),
    ],
)
def test_a_difference_counts_when_its_interval_leaves_out_zero(low: float, high: float, expected: str):
    assert facts.verdict(Difference(value=(low + high) / 2, low=low, high=high)) == expected


@pytest.mark.parametrize(("p", "expected"), [(0.065, "no clear difference"), (0.04, "higher"), (None, "higher")])
def test_what_the_exact_test_calls_chance_is_no_difference(p: float | None, expected: str):
    assert facts.verdict(Difference(value=0.03, low=0.001, high=0.06, p_value=p)) == expected


def test_models_are_compared_to_the_control_of_their_target(inputs: ReportInputs):
    rows = {row.card.label: row for row in facts.rows(inputs)}
    assert rows["source-control"].gain is None
    for label in ("source", "wider", "digits59"):
        gain = rows[label].gain
        assert gain is not None
        assert gain.p_value is not None  # paired
        union = rows[label].card.evaluation.union.value - rows[f"{label}-control"].card.evaluation.union.value
        assert gain.value == pytest.approx(union)


def test_models_judged_on_different_images_are_compared_by_their_counts(tmp_path: Path):
    cards = [
        make_card(tmp_path, name, role=role, target="t", robust=r)
        for name, role, r in (("a", "source", 0.9), ("b", "control", 0.5))
    ]
    other = cards[1].evaluation.model_copy(update={"data_digest": "0" * 64})
    inputs = ReportInputs(title="t", models=(cards[0], cards[1].model_copy(update={"evaluation": other})))
    gain = facts.rows(inputs)[0].gain
    assert gain is not None
    assert gain.p_value is None
    assert gain.low > 0


def test_every_activation_stands_in_one_cell_and_the_measured_ones_come_first(inputs: ReportInputs):
    cells = facts.two_by_two(facts.rows(inputs))
    assert sorted(entry.name for entries in cells.values() for entry in entries) == sorted(ACTIVATIONS)
    assert cells[("varying", "dependent")][0].name == "sparta"
    assert cells[("varying", "dependent")][0].robust == inputs.models[0].evaluation.union
    assert cells[("shared", "independent")][0].name == "relu"
