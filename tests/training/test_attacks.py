"""Every attack stays in its ball, reaches the closed-form optimum, agrees with others' code and leaves no trace."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipeline.training.attacks import fgsm, pgd
from pipeline.training.attacks.geometry import norm_named

EPS = 0.07
ATTACKS = {
    f"{norm}-{loss}-{start}-{rule}": {"norm": norm, "loss": loss, "random_start": start, "step_rule": rule}
    for norm in ("linf", "l2")
    for loss, start, rule in (
        ("ce", "uniform", "constant"),
        ("ce", False, "linear"),
        ("margin", "normal", "cosine"),
        ("dlr", True, "constant"),
        ("kl", "normal", "constant"),
    )
} | {
    f"{norm}-{loss}-targeted": {"norm": norm, "loss": loss, "targets": torch.tensor([0, 1, 2, 3, 4, 0])}
    for norm in ("linf", "l2")
    for loss in ("ce", "margin", "dlr")
}
ATTACKS |= {
    f"{name}-restarts": {**ATTACKS[name], "restarts": 2} for name in ("linf-ce-uniform-constant", "l2-dlr-targeted")
}


def run(name, model, x, y, *, eps=EPS, steps=3, **others):
    options = {**ATTACKS[name], **others}
    return pgd(model, x, y, eps=eps, step_size=2.5 * eps / max(steps, 1), steps=steps, **options)


def distance(delta, norm):
    return delta.double().flatten(1).abs().amax(1) if norm == "linf" else delta.double().flatten(1).norm(dim=1)


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_stays_in_ball_and_box(name, dtype, layout, small_net, images):
    net = small_net.to(dtype)
    x = images[0].to(dtype).contiguous(memory_format=layout)
    x_adv = run(name, net, x, images[1])
    assert x_adv.dtype == dtype
    assert x_adv.is_contiguous(memory_format=layout)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    # linf bounds are rounded inwards below float64; l2 computes its norms in float32 or float64.
    slack = 1e-12 if dtype == torch.float64 else 0 if ATTACKS[name]["norm"] == "linf" else 1e-6
    assert distance(x_adv.double() - x.double(), ATTACKS[name]["norm"]).max() <= EPS + slack
    assert not torch.equal(x_adv, x)
    assert not x_adv.requires_grad


@pytest.mark.parametrize("name", ATTACKS)
def test_zero_eps_returns_the_images(name, small_net, images):
    x, y = images
    assert torch.equal(run(name, small_net, x, y, eps=0.0), x)


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("bn", ["eval", "train"])
@pytest.mark.parametrize("norm_trains", [True, False])
def test_leaves_no_trace_on_the_caller(name, bn, norm_trains, small_net, images):
    x, y = images
    net = small_net.train()
    net.head.weight.requires_grad_(False)
    net.norm.train(norm_trains)
    net.conv.bias.grad = torch.ones(8)
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    random_state, x_before = torch.get_rng_state(), x.clone()
    with torch.no_grad():
        run(name, net, x, y, bn=bn)
        assert not torch.is_grad_enabled()
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert modes == [m.training for m in net.modules()]
    assert net.norm.track_running_stats
    assert torch.equal(net.conv.bias.grad, torch.ones(8))
    assert all(p.grad is None for p in net.parameters() if p is not net.conv.bias)
    assert [p.requires_grad for p in net.parameters()] == [True, True, True, True, False, True]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(x, x_before)
    assert not x.requires_grad


def test_batch_statistics_are_used_but_not_recorded(small_net, images):
    x, y = images
    net = small_net.train()
    net.drop.p = 0.0
    before = net.norm.running_mean.clone()
    with_batch = pgd(net, x, y, eps=EPS, step_size=EPS, steps=1, random_start=False, bn="train")
    assert torch.equal(net.norm.running_mean, before)
    x_in = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(nn.functional.cross_entropy(net(x_in), y, reduction="sum"), x_in)
    torch.testing.assert_close(with_batch, torch.clamp(x + EPS * g.sign(), 0, 1), rtol=0, atol=1e-7)
    assert not torch.equal(with_batch, pgd(net, x, y, eps=EPS, step_size=EPS, steps=1, random_start=False))


@pytest.mark.parametrize("name", ATTACKS)
def test_generator_decides_the_result(name, small_net, images):
    x, y = images
    first, again, other = (run(name, small_net, x, y, generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(first, again)
    if ATTACKS[name].get("random_start", True):
        assert not torch.equal(first, other)


def test_without_a_generator_the_global_seed_decides(small_net, images):
    x, y = images
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(pgd(small_net, x, y, eps=EPS, step_size=0.01, steps=2))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def linear_model():
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 2)).double()


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_reaches_the_closed_form_optimum_of_a_linear_model(norm, loss):
    """Two classes, far from the box: x + eps sign(w) or x + eps w / ||w||, w = w_other - w_y."""
    net, x = linear_model(), torch.full((2, 3, 4, 4), 0.5, dtype=torch.float64)
    y = torch.tensor([0, 1])
    w = (net[1].weight[1 - y] - net[1].weight[y]).reshape(x.shape)
    best = w.sign() if norm == "linf" else w / w.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    x_adv = pgd(net, x, y, eps=0.1, step_size=0.1, steps=40, norm=norm, loss=loss, generator=torch.Generator())
    torch.testing.assert_close(x_adv, x + 0.1 * best.detach(), rtol=0, atol=1e-6)


def test_targeted_attack_goes_to_its_target():
    net, x = linear_model(), torch.full((2, 3, 4, 4), 0.5, dtype=torch.float64)
    y = torch.tensor([0, 0])
    x_adv = pgd(net, x, y, eps=0.1, step_size=0.05, steps=10, targets=torch.tensor([1, 0]), random_start=False)
    z, z_adv = net(x).detach(), net(x_adv).detach()
    gained = (z_adv - z)[:, 1] - (z_adv - z)[:, 0]
    assert gained[0] > 0
    assert gained[1] < 0


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_equals_torchattacks(norm, small_net, images):
    torchattacks = pytest.importorskip("torchattacks")
    x, y = images
    net = small_net.eval()
    theirs = (
        torchattacks.PGD(net, eps=EPS, alpha=0.02, steps=7, random_start=False)
        if norm == "linf"
        else torchattacks.PGDL2(net, eps=EPS, alpha=0.02, steps=7, random_start=False)
    )(x, y)
    ours = pgd(net, x, y, eps=EPS, step_size=0.02, steps=7, norm=norm, random_start=False)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_equals_foolbox(norm, small_net, images):
    foolbox = pytest.importorskip("foolbox")
    x, y = images
    net = small_net.eval()
    attack = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm]
    judge = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    theirs, _, _ = attack(abs_stepsize=0.02, steps=7, random_start=False)(
        judge, x, foolbox.criteria.Misclassification(y), epsilons=EPS
    )
    ours = pgd(net, x, y, eps=EPS, step_size=0.02, steps=7, norm=norm, random_start=False)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_fgsm_is_one_signed_step(small_net, images):
    x, y = images
    net = small_net.eval()
    x_in = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(nn.functional.cross_entropy(net(x_in), y), x_in)
    torch.testing.assert_close(fgsm(net, x, y, eps=EPS), (x + EPS * g.sign()).clamp(0, 1), rtol=0, atol=1e-7)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_more_steps_are_never_weaker_on_average(norm, small_net):
    generator = torch.Generator().manual_seed(5)
    x, y = torch.rand(64, 3, 8, 8, generator=generator), torch.randint(0, 5, (64,), generator=generator)
    eps = EPS if norm == "linf" else 1.0
    losses = []
    for steps in (1, 2, 5, 20):
        x_adv = pgd(small_net, x, y, eps=eps, step_size=2.5 * eps / steps, steps=steps, norm=norm, random_start=False)
        losses.append(nn.functional.cross_entropy(small_net.eval()(x_adv), y).item())
    assert losses == sorted(losses)


@pytest.mark.parametrize("loss", ["ce", "margin", "kl"])
def test_restarts_keep_the_worst_of_every_example(loss, small_net, images):
    """Restarts draw from one generator in turn, so the single runs can be repeated beside them."""
    x, y = images
    net = small_net.eval()
    draws = torch.Generator().manual_seed(7)
    options = {"eps": EPS, "step_size": 0.01, "steps": 1, "loss": loss}
    singles = [pgd(net, x, y, generator=draws, **options) for _ in range(4)]
    both = pgd(net, x, y, generator=torch.Generator().manual_seed(7), restarts=4, **options)
    wrong = torch.stack([net(s).argmax(1) != y for s in singles])
    assert torch.equal(net(both).argmax(1) != y, wrong.any(0))
    from_singles = [any(torch.equal(b, s[i]) for s in singles) for i, b in enumerate(both)]
    assert all(from_singles)
    values = torch.stack([nn.functional.cross_entropy(net(s), y, reduction="none") for s in singles])
    if loss == "ce":  # among equals the larger objective
        alike = wrong.all(0) | ~wrong.any(0)
        kept = nn.functional.cross_entropy(net(both), y, reduction="none")
        torch.testing.assert_close(kept[alike], values.amax(0)[alike])


@pytest.mark.parametrize("size", [1e-38, 1e-25, 1e-20, 1, 1e20, 1e37])
def test_ascent_is_of_unit_norm_whatever_the_gradients_size(size):
    g = size * torch.tensor([[3.0, -4.0], [0.0, 0.0]])[:, :, None, None]
    torch.testing.assert_close(norm_named("l2").ascent(g).flatten(1), torch.tensor([[0.6, -0.8], [0.0, 0.0]]))


def test_step_rules_shorten_the_steps():
    """On a linear model with a huge ball the path's length is the sum of the steps: 4, 2.5 and 2.5 of 1/16."""
    net, x = linear_model(), torch.full((1, 3, 4, 4), 0.5, dtype=torch.float64)
    moved = {}
    for rule in ("constant", "linear", "cosine"):
        x_adv = pgd(net, x, torch.tensor([0]), eps=0.5, step_size=1 / 16, steps=4, step_rule=rule, random_start=False)
        moved[rule] = (x_adv - x).abs().max().item()
    assert moved == pytest.approx({"constant": 4 / 16, "linear": 2.5 / 16, "cosine": 2.5 / 16})


def test_uniform_start_fills_the_ball():
    x = torch.full((4000, 1, 2, 2), 0.5)
    model = nn.Flatten()
    y = torch.zeros(4000, dtype=torch.int64)
    for norm, power in (("linf", 1), ("l2", 4)):
        start = pgd(model, x, y, eps=0.2, step_size=0, steps=0, norm=norm, generator=torch.Generator().manual_seed(0))
        radius = distance(start - x, norm) / 0.2 if norm == "l2" else (start - x).flatten().abs() / 0.2
        # The share within radius r of a uniform ball of dimension d is r^d; linf coordinates are uniform each.
        for r in (0.5, 0.8, 0.95):
            assert (radius <= r).double().mean().item() == pytest.approx(r**power, abs=0.025)


def test_soft_labels_attack_the_mixture(small_net, images):
    x, y = images
    soft = nn.functional.one_hot(y, 5).float()
    options = {"eps": EPS, "step_size": 0.02, "steps": 2, "random_start": False}
    torch.testing.assert_close(pgd(small_net, x, soft, **options), pgd(small_net, x, y, **options))


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("wrapped", [lambda ddp: ddp, lambda ddp: nn.Sequential(nn.Identity(), ddp)], ids=["out", "in"])
def test_a_network_wrapped_for_data_parallelism_is_refused(wrapped, small_net, images):
    """Its backward pass would start a collective at every step of the attack."""
    model = wrapped(nn.parallel.DistributedDataParallel(small_net))
    with pytest.raises(ValueError, match="expected the bare module, got a DistributedDataParallel wrapper"):
        pgd(model, *images, eps=EPS, step_size=0.01, steps=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "l7"}, "unknown norm 'l7'; known: l2, linf"),
        ({"loss": "hinge"}, "unknown attack loss 'hinge'; known: ce, dlr, kl, margin"),
        ({"step_rule": "wild"}, "unknown step rule 'wild'; known: constant, cosine, linear"),
        ({"eps": -1.0}, "expected eps, step_size, steps >= 0"),
        ({"restarts": 0}, "restarts >= 1"),
        ({"bn": "frozen"}, 'expected bn="eval" or "train"'),
        ({"loss": "kl", "targets": torch.zeros(6, dtype=torch.int64)}, "for a targeted attack use"),
        ({"x": torch.zeros(6, 3, 8, 8, dtype=torch.uint8)}, "divide by 255"),
        ({"y": torch.zeros(5, dtype=torch.int64)}, "got 5 labels for 6 images"),
        ({"y": torch.ones(6, 5), "loss": "margin"}, r"expected labels of shape \(B,\)"),
    ],
)
def test_refuses_with_a_remedy(change, message, small_net, images):
    arguments = {"x": images[0], "y": images[1], "eps": EPS, "step_size": 0.01, "steps": 1} | change
    with pytest.raises(ValueError, match=message):
        pgd(small_net, **arguments)


def test_dlr_needs_classes_enough():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="expected at least 3 classes, got 2"):
        pgd(net, torch.rand(1, 1, 2, 2), torch.tensor([0]), eps=0.1, step_size=0.1, steps=1, loss="dlr")
