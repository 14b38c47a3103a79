"""What a forward may do besides calling layers: `convert` keeps it, or says why it cannot."""

import copy
import random

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from sparta_models import ActivationBank, build_model, convert, sites

SHAPE = (3, 8, 8)


class Net(nn.Module):
    """A convolution, an activation, a head; what a test asks of it stands in a subclass's forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        return self.end(F.relu(self.conv(x)))

    def end(self, x):
        return self.head(x.mean((2, 3)))


def same(model, **options):
    """The converted network, with ReLU in ReLU's place, after it gave what the network gives."""
    model.eval()
    converted = convert(model, "relu", input_shape=SHAPE, **options)
    x = torch.randn(2, *SHAPE)
    torch.testing.assert_close(converted(x), model(x))
    return converted


def test_a_users_wrapper_is_part_of_the_network_whatever_its_child_is_called():
    class Scaled(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module
            self.register_buffer("shift", torch.ones(1))

        def forward(self, x):
            return self.module((x - self.shift) * 100)

    assert "shift" in same(Scaled(Net())).state_dict()


def test_arguments_behind_the_first_have_their_defaults():
    class Optional(Net):
        def forward(self, x, mask=None, features=False, *, scale=2.0):
            if mask is not None:
                x = x * mask
            z = F.relu(self.conv(x)) * scale
            return (self.end(z), z) if features else self.end(z)

    class Starred(Net):
        def forward(self, *images):
            return super().forward(images[0])

    assert [node.name for node in same(Optional()).graph.nodes if node.op == "placeholder"] == ["x"]
    same(Starred())


@pytest.mark.parametrize(
    "draw", [lambda: torch.randn(1, 3, 8, 8), lambda: random.gauss(0, 1), lambda: torch.rand(()).item()]
)
def test_random_numbers_that_a_graph_would_keep_are_refused(draw):
    class Noisy(Net):
        def forward(self, x):
            return super().forward(x + draw())

    with pytest.raises(ValueError, match=r"draws random numbers .* which a graph would keep; use torch.randn_like"):
        convert(Noisy(), "relu", input_shape=SHAPE)


def test_random_numbers_of_the_inputs_shape_are_drawn_at_every_call():
    class Noisy(Net):
        def forward(self, x):
            return super().forward(x + torch.randn_like(x))

    converted, x = convert(Noisy(), "relu", input_shape=SHAPE), torch.randn(2, *SHAPE)
    assert not torch.equal(converted(x), converted(x))


class Reassigns(Net):
    def forward(self, x):
        x = self.conv(x)
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3))
        return self.end(F.relu(x - self.mean.view(1, -1, 1, 1)))


class Counts(Net):
    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("network", [Reassigns, Counts])
def test_a_buffer_that_a_graph_would_leave_as_it_is_is_refused(network):
    with pytest.raises(ValueError, match="another value in a buffer's place"):
        convert(network(), "relu", input_shape=SHAPE)


def test_a_buffer_that_is_changed_by_its_methods_goes_on_changing():
    class Moves(Net):
        def forward(self, x):
            x = self.conv(x)
            self.mean.lerp_(x.detach().mean((0, 2, 3)), 0.1)
            return self.end(F.relu(x - self.mean.view(1, -1, 1, 1)))

    model = Moves()
    converted = convert(model, "relu", input_shape=SHAPE)
    for _ in range(3):
        x = torch.randn(2, *SHAPE)
        torch.testing.assert_close(converted(x), model(x))
    torch.testing.assert_close(converted.state_dict()["mean"], model.mean)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_what_the_caller_switched_off_changes_nothing(around):
    class Switches(Net):
        def forward(self, x):
            with torch.no_grad():
                return super().forward(x)

    with around():
        converted = convert(Net(), "sparta", input_shape=SHAPE)
        with pytest.raises(ValueError, match="switches gradients"):
            convert(Switches(), "relu", input_shape=SHAPE)
    converted(torch.randn(2, *SHAPE)).sum().backward()
    assert all(parameter.grad is not None for parameter in converted.parameters())


@pytest.mark.parametrize("move", [lambda x: x.movedim(1, -1), lambda x: torch.moveaxis(x, (2, 3), (1, 2))])
def test_channels_are_found_behind_moved_axes(move):
    class Moved(Net):
        def forward(self, x):
            return self.head(F.relu(move(self.conv(x))).mean((1, 2)))

    converted = convert(Moved(), "sparta", input_shape=(3, 10, 12))
    assert [info.channels for info in sites(converted)] == [4]
    assert converted(torch.randn(2, 3, 9, 7)).shape == (2, 2)


def test_hooks_run_neither_in_the_conversion_nor_in_the_copy():
    seen = []

    def note(*given):
        seen.append(given)

    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Conv2d(4, 2, 3))
    for module in model.modules():
        module.register_forward_hook(note)
        module.register_forward_pre_hook(note)
        module.register_full_backward_hook(note)
    converted = convert(model, "relu", input_shape=SHAPE)
    converted(torch.randn(1, *SHAPE)).sum().backward()
    assert not seen
    assert model[0]._forward_hooks


def test_the_hook_that_makes_a_weight_stays():
    conv = nn.utils.spectral_norm(nn.Conv2d(3, 4, 3))
    converted = same(nn.Sequential(conv, nn.ReLU()))
    assert "0.weight_orig" in converted.state_dict()


def test_a_network_that_cannot_be_copied_is_refused_with_what_to_do():
    conv = nn.Conv2d(3, 4, 3)
    prune.l1_unstructured(conv, "weight", amount=0.5)
    with pytest.raises(ValueError, match="expected a network that can be copied"):
        convert(nn.Sequential(conv, nn.ReLU()), "relu", input_shape=SHAPE)


def test_an_activation_that_asks_for_its_input_is_one_call():
    class Swish(nn.Module):
        def forward(self, x):
            return x if x.numel() == 0 else x * torch.sigmoid(x)

    converted = convert(nn.Sequential(nn.Conv2d(3, 4, 3), Swish()), "sparta", input_shape=SHAPE)
    assert [r.kind for r in converted.replacements] == ["silu"]


def test_no_site_takes_anothers_name():
    class Taken(Net):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()
            self.act_2 = nn.Conv2d(4, 4, 3, padding=1)
            self.sites = nn.Parameter(torch.ones(()))

        def forward(self, x):
            x = self.act_2(self.act(self.conv(x)))
            return self.end(F.relu(self.act(x) * self.sites - 0.1))

    converted = same(Taken())
    assert [info.name for info in sites(converted)] == ["act", "act_3", "sites_2.relu"]
    assert {"act_2.weight", "sites"} <= set(converted.state_dict())


def test_a_norm_with_its_activation_that_is_called_twice_has_one_site():
    class Shared(Net):
        def __init__(self):
            super().__init__()
            self.conv_2, self.bn = nn.Conv2d(4, 4, 3), timm.layers.BatchNormAct2d(4)

        def forward(self, x):
            return self.end(self.bn(self.conv_2(self.bn(self.conv(x)))))

    converted = same(Shared())
    assert [info.name for info in sites(converted)] == ["bn.act"]
    assert [r.site for r in converted.replacements] == ["bn.act", "bn.act"]


def test_a_clamp_into_its_own_input_is_in_place():
    class Into(Net):
        def forward(self, x):
            h = self.conv(x)
            torch.clamp(h, min=0, out=h)
            return self.end(h)

    with torch.no_grad():
        assert len(sites(same(Into()))) == 1


def test_a_very_deep_network_is_converted():
    class Deep(nn.Module):
        def forward(self, x):
            for _ in range(400):
                x = F.relu(0.5 * x + x)
            return x

    assert len(sites(convert(Deep(), "relu", input_shape=(3, 4, 4)))) == 400


def test_shallow_copies_know_what_was_replaced():
    converted = convert(Net(), "sparta", input_shape=SHAPE)
    twin = copy.copy(converted)
    assert twin.replacements == converted.replacements
    assert ActivationBank.from_model(twin) == ActivationBank.from_model(converted)


def test_a_bank_asks_for_a_network_with_values():
    bank = ActivationBank.from_model(build_model("resnet8"))
    with torch.device("meta"):
        empty = build_model("resnet8")
    with pytest.raises(ValueError, match="got one on the meta device"):
        bank.apply_to(empty)


class Reversed(torch.autograd.Function):
    """Gradient reversal: nothing of it is in a trace."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, dy):
        return -dy


class Reverses(Net):
    def forward(self, x):
        return self.end(Reversed.apply(F.relu(self.conv(x))))


class AsksForTheType(Net):
    def forward(self, x):
        return super().forward((x - 0.5) * 4 if torch.is_tensor(x) else x)


class DrawsByNumpy(Net):
    def __init__(self):
        super().__init__()
        self.generator = np.random.default_rng(0)

    def forward(self, x):
        return super().forward(x) * float(self.generator.random())


class DrawsByItsOwnGenerator(Net):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        return super().forward(x * torch.rand(1, 3, 1, 1, generator=self.generator))


class Counts(Net):
    steps = 0

    def forward(self, x):
        self.steps += 1
        return super().forward(x) * self.steps


@pytest.mark.parametrize(
    "make",
    [Reverses, AsksForTheType, DrawsByNumpy, DrawsByItsOwnGenerator, Counts],
    ids=lambda make: make.__name__,
)
def test_a_network_that_computes_something_else_than_its_trace_is_refused(make):
    with pytest.raises(ValueError, match=r"expected a network that its torch.fx trace computes, got \w+, whose"):
        convert(make(), "relu", input_shape=SHAPE)


def test_the_comparison_leaves_network_and_random_numbers_alone():
    network = Net().train()
    before, drawn = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    convert(network, "relu", input_shape=SHAPE)
    assert network.training
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
@pytest.mark.parametrize("compiled", [torch.jit.script, lambda n: nn.Sequential(torch.jit.script(n), nn.ReLU())])
def test_scripted_networks_are_refused_by_name(compiled):
    with pytest.raises(ValueError, match="expected a network of Python, got a ScriptModule"):
        convert(compiled(Net()), "relu", input_shape=SHAPE)


def test_a_first_parameter_that_is_no_float_does_not_matter():
    class Counted(Net):
        def __init__(self):
            super().__init__()
            floats = dict(self._modules)
            self._modules.clear()
            self.step = nn.Parameter(torch.tensor(1), requires_grad=False)
            self._modules.update(floats)

        def forward(self, x):
            return super().forward(x) * self.step

    converted = same(Counted())
    assert next(converted.parameters()).dtype == torch.int64
    assert converted.head.weight.dtype == torch.float32


@pytest.mark.filterwarnings("error")
def test_a_network_that_cannot_run_here_is_taken_as_its_trace_says():
    class Normalised(Net):
        def forward(self, x):
            return self.end(F.local_response_norm(F.relu(self.conv(x)), 2))  # a CPU has none in half precision

    assert convert(Normalised().half(), "relu", input_shape=SHAPE).replacements


def test_a_forward_on_the_instance_is_refused_before_it_runs():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).train()
    network.forward = lambda x: network[1](network[0](x))
    with pytest.raises(ValueError, match="expected the forward of the network's class, got one on the instance"):
        convert(network, "relu", input_shape=SHAPE)
    assert network[1].num_batches_tracked == 0


def test_no_random_state_but_the_forked_one_is_seeded(monkeypatch):
    def seed(*_):
        raise AssertionError

    network = Net()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seed)
    convert(network, "relu", input_shape=SHAPE)
