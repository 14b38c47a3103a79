"""Every method against its paper's formula, written out plainly: value, gradient, and five steps on record."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.config.base import ThreatModel
from pipeline.config.training import (
    AttackConfig,
    AWPConfig,
    EMAConfig,
    FGSMRSConfig,
    MARTConfig,
    OneCycleConfig,
    OptimizerConfig,
    PGDATConfig,
    StandardConfig,
    TRADESConfig,
    TrainingConfig,
)
from pipeline.training import Context
from pipeline.training.attacks import pgd
from pipeline.training.loop import train_step
from pipeline.training.methods import build_method, step_cost
from pipeline.training.progress import Sums
from pipeline.training.run import open_run

EPS, BETA = 0.1, 3.0
METHODS = {
    "standard": StandardConfig(),
    "pgd_at": PGDATConfig(attack=AttackConfig(steps=2)),
    "trades": TRADESConfig(beta=BETA, attack=AttackConfig(steps=2, loss="kl", start="normal")),
    "mart": MARTConfig(beta=BETA, attack=AttackConfig(steps=2, start="normal")),
    "fgsm_rs": FGSMRSConfig(),
}
GOLDEN = json.loads((Path(__file__).parent / "golden_losses.json").read_text())
STEPS = {name: {"method": method} for name, method in METHODS.items()}
STEPS["trades-awp"] = {"method": METHODS["trades"], "awp": AWPConfig(gamma=0.05)}


def config_of(name, **others):
    return TrainingConfig(threat=ThreatModel(eps=EPS), method=METHODS[name], **others)


def probability(z, k):
    return z.exp()[k] / z.exp().sum()


def kl(p_logits, q_logits):
    return sum(
        probability(p_logits, k) * (probability(p_logits, k).log() - probability(q_logits, k).log())
        for k in range(len(p_logits))
    )


def plain_loss(name, clean, adv, y):
    """One example's loss as the papers print it."""
    if name == "standard":
        return -probability(clean, y).log()
    if name in ("pgd_at", "fgsm_rs"):
        return -probability(adv, y).log()
    if name == "trades":
        return -probability(clean, y).log() + BETA * kl(clean, adv)
    runner_up = max(probability(adv, k) for k in range(len(adv)) if k != y)
    boosted = -probability(adv, y).log() - (1.0001 - runner_up).log()
    return boosted + BETA * kl(clean, adv) * (1 - probability(clean, y))


@pytest.fixture
def setting(small_net, images):
    net = small_net.double().train()
    net.drop.p = 0.0
    x, y = images[0].double(), images[1]
    x_adv = (x + EPS * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))).clamp(0, 1)
    return net, x, x_adv, y


@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradient_are_the_papers(name, setting):
    net, x, x_adv, y = setting
    both = name in ("trades", "mart")
    logits = net(torch.cat((x, x_adv))) if both else net(x if name == "standard" else x_adv)
    clean, adv = logits.chunk(2) if both else (logits, logits)
    expected = torch.stack([plain_loss(name, clean[i], adv[i], k) for i, k in enumerate(y.tolist())])
    expected_gradients = torch.autograd.grad(expected.mean(), list(net.parameters()))

    terms = build_method(config_of(name)).terms(net, x, x_adv, y)
    gradients = torch.autograd.grad(terms.loss.mean(), list(net.parameters()))
    torch.testing.assert_close(terms.loss, expected)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert (terms.adv is not None) == (name != "standard")
    assert (terms.clean is not None) == (name in ("standard", "trades", "mart"))


@pytest.mark.parametrize("name", ["standard", "pgd_at", "trades", "fgsm_rs"])
def test_label_smoothing_spreads_the_label(name, setting):
    """CE with labels (1 - s) onehot + s / C."""
    net, x, x_adv, y = setting
    smoothed = build_method(config_of(name, label_smoothing=0.2)).terms(net, x, x_adv, y)
    soft = 0.8 * nn.functional.one_hot(y, 5).double() + 0.2 / 5
    spread = build_method(config_of(name)).terms(net, x, x_adv, soft)
    torch.testing.assert_close(smoothed.loss, spread.loss)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pgd_at", {"steps": 2, "step_size": 2.5 * EPS / 2}),
        ("trades", {"steps": 2, "step_size": 2.5 * EPS / 2, "loss": "kl", "random_start": "normal"}),
        ("mart", {"steps": 2, "step_size": 2.5 * EPS / 2, "random_start": "normal"}),
        ("fgsm_rs", {"steps": 1, "step_size": 1.25 * EPS}),
    ],
)
def test_examples_are_those_of_the_configured_attack(name, options, setting):
    net, x, _, y = setting
    made = build_method(config_of(name)).perturb(net, x, y, 1.0, torch.Generator().manual_seed(4))
    expected = pgd(net, x, y, eps=EPS, generator=torch.Generator().manual_seed(4), **options)
    assert torch.equal(made, expected)


def test_standard_training_leaves_the_images(setting):
    net, x, _, y = setting
    assert build_method(config_of("standard")).perturb(net, x, y, 1.0, torch.Generator()) is x


@pytest.mark.parametrize("name", [name for name in METHODS if name != "standard"])
def test_strength_scales_ball_and_step(name, setting):
    net, x, _, y = setting
    x_adv = build_method(config_of(name)).perturb(net, x, y, 0.25, torch.Generator().manual_seed(0))
    assert (x_adv - x).abs().max().item() == pytest.approx(0.25 * EPS)


def test_after_a_collapse_fgsm_rs_is_pgd_training():
    config = config_of("fgsm_rs")
    assert build_method(config).cost.attack_steps == 1
    assert build_method(config, collapsed=True).cost.attack_steps == 2


@pytest.mark.parametrize(
    ("name", "cost"),
    [("standard", 3), ("pgd_at", 2 * 2 + 3), ("trades", 2 * 2 + 7), ("mart", 2 * 2 + 6), ("fgsm_rs", 5)],
)
def test_cost_in_forward_passes(name, cost):
    assert build_method(config_of(name)).cost.forward_equivalents == cost


@pytest.mark.parametrize(("name", "cost"), [("standard", 6), ("pgd_at", 2 * 2 + 6), ("trades", 2 * 2 + 13)])
def test_adversarial_weights_cost_the_training_passes_again_once_they_set_in(name, cost):
    config = config_of(name, awp=AWPConfig(warmup_epochs=2))
    assert step_cost(config, epoch=1) == build_method(config).cost
    assert step_cost(config, epoch=2).forward_equivalents == cost


@pytest.mark.parametrize("eps", [0.9, 1.0])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_one_step_may_be_longer_than_one(norm, eps, setting):
    """1.25 eps, cut back to the ball."""
    net, x, _, y = setting
    method = build_method(TrainingConfig(threat=ThreatModel(norm=norm, eps=eps), method=FGSMRSConfig()))
    x_adv = method.perturb(net, x, y, 1.0, torch.Generator().manual_seed(0))
    assert not torch.equal(x_adv, x)
    assert torch.linalg.vector_norm((x_adv - x).flatten(1), torch.inf if norm == "linf" else 2, 1).max() <= eps + 1e-6


@pytest.mark.parametrize("name", METHODS)
def test_passes_through_the_network_are_the_stated_cost(name, setting):
    """Counted by hooks: forwards without a graph, with one to the input, and the batches trained on."""
    net, x, _, y = setting
    sizes = []
    net.conv.register_forward_hook(lambda _m, args, _z: sizes.append(len(args[0]) / len(x)))
    method = build_method(config_of(name))
    x_adv = method.perturb(net, x, y, 1.0, torch.Generator())
    in_attack = len(sizes)
    method.terms(net, x, x_adv, y)
    assert in_attack == method.cost.attack_steps + method.cost.forwards
    assert sizes[in_attack:] == [method.cost.batches]


def five_losses(name, net, x, y):
    method = build_method(config_of(name))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    losses = []
    for step in range(5):
        x_adv = method.perturb(net, x, y, 1.0, torch.Generator().manual_seed(step))
        loss = method.terms(net, x, x_adv, y).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", METHODS)
def test_five_steps_follow_the_record(name, setting):
    """In float64, so that the record holds on any processor. To renew it: print five_losses for every method."""
    net, x, _, y = setting
    assert five_losses(name, net, x, y) == pytest.approx(GOLDEN["methods"][name], rel=1e-6)


def five_training_steps(job, digits):
    """Losses of train_step on the five batches of an epoch, as `train` would come to them."""
    losses = []
    with torch.random.fork_rng(devices=[]):
        run = open_run(job, Context(), digits, None, "golden")
        with run.loader, run.val_loader:
            for x, y in run.loader:
                run.state.sums = Sums()
                train_step(run, x, y)
                losses.append(run.state.sums.mean_loss)
    return losses


@pytest.mark.parametrize("name", STEPS)
def test_five_training_steps_follow_the_record(name, make_job, digits):
    """With everything a step does: folded shadow, growing eps, AWP, optimizer groups, schedule, average, clipping.

    In l2, whose steps turn no sign, so that float32 holds the record on any processor. To renew it: print
    five_training_steps for every entry of STEPS.
    """
    job = make_job(
        epochs=1,
        batch_size=18,
        threat=ThreatModel(norm="l2", eps=1.0),
        eps_warmup_epochs=0 if name == "standard" else 0.5,
        optimizer=OptimizerConfig(lr=0.1, clip_norm=1.0),
        schedule=OneCycleConfig(),
        ema=EMAConfig(),
        **STEPS[name],
    )
    assert five_training_steps(job, digits) == pytest.approx(GOLDEN["training_steps"][name], rel=1e-3)
