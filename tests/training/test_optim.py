"""Groups by what a parameter is part of, schedules against their closed forms, averages against theirs."""

import math

import pytest
import torch

from pipeline.config.training import (
    ConstantConfig,
    CosineConfig,
    EMAConfig,
    OneCycleConfig,
    OptimizerConfig,
    PiecewiseConfig,
)
from pipeline.training.ema import EMA
from pipeline.training.optim import build_optimizer, parameter_groups, schedule_factor, set_learning_rate
from sparta_models import ACTIVATIONS, Activation, ActivationBank, build_model


def small(activation="sparta", **others):
    return build_model("resnet8", activation=activation, in_channels=1, width=4, **others)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_every_parameter_is_in_exactly_one_group(name):
    model = small(name)
    groups = parameter_groups(model)
    ids = [id(p) for group in groups.values() for p in group]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    own = {id(p) for m in model.modules() if isinstance(m, Activation) for p in m.parameters()}
    assert {id(p) for p in groups["activation"]} == own
    assert all(p.dim() >= 2 for p in groups["weight"])
    norms = {id(p) for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()} - own
    assert norms <= {id(p) for p in groups["norm"]}


def test_shared_activations_are_grouped_once():
    model = small({"name": "sparta", "sharing": "stage"})
    activation = parameter_groups(model)["activation"]
    assert len(activation) == len({id(p) for p in activation}) > 0


def test_frozen_parameters_are_in_no_group():
    bank = ActivationBank.from_model(small())
    model = bank.apply_to(small("relu"))
    groups = parameter_groups(model)
    assert groups["activation"] == []
    assert all(p.requires_grad for group in groups.values() for p in group)


def test_decay_and_learning_rate_follow_the_group():
    config = OptimizerConfig(lr=0.2, weight_decay=1e-3, norm_weight_decay=1e-4, activation_lr_factor=0.5)
    optimizer = build_optimizer(small(), config)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert [groups[n]["weight_decay"] for n in ("weight", "norm", "activation")] == [1e-3, 1e-4, 0.0]
    set_learning_rate(optimizer, 0.1)
    assert [groups[n]["lr"] for n in ("weight", "norm", "activation")] == [0.1, 0.1, 0.05]


@pytest.mark.parametrize(
    ("config", "points"),
    [
        (ConstantConfig(), {0: 1, 5: 1, 9.9: 1}),
        (ConstantConfig(warmup_epochs=2), {0: 0, 1: 0.5, 2: 1}),
        (PiecewiseConfig(), {0: 1, 4.99: 1, 5: 0.1, 7.49: 0.1, 7.5: 0.01, 9.9: 0.01}),
        (PiecewiseConfig(milestones=(0.9,), factor=0.5, warmup_epochs=4), {1: 0.25, 4: 1, 9: 0.5}),
        (CosineConfig(), {0: 1, 5: 0.5, 2.5: (1 + math.cos(math.pi / 4)) / 2, 10: 0}),
        (CosineConfig(final_factor=0.2, warmup_epochs=2), {1: 0.5, 2: 1, 6: 0.6, 10: 0.2}),
        (OneCycleConfig(), {0: 0, 2: 0.5, 4: 1, 7: 0.5, 10: 0}),
        (OneCycleConfig(peak=0.5, final_factor=0.1), {2.5: 0.5, 5: 1, 10: 0.1}),
    ],
)
def test_schedule_is_its_closed_form(config, points):
    for epoch, factor in points.items():
        assert schedule_factor(config, epoch, 10) == pytest.approx(factor, abs=1e-12)


def test_average_is_its_closed_form_and_has_tensors_of_its_own():
    """Without warm-up, after n steps of theta = 0 -> 1: m = 1 - d^n; statistics and weights alike."""
    model = small().train()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    ema = EMA(model, EMAConfig(decay=0.9, warmup=False))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(1)
    for step in range(3):
        ema.update(step)
    averaged = {n: t for n, t in ema.model.state_dict().items() if t.is_floating_point() and "normal" not in n}
    torch.testing.assert_close(averaged, {n: torch.full_like(t, 1 - 0.9**3) for n, t in averaged.items()})
    assert any("running_var" in name for name in averaged)
    live = {t.data_ptr() for t in model.state_dict().values()}
    assert not live & {t.data_ptr() for t in ema.model.state_dict().values()}


def test_average_forgets_the_start_during_its_warmup():
    model = small().train()
    ema = EMA(model, EMAConfig(decay=0.999))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    before = {n: p.clone() for n, p in ema.model.named_parameters()}
    ema.update(0)  # decay is (1 + 0) / (10 + 0) = 0.1
    for name, parameter in ema.model.named_parameters():
        torch.testing.assert_close(parameter, before[name] + 0.9)


def test_average_never_moves_frozen_activations():
    bank = ActivationBank.from_model(small("frelu"))
    model = bank.apply_to(small("relu")).train()
    ema = EMA(model, EMAConfig(decay=0.5))
    digest = ActivationBank.from_model(model).digest
    for step in range(5):
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.mul_(1.1)
        ema.update(step)
    assert ActivationBank.from_model(ema.model).digest == digest
