import math

import pytest
from pydantic import ValidationError

from pipeline.config.base import ThreatModel
from pipeline.config.evaluation import SUITES, EvaluationConfig


def test_eps_is_read_as_a_fraction_of_255():
    assert ThreatModel(eps="8/255").eps == 8 / 255


@pytest.mark.parametrize("eps", [0, -0.1, 1.5])
def test_an_impossible_linf_radius_is_refused(eps):
    with pytest.raises(ValidationError, match=r"expected 0 < eps|greater than 0"):
        ThreatModel(norm="linf", eps=eps)


@pytest.mark.parametrize(
    "given",
    [
        {"threat": {"norm": "l2", "eps": math.inf}},
        {"other_threats": [{"norm": "l2", "eps": math.inf}]},
        {"attacks": [{"kind": "pgd", "step_size": math.inf}]},
        {"curve": {"multiples": [1.0, math.inf]}},
    ],
)
def test_an_infinite_radius_is_refused(given):
    with pytest.raises(ValidationError, match="finite number"):
        EvaluationConfig(**given)


def test_an_l2_radius_may_exceed_one():
    assert ThreatModel(norm="l2", eps=2.0).scaled(2).eps == 4.0


def test_scaling_a_linf_threat_stays_in_the_box():
    assert ThreatModel(eps=0.4).scaled(5).eps == 1.0


@pytest.mark.parametrize("name", sorted(SUITES))
def test_a_suite_is_taken_by_name(name):
    assert EvaluationConfig(attacks=name).attacks == SUITES[name]


def test_an_unknown_suite_lists_the_known_ones():
    with pytest.raises(ValidationError, match=r"unknown attack suite 'hard'; known: quick, standard, full"):
        EvaluationConfig(attacks="hard")


def test_an_unknown_attack_lists_the_known_ones():
    with pytest.raises(ValidationError, match="'fgsm', 'pgd'"):
        EvaluationConfig(attacks=[{"kind": "pdg"}])


def test_a_doubled_attack_is_refused():
    with pytest.raises(ValidationError, match="every attack once"):
        EvaluationConfig(attacks=[{"kind": "fgsm"}, {"kind": "fgsm"}])


def test_a_curve_that_does_not_rise_is_refused():
    with pytest.raises(ValidationError, match="strictly rising"):
        EvaluationConfig(curve={"multiples": [1.0, 0.5]})


def test_the_config_survives_json():
    config = EvaluationConfig(attacks="full", other_threats=[{"norm": "l2", "eps": 0.5}])
    assert EvaluationConfig.model_validate_json(config.model_dump_json()) == config
