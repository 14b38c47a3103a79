"""Folding: the same logits and the same attack, up to rounding, after every update; refused where it would be wrong."""

import pytest
import torch
from torch import nn

from pipeline.training.attacks import pgd
from pipeline.training.fold import FoldedShadow
from pipeline.training.network import Forward, shadow
from sparta_models import MODELS, Sparta, build_model


def disturbed(model):
    """Statistics and affine maps that are not the initial ones."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, std=0.2, generator=generator)
        if isinstance(module, Sparta):
            nn.init.normal_(module.gate.weight, std=0.2, generator=generator)
    return model.train()


def num_norms(model):
    return sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def network(name="resnet8", activation="sparta"):
    torch.manual_seed(0)
    return disturbed(build_model(name, activation=activation, in_channels=1, width=8).double())


@pytest.mark.parametrize("activation", ["relu", "sparta", "frelu"])
def test_folded_network_follows_every_update(activation):
    model, x = network(activation=activation), torch.rand(4, 1, 16, 16, dtype=torch.float64)
    folded = FoldedShadow(model, x[:2], torch.float64)
    assert num_norms(folded) == 0 < num_norms(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
        folded.refresh()
        torch.testing.assert_close(folded(x), shadow(model)(x))
    assert not any(p.requires_grad for p in folded.parameters())


@pytest.mark.parametrize("name", sorted(MODELS))
def test_folding_any_network_of_the_zoo_keeps_its_logits(name):
    torch.manual_seed(0)
    width = {"width_mult": 0.25} if name == "mobilenet_v2" else {"width": 4}
    model = disturbed(build_model(name, activation="silu", in_channels=1, **width))
    x = torch.rand(2, 1, 32, 32)
    folded = FoldedShadow(model, x)
    torch.testing.assert_close(folded(x), shadow(model)(x), rtol=1e-3, atol=1e-3)


def test_attack_on_the_folded_network_is_the_attack_on_the_network():
    model, x, y = network(), torch.rand(4, 1, 8, 8, dtype=torch.float64), torch.arange(4)
    options = {"eps": 0.1, "step_size": 0.05, "steps": 3, "random_start": False}
    folded = FoldedShadow(model, x[:2], torch.float64)
    torch.testing.assert_close(pgd(folded, x, y, **options), pgd(model, x, y, **options))


class Reused(nn.Module):
    """The convolution's output also goes past the norm: folding would change the logits."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

    def forward(self, x):
        h = self.conv(x)
        return (self.norm(h) + h).mean((2, 3))


class Twice(nn.Module):
    """One convolution in front of two norms."""

    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.BatchNorm2d(2)

    def forward(self, x):
        return (self.first(self.conv(x)) + self.second(self.conv(2 * x))).mean((2, 3))


@pytest.mark.parametrize("make", [Reused, Twice])
def test_what_cannot_be_folded_is_left_alone(make):
    torch.manual_seed(0)
    model, x = make().train(), torch.rand(4, 1, 8, 8)  # fresh statistics, with which an error would not show
    folded = FoldedShadow(model, x)
    assert num_norms(folded) == num_norms(model)
    disturbed(model)
    folded.refresh()
    assert torch.equal(folded(x), shadow(model)(x))


def test_bfloat16_weights_give_the_logits_of_autocast():
    model, x = network().float(), torch.rand(8, 1, 8, 8)
    folded = Forward(FoldedShadow(model, x, torch.bfloat16), "bf16")
    torch.testing.assert_close(folded(x), shadow(model)(x), rtol=0.05, atol=0.05)
