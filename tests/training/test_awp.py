"""Adversarial weight perturbation against its formula; the weights come back exactly."""

import torch
from torch.nn import functional as F

from pipeline.training.awp import perturbed_weights


def test_perturbation_is_its_formula_and_is_undone(small_net, images):
    x, y = images
    net = small_net.double().train()
    net.drop.p = 0.0
    x = x.double()
    loss = lambda: F.cross_entropy(net(x), y, reduction="sum")  # noqa: E731
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    names = [n for n, p in net.named_parameters() if p.dim() >= 2]
    gradients = torch.autograd.grad(loss(), [p for p in net.parameters() if p.dim() >= 2])
    statistics = net.norm.running_mean.clone()
    with perturbed_weights(net, loss, gamma=0.01, world_size=1):
        for name, g in zip(names, gradients, strict=True):
            w = before[name]
            torch.testing.assert_close(net.get_parameter(name).detach(), w + 0.01 * w.norm() * g / g.norm())
        assert torch.equal(net.norm.running_mean, statistics)
        assert loss() > F.cross_entropy(torch.func.functional_call(net, before, x), y, reduction="sum")
        assert torch.equal(net.conv.bias, before["conv.bias"])
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    assert all(p.grad is None for p in net.parameters())


def test_frozen_weights_are_not_perturbed(small_net, images):
    x, y = images
    net = small_net.train()
    net.head.weight.requires_grad_(False)
    before = net.head.weight.clone()
    with perturbed_weights(net, lambda: F.cross_entropy(net(x), y), gamma=0.1, world_size=1):
        assert torch.equal(net.head.weight, before)
