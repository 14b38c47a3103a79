"""Which calls in a network are activations that `convert` replaces, and which are not."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from sparta_models import convert


class Calls(nn.Module):
    """One call of an activation, whose input is read again behind it."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.slope, self.function = nn.Conv2d(3, 4, 3), nn.Parameter(torch.tensor([0.25])), function

    def forward(self, x):
        y = self.conv(x)
        z = self.function(y, self.slope)
        return z + 2 * y


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda y, _: F.relu(y, True), "relu"),
        (lambda y, _: F.relu(y, False), "relu"),
        (lambda y, _: F.relu(inplace=True, input=y), "relu"),
        (lambda y, _: F.relu_(y), "relu"),
        (lambda y, _: F.relu6(y, True), "relu6"),
        (lambda y, _: F.leaky_relu(y, 0.01, True), "leaky_relu"),
        (lambda y, _: F.elu(y, 1.0, True), "elu"),
        (lambda y, _: F.elu_(y), "elu"),
        (lambda y, _: F.silu(y, True), "silu"),
        (lambda y, slope: y.prelu(slope), "prelu"),
        (torch.prelu, "prelu"),
        (lambda y, _: y.clamp(min=0), "relu"),
        (lambda y, _: y.clamp(0.0), "relu"),
        (lambda y, _: y.clamp_(min=0), "relu"),
        (lambda y, _: y.clamp_min(0), "relu"),
        (lambda y, _: torch.clamp(y, min=0), "relu"),
        (lambda y, _: torch.clamp_min_(y, 0.0), "relu"),
        (lambda y, _: y.clip(0, 6), "relu6"),
        (lambda y, _: torch.clamp(y, max=6, min=0), "relu6"),
        (lambda y, _: F.hardtanh(y, 0.0, 6.0), "relu6"),
        (lambda y, _: F.threshold(y, 0.0, 0.0), "relu"),
        (lambda y, _: torch.threshold(y, threshold=0, value=0), "relu"),
    ],
)
def test_a_call_in_any_form_keeps_its_meaning(function, kind):
    torch.manual_seed(0)
    model = Calls(function)
    converted = convert(model, kind, input_shape=(3, 8, 8))
    assert [(r.kind, r.site is None) for r in converted.replacements] == [(kind, False)]
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(converted(x), model(x))


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda y, _: F.selu(y, True), "selu"),
        (lambda y, _: torch.selu(y), "selu"),
        (lambda y, _: F.celu(y), "celu"),
        (lambda y, _: torch.celu_(y), "celu"),
        (lambda y, _: F.rrelu(y), "rrelu"),
        (nn.SELU(), "selu"),
        (nn.CELU(), "celu"),
        (nn.RReLU(), "rrelu"),
    ],
)
def test_other_rectifiers_are_replaced_too(function, kind):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), function) if isinstance(function, nn.Module) else Calls(function)
    (only,) = convert(model, "sparta", input_shape=(3, 8, 8)).replacements
    assert (only.kind, only.shape, only.site is None) == (kind, (2, 4, 6, 6), False)


@pytest.mark.parametrize(
    "function",
    [
        lambda y, _: y.clamp(min=0.1),
        lambda y, _: y.clamp(0, 1),
        lambda y, _: F.hardtanh(y),
        lambda y, _: F.threshold(y, 0.0, 1.0),
        lambda y, s: y + s,
    ],
)
def test_what_is_no_rectifier_is_left_alone(function):
    with pytest.raises(ValueError, match="got none to replace"):
        convert(Calls(function), "sparta", input_shape=(3, 8, 8))


class HardSigmoid(nn.Module):
    def forward(self, x):
        return F.relu6(x + 3) / 6


class WrittenOut(nn.Module):
    """x tanh(log(1 + exp(x))) of modules and an operator."""

    def __init__(self):
        super().__init__()
        self.softplus, self.tanh = nn.Softplus(), nn.Tanh()

    def forward(self, x):
        return x * self.tanh(self.softplus(x))


GATES = {
    "hard sigmoid": HardSigmoid,
    "hard swish": lambda: Calls(lambda y, _: y * F.relu6(y + 3) / 6),
    "hard swish by methods": lambda: Calls(lambda y, _: y.mul(y.add(3).clamp(0, 6).div(6))),
    "mish by modules": WrittenOut,
    "mish by functions": lambda: Calls(lambda y, _: y * torch.tanh(F.softplus(y))),
    "hard swish by a clamp": lambda: Calls(lambda y, _: y * F.relu(y + 3).clamp(max=6) / 6),
    "squared": lambda: Calls(lambda y, _: y * F.relu(y)),
}


@pytest.mark.parametrize("gate", GATES)
def test_a_rectifier_that_is_part_of_a_gate_is_kept_and_reported(gate):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), GATES[gate]())
    converted = convert(model, "relu", input_shape=(3, 8, 8))
    assert [r.site for r in converted.replacements] == ["1", None]
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(converted(x), model(x))


class ReLUOfTwo(nn.Module):
    def forward(self, a, b):
        return F.relu(a + b)


ReLUOfTwo.__name__ = "ReLU"


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), ReLUOfTwo()

    def forward(self, x):
        y = self.conv(x)
        return self.act(y, 0.5 * y)


def test_a_module_of_two_inputs_is_no_activation_whatever_its_name():
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(2, 3, 8, 8)
    converted = convert(model, "relu", input_shape=(3, 8, 8))
    torch.testing.assert_close(converted(x), model(x))


class ReadsItsInputAgain(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), act

    def forward(self, x):
        y = self.conv(x)
        return self.act(y) + 2 * y


class Swish(nn.Module):
    def __init__(self, inplace):
        super().__init__()
        self.inplace = inplace

    def forward(self, x):
        return x * x.sigmoid()


@pytest.mark.parametrize("swish", [Swish(True), timm.layers.Swish(True), timm.layers.Swish(False)])
def test_what_is_written_out_says_whether_it_is_in_place(swish):
    torch.manual_seed(0)
    model, x = ReadsItsInputAgain(swish), torch.randn(2, 3, 8, 8)
    converted = convert(model, "silu", input_shape=(3, 8, 8))
    assert [(r.kind, r.site is None) for r in converted.replacements] == [("silu", False)]
    torch.testing.assert_close(converted(x), model(x))


def test_a_module_with_the_name_of_an_operator_is_none():
    model = nn.Sequential()
    model.add_module("add", nn.Conv2d(3, 4, 3))
    model.add_module("relu", nn.ReLU6())
    assert [r.site for r in convert(model, "sparta", input_shape=(3, 8, 8)).replacements] == ["relu"]


def test_a_rectified_map_that_a_mask_or_an_attention_multiplies_is_replaced():
    model = Calls(lambda y, slope: F.relu(y) * slope * torch.sigmoid(F.avg_pool2d(y, 3, 1, 1)))
    assert [r.site for r in convert(model, "sparta", input_shape=(3, 8, 8)).replacements] == ["sites.relu"]


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (timm.layers.Mish(), "mish"),
        (timm.layers.HardSwish(), "hardswish"),
        (timm.layers.Swish(), "silu"),
        (timm.layers.GELUTanh(), "gelu"),
        (nn.Hardtanh(0.0, 6.0), "relu6"),
        (nn.Threshold(0.0, 0.0), "relu"),
    ],
)
def test_an_activation_that_is_written_out_is_one_call(module, kind):
    (only,) = convert(nn.Sequential(nn.Conv2d(3, 4, 3), module), "sparta", input_shape=(3, 8, 8)).replacements
    assert (only.kind, only.site) == (kind, "1")


@pytest.mark.parametrize("module", [nn.Hardtanh(), nn.Threshold(0.1, 0.0), timm.layers.HardSigmoid()])
def test_other_clips_are_left_alone(module):
    with pytest.raises(ValueError, match="got none to replace"):
        convert(nn.Sequential(nn.Conv2d(3, 4, 3), module), "sparta", input_shape=(3, 8, 8))
