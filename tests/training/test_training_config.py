"""The training section: fractions are read, alternatives are told apart by kind, contradictions name their remedy."""

import pytest
from pydantic import ValidationError

from pipeline.config.base import ThreatModel
from pipeline.config.training import FGSMRSConfig, MixConfig, PGDATConfig, TrainingConfig


def test_fractions_and_kinds_are_read():
    config = TrainingConfig.model_validate(
        {
            "threat": {"eps": "8/255"},
            "method": {"kind": "pgd_at", "attack": {"steps": 7, "step_size": "2/255"}},
            "schedule": {"kind": "cosine", "warmup_epochs": 1},
        }
    )
    assert config.threat.eps == 8 / 255
    assert config.method == PGDATConfig(attack={"steps": 7, "step_size": 2 / 255})
    assert TrainingConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(("kind", "metric"), [("standard", "clean"), ("trades", "robust")])
def test_metric_follows_the_method_unless_set(kind, metric):
    assert TrainingConfig(method={"kind": kind}).metric == metric
    assert TrainingConfig(method={"kind": kind}, selection={"metric": "robust"}).metric == "robust"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": {"kind": "magic"}}, "'standard', 'pgd_at', 'trades', 'mart', 'fgsm_rs'"),
        ({"method": {"kind": "fgsm_rs", "attack": {}}}, "Extra inputs are not permitted"),
        ({"method": {"kind": "pgd_at", "attack": {"step_size": 0}}}, "never moves"),
        ({"method": {"kind": "pgd_at", "attack": {"restarts": 2, "start": "none"}}}, 'use start="uniform"'),
        ({"method": {"kind": "trades", "attack": {"loss": "kl", "start": "none"}}}, "no gradient at the image itself"),
        ({"method": {"kind": "mart"}, "mix": {"kind": "mixup"}}, "soft labels"),
        ({"method": {"kind": "mart"}, "label_smoothing": 0.1}, "set it to 0"),
        ({"method": {"kind": "pgd_at", "attack": {"loss": "dlr"}}, "mix": {"kind": "cutmix"}}, "needs hard ones"),
        (
            {"method": {"kind": "fgsm_rs", "fallback": {"loss": "margin"}}, "mix": {"kind": "mixup"}},
            r'method\.fallback\.loss="margin" needs hard ones',
        ),
        ({"method": {"kind": "fgsm_rs"}, "selection": {"metric": "clean"}}, 'use "robust" or leave it unset'),
        ({"method": {"kind": "standard"}, "eps_warmup_epochs": 2}, "needs an attack"),
        ({"epochs": 5, "eps_warmup_epochs": 5.5}, "is above epochs=5"),
        ({"epochs": 1, "eps_warmup_epochs": float("inf")}, "should be a finite number"),
        ({"epochs": 1, "schedule": {"kind": "cosine", "warmup_epochs": float("inf")}}, "should be a finite number"),
        ({"optimizer": {"lr": float("inf")}}, "should be a finite number"),
        ({"optimizer": {"weight_decay": float("nan")}}, "should be a finite number"),
        ({"optimizer": {"clip_norm": float("inf")}}, "should be a finite number"),
        ({"optimizer": {"activation_lr_factor": float("inf")}}, "should be a finite number"),
        ({"mix": {"kind": "mixup", "alpha": float("inf")}}, "should be a finite number"),
        ({"threat": {"eps": "1e999"}}, "should be a finite number"),
        ({"threat": {"eps": "1e99999999"}}, "should be a finite number"),
        ({"threat": {"eps": f"1{400 * '0'}/1"}}, "expected a number or a fraction"),
        ({"optimizer": {"momentum": 0}}, "set optimizer.nesterov=false"),
        ({"schedule": {"kind": "piecewise", "milestones": [0.7, 0.5]}}, "must rise strictly"),
        ({"epochs": 5, "schedule": {"kind": "cosine", "warmup_epochs": 5}}, "leaves nothing of epochs=5"),
        ({"selection": {"attack": {"bn": "train"}}}, 'use "eval"'),
        ({"threat": {"eps": "eight"}}, "expected a number or a fraction"),
        ({"threat": {"eps": 1.5}}, "expected 0 < eps <= 1 for linf, got 1.5"),
        ({"threat": {"norm": "l2", "eps": float("inf")}}, "should be a finite number"),
        (
            {"method": {"attack": {"step_size": 2}, "kind": "pgd_at"}},
            r"expected method\.attack\.step_size <= 1 for linf",
        ),
        (
            {
                "threat": {"norm": "l2", "eps": 3},
                "selection": {"attack": {"step_size": 2}, "threat": {"norm": "linf", "eps": 0.1}},
            },
            r"expected selection\.attack\.step_size <= 1 for linf, got 2.0",
        ),
        ({"epoch": 3}, "Extra inputs are not permitted"),
    ],
)
def test_contradictions_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        TrainingConfig.model_validate(settings)


def test_an_l2_radius_and_its_steps_may_exceed_one():
    attack = {"step_size": 1.5}
    config = TrainingConfig.model_validate(
        {
            "threat": {"norm": "l2", "eps": 2},
            "method": {"kind": "pgd_at", "attack": attack},
            "selection": {"attack": attack},
        }
    )
    assert config.threat == ThreatModel(norm="l2", eps=2.0)
    assert config.method.attack.step_size == 1.5


def test_every_field_has_a_description():
    def described(section):
        return all(field.description for field in section.model_fields.values())

    assert described(TrainingConfig)
    assert described(FGSMRSConfig)
    assert MixConfig(kind="mixup").alpha == 1.0
