"""Sparta: its reductions to SiLU, ReLU and linear, its neighbourhood, its variants."""

import pytest
import torch
from torch.nn import functional as F

from sparta_models import Sparta
from sparta_models.activations.gates import GATES

over_variants = pytest.mark.parametrize("variant", GATES)


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@over_variants
@pytest.mark.parametrize(
    ("kernel_size", "dilation", "bias"), [(1, 1, False), (3, 1, True), (3, 2, False), (5, 1, False)]
)
def test_starts_exactly_at_silu(variant, kernel_size, dilation, bias):
    x = images(2, 8, 7, 6)
    sparta = Sparta(8, variant=variant, kernel_size=kernel_size, dilation=dilation, bias=bias).double()
    torch.testing.assert_close(sparta(x), F.silu(x), atol=1e-12, rtol=0)


@over_variants
@pytest.mark.parametrize("beta", [0.5, 3.0])
def test_starts_at_swish_with_the_given_sharpness(variant, beta):
    x = images(2, 8, 4, 4)
    torch.testing.assert_close(Sparta(8, variant=variant, beta=beta).double()(x), x * torch.sigmoid(beta * x))


@over_variants
def test_tends_to_relu_as_the_sharpness_grows(variant):
    x = images(2, 8, 4, 4)
    errors = [(Sparta(8, variant=variant, beta=b).double()(x) - F.relu(x)).abs().max() for b in (1.0, 10.0, 100.0)]
    # max |x s(-b |x|)| is 0.2785 / b.
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] <= 0.279 / 100


@over_variants
def test_init_relu_is_ten_times_as_sharp(variant):
    x = images(1, 8, 4, 4)
    near_relu = Sparta(8, variant=variant, init="relu").double()
    torch.testing.assert_close(near_relu(x), x * torch.sigmoid(10 * x))


@pytest.mark.parametrize("variant", [v for v in GATES if v != "smoothmax"])
def test_a_constant_gate_is_linear(variant):
    sparta = Sparta(4, variant=variant, bias=True).double()
    with torch.no_grad():
        for parameter in sparta.parameters():
            parameter.zero_()
        sparta.gate.bias.fill_(0.7)
    x = images(2, 4, 5, 5)
    torch.testing.assert_close(sparta(x), torch.sigmoid(torch.tensor(0.7).double()) * x)


def test_a_constant_gate_of_the_smooth_maximum_is_linear():
    sparta = Sparta(4, bias=False).double()
    torch.nn.init.normal_(sparta.gate.weight)
    torch.nn.init.zeros_(sparta.gate.sharpness)
    x, other = images(2, 4, 5, 5), images(2, 4, 5, 5, seed=2)
    torch.testing.assert_close(sparta(2 * x - 3 * other), 2 * sparta(x) - 3 * sparta(other))
    torch.testing.assert_close(sparta(x), (x + F.conv2d(x, sparta.gate.weight, padding=2, groups=4)) / 2)


def test_smooth_maximum_tends_to_the_funnels_maximum():
    sparta = Sparta(4, variant="smoothmax", kernel_size=3, beta=1000.0).double()
    torch.nn.init.normal_(sparta.gate.weight)
    x = images(2, 4, 5, 5)
    condition = F.conv2d(x, sparta.gate.weight, padding=1, groups=4)
    torch.testing.assert_close(sparta(x), torch.maximum(x, condition), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("kernel_size", "dilation", "reach"), [(1, 1, 0), (3, 1, 1), (3, 2, 2), (5, 1, 2)])
@pytest.mark.parametrize("variant", ["depthwise", "smoothmax"])
def test_the_gate_looks_at_its_neighbourhood_and_no_further(variant, kernel_size, dilation, reach):
    sparta = Sparta(2, variant=variant, kernel_size=kernel_size, dilation=dilation).double()
    torch.nn.init.normal_(sparta.gate.weight)
    x = images(1, 2, 9, 9).requires_grad_()
    sparta(x)[0, 0, 4, 4].backward()
    rows, cols = x.grad[0, 0].nonzero(as_tuple=True)
    taps = [4 + dilation * i for i in range(-(kernel_size // 2), kernel_size // 2 + 1)]
    assert sorted(set(rows.tolist())) == taps
    assert sorted(set(cols.tolist())) == taps
    assert max(taps) - 4 == reach
    assert x.grad[0, 1].abs().sum() == 0


def test_the_gate_is_a_correlation_with_zero_padding():
    sparta = Sparta(1, variant="depthwise", kernel_size=3).double()
    torch.nn.init.normal_(sparta.gate.weight, generator=torch.Generator().manual_seed(0))
    x = images(1, 1, 4, 5)
    padded = torch.zeros(6, 7, dtype=torch.float64)
    padded[1:5, 1:6] = x[0, 0]
    g = torch.stack(
        [(padded[i : i + 3, j : j + 3] * sparta.gate.weight[0, 0]).sum() for i in range(4) for j in range(5)]
    )
    torch.testing.assert_close(sparta(x), x * torch.sigmoid(g).view(1, 1, 4, 5))


def test_attention_adds_one_map_for_all_channels():
    sparta = Sparta(4, variant="attention", kernel_size=3).double()
    torch.nn.init.normal_(sparta.gate.pooled)
    x = images(2, 4, 5, 5)
    added = sparta.gate(x) - x
    torch.testing.assert_close(added, added[:, :1].expand_as(x))
    maps = torch.stack([x.mean(1), x.max(1).values], dim=1)
    torch.testing.assert_close(added[:, :1], F.conv2d(maps, sparta.gate.pooled, padding=1))


def test_low_rank_mixing_adds_a_map_of_low_rank():
    sparta = Sparta(16, variant="lowrank").double()
    torch.nn.init.normal_(sparta.gate.expand)
    x = images(1, 16, 6, 6)
    added = (sparta.gate(x) - x)[0].flatten(1)
    assert torch.linalg.matrix_rank(added) == 2


def test_the_smooth_maximum_is_the_one_by_hand_and_the_default():
    sparta = Sparta(3, bias=True).double()
    assert (sparta.variant, sparta.gate.weight.shape[-1]) == ("smoothmax", 5)
    for parameter in sparta.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    x = images(2, 3, 6, 5)
    t = F.conv2d(x, sparta.gate.weight, sparta.gate.bias, padding=2, groups=3)
    torch.testing.assert_close(sparta(x), t + (x - t) * torch.sigmoid(sparta.gate.sharpness * (x - t)))


def test_one_shared_kernel_fits_every_width_and_is_the_depthwise_one_repeated():
    shared, depthwise = (Sparta(c, variant=v, kernel_size=3).double() for c, v in ((4, "shared"), (12, "depthwise")))
    torch.nn.init.normal_(shared.gate.weight)
    with torch.no_grad():
        depthwise.gate.weight.copy_(shared.gate.weight.expand(12, 1, 3, 3))
    x = images(2, 12, 5, 5)
    torch.testing.assert_close(shared(x), depthwise(x))


@over_variants
def test_every_parameter_gets_a_gradient_at_the_start(variant):
    torch.manual_seed(0)
    sparta = Sparta(8, variant=variant, bias=True).double()
    (sparta(images(4, 8, 5, 5)) * images(4, 8, 5, 5, seed=2)).sum().backward()
    # V of the low-rank form starts behind U = 0, and moves from the second step on.
    still = {name for name, p in sparta.named_parameters() if p.grad.abs().sum() == 0}
    assert still == ({"gate.reduce"} if variant == "lowrank" else set())


@over_variants
def test_the_gradient_is_nowhere_exactly_zero_where_relus_is(variant):
    x = (-images(4, 8, 6, 6).abs() - 0.1).requires_grad_()
    sparta = Sparta(8, variant=variant).double()
    for moved in (False, True):
        if moved:
            for parameter in sparta.parameters():
                torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
        (grad,) = torch.autograd.grad(sparta(x).sum(), x)
        # SiLU has one stationary point, at -1.2785, which no random input hits.
        assert (grad != 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "wide"}, "expected a variant among depthwise, attention, .* got 'wide'"),
        ({"kernel_size": 4}, "expected an odd kernel_size >= 1, got 4"),
        ({"dilation": 0}, "expected a whole dilation >= 1, got 0"),
        ({"beta": 0.0}, "expected a finite beta > 0, got 0.0"),
        ({"beta": float("nan")}, "expected a finite beta > 0, got nan"),
        ({"init": "tanh"}, "expected init among silu, relu, got 'tanh'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sparta(4, **options)


@pytest.mark.parametrize("shape", [(2, 5, 4, 4), (4, 4, 4)])
def test_an_input_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected x of shape \(B, 4, H, W\), got \(.*variant=\"shared\""):
        Sparta(4)(torch.zeros(shape))
