"""Nothing before a step's one collective asks a device for a value: here on the meta device, which has none to give."""

import pytest
import torch
from test_attacks import ATTACKS, run
from test_methods import METHODS, config_of
from torch import nn

from pipeline.config.training import MixConfig
from pipeline.training.attacks import pgd
from pipeline.training.distributed import StepReducer
from pipeline.training.methods import build_method
from pipeline.training.mix import mix_batch

META = torch.device("meta")


@pytest.fixture
def setting(small_net, images):
    return small_net.train().to(META), images[0].to(META), images[1].to(META)


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("bn", ["eval", "train"])
def test_attacks(name, bn, setting):
    targets = {key: value.to(META) for key, value in ATTACKS[name].items() if key == "targets"}
    x_adv = run(name, *setting, bn=bn, **targets)
    assert x_adv.device == META
    assert x_adv.shape == setting[1].shape


def test_an_attack_that_asks_would_be_noticed(setting):
    net, x, y = setting

    def asking(x):
        z = net(x)
        return z * z.mean().item()

    with pytest.raises(RuntimeError, match="meta"):
        pgd(asking, x, y, eps=0.1, step_size=0.1, steps=1)


@pytest.mark.parametrize("name", METHODS)
def test_methods(name, setting):
    net, x, y = setting
    method = build_method(config_of(name))
    x_adv = method.perturb(net, x, y, 0.5, torch.Generator())
    assert method.terms(net, x, x_adv, y).loss.shape == y.shape


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixtures(kind, setting):
    _, x, y = setting
    mixed, soft = mix_batch(MixConfig(kind=kind), x, y, num_classes=5, generator=torch.Generator())
    assert mixed.shape == x.shape
    assert soft.shape == (len(x), 5)


def test_the_mean_of_gradients():
    model = nn.Linear(2, 3).to(META)
    model(torch.zeros(4, 2, device=META)).sum().backward()
    counts = torch.zeros(2, device=META)
    assert StepReducer(model, list(model.parameters()), world_size=1)(counts) is counts
