"""Conversion of torchvision's, timm's and hand-written networks."""

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from sparta_models import ActivationBank, Normalize, build_model, convert, sites
from sparta_models.activations.shared_independent import ReLU

ZOO = {
    # name: constructor, kind that is replaced by itself, calls of that kind on maps
    "resnet50": (torchvision.models.resnet50, "relu", 49),
    "mobilenet_v3": (torchvision.models.mobilenet_v3_small, "relu", 5),
    "efficientnet_b0": (torchvision.models.efficientnet_b0, "silu", 33),
    "convnext_tiny": (torchvision.models.convnext_tiny, "gelu", 18),
    "densenet121": (torchvision.models.densenet121, "relu", 121),
    "vgg16_bn": (torchvision.models.vgg16_bn, "relu", 13),
    "timm resnet50d": (lambda: timm.create_model("resnet50d", zero_init_last=False), "relu", 51),
}
SHAPE = (3, 64, 64)
over_zoo = pytest.mark.parametrize("name", ZOO)


@pytest.fixture(scope="module")
def network():
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            made[name] = ZOO[name][0]()
            if name == "vgg16_bn":
                # Its classifier's 120 million weights are not what is converted.
                made[name].classifier = nn.Sequential(nn.Linear(512 * 49, 8), nn.ReLU(), nn.Linear(8, 10))
        return made[name]

    return get


@over_zoo
def test_converting_an_activation_to_itself_changes_no_output(name, network):
    model, kind, count = network(name).eval(), *ZOO[name][1:]
    converted = convert(model, kind, input_shape=SHAPE, only=[kind])
    x = torch.rand(2, *SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(converted(x), model(x), atol=1e-5, rtol=1e-5)
    assert len(sites(converted)) == count
    assert {k: v.shape for k, v in converted.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    assert not converted.training


@over_zoo
def test_a_converted_network_takes_a_frozen_bank_and_trains(name, network):
    torch.manual_seed(0)
    bank = ActivationBank.from_model(build_model("resnet18", width=8))
    converted = convert(network(name).train(), "sparta", input_shape=SHAPE)
    assert converted.training
    bank.apply_to(converted, adapt="mean")
    frozen = ActivationBank.from_model(converted).digest
    optimizer = torch.optim.SGD([p for p in converted.parameters() if p.requires_grad], lr=0.01)
    before = [p.detach().clone() for p in converted.parameters() if p.requires_grad]
    F.cross_entropy(converted(torch.rand(2, *SHAPE)), torch.tensor([0, 1])).backward()
    optimizer.step()
    after = [p for p in converted.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in after)
    assert sum(not torch.equal(a, b) for a, b in zip(after, before, strict=True)) > len(after) / 2
    assert ActivationBank.from_model(converted).digest == frozen


def test_a_converted_sparta_learns(network):
    converted = convert(network("resnet50"), {"name": "sparta", "sharing": "stage"}, input_shape=SHAPE).train()
    F.cross_entropy(converted(torch.rand(2, *SHAPE)), torch.tensor([0, 1])).backward()
    kernels = [p for n, p in converted.named_parameters() if "gate.weight" in n]
    assert len(kernels) == len(converted.shared_activations) >= 9
    assert all(p.grad.abs().sum() > 0 for p in kernels)


def test_one_reused_module_becomes_one_site_per_call(network):
    converted = convert(network("resnet50"), "relu", input_shape=SHAPE)
    names = {info.name for info in sites(converted)}
    assert {"layer1.0.relu", "layer1.0.relu_2", "layer1.0.relu_3"} <= names
    functions = {id(converted.get_submodule(name).function) for name in names}
    assert len(functions) == 49


def test_stages_follow_the_resolution(network):
    places = sites(convert(network("resnet50"), "relu", input_shape=SHAPE))
    assert [(p.name, p.stage, p.channels) for p in places[:2]] == [("relu", 0, 64), ("layer1.0.relu", 1, 64)]
    assert [sum(p.stage == s for p in places) for s in range(5)] == [1, 10, 12, 18, 8]
    assert all(p.channels >= 512 for p in places if p.stage == 4)


def test_activations_on_vectors_and_single_pixels_are_kept_and_reported(network):
    converted = convert(network("vgg16_bn"), "sparta", input_shape=SHAPE)
    kept = [r for r in converted.replacements if r.site is None]
    assert [(r.kind, r.was, r.shape) for r in kept] == [("relu", "classifier.1 (ReLU)", (2, 8))]
    excitation = convert(network("mobilenet_v3"), "sparta", input_shape=SHAPE)
    assert {r.shape[2:] for r in excitation.replacements if r.site is None} == {(1, 1), ()}


def test_maps_with_channels_behind_get_sites_for_those_channels(network):
    converted = convert(network("convnext_tiny"), "sparta", input_shape=SHAPE)
    assert {info.channels for info in sites(converted)} == {384, 768, 1536, 3072}


class Hand(nn.Module):
    """Functions, methods, one module in two places, an in-place call whose input is read again."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 4)
        self.act = nn.ReLU()

    def forward(self, x):
        x = F.relu(self.conv1(x))
        y = self.conv2(x) - 0.1
        z = F.relu(y, inplace=True)
        x = self.act(torch.relu(x - 0.2) + z + 2 * y)
        x = (x - 0.1).relu()
        return self.act(self.fc(x.mean((2, 3))))


def test_functions_methods_and_in_place_calls_keep_their_meaning():
    torch.manual_seed(0)
    model = Hand()
    converted = convert(model, "relu", input_shape=(3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(converted(x), model(x))
    assert [r.was for r in converted.replacements] == [
        "relu",
        "relu",
        "relu",
        "act (ReLU)",
        "Tensor.relu",
        "act (ReLU)",
    ]
    assert [r.site is None for r in converted.replacements] == [False] * 5 + [True]
    # The module that is kept on the vector is still torch's.
    assert isinstance(converted.act, nn.ReLU)
    assert all(isinstance(converted.get_submodule(s.name).function, ReLU) for s in sites(converted))


def test_the_original_is_left_alone():
    model = Hand()
    convert(model, "sparta", input_shape=(3, 8, 8))
    assert isinstance(model.act, nn.ReLU)
    assert not hasattr(model, "sites")


def test_an_activation_inside_a_norm_is_found():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), timm.layers.BatchNormAct2d(4))
    converted = convert(model.eval(), "relu", input_shape=(3, 8, 8))
    assert [(s.name, s.channels) for s in sites(converted)] == [("1.act", 4)]
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(converted(x), model(x))
    converted.train()(x)
    assert converted.get_submodule("1").num_batches_tracked == 1


def test_the_training_mode_is_not_frozen_into_the_graph(network):
    converted = convert(network("efficientnet_b0").eval(), "silu", input_shape=SHAPE, only=["silu"])
    x = torch.rand(2, *SHAPE)
    assert torch.equal(converted(x), converted(x))
    converted.train()
    assert not torch.equal(converted(x), converted(x))


class DependsOnData(nn.Module):
    def forward(self, x):
        return F.relu(x) if x.sum() > 0 else x


class DependsOnMode(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x):
        x = self.conv(x)
        return F.relu(x) if self.training else x


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (DependsOnData(), {}, "expected a network that torch.fx can trace, got DependsOnData: .*control flow"),
        (DependsOnMode(), {}, "expected the same graph in train and eval mode, got two of DependsOnMode"),
        (nn.Conv2d(3, 4, 3), {}, "got none to replace"),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU()), {"input_shape": (3, 2, 2)}, "got none to replace"),
        (Hand(), {"input_shape": (1, 8, 8)}, r"expected a network for images of shape \(1, 8, 8\)"),
        (Hand(), {"only": ["rel"]}, r"unknown kinds \['rel'\]; known: elu"),
    ],
)
def test_what_cannot_be_converted_is_refused_with_the_remedy(model, options, message):
    with pytest.raises(ValueError, match=message):
        convert(model, "sparta", **options)


def test_a_normalisation_in_front_is_kept_and_the_network_takes_images_of_unit_range(network):
    plain = network("vgg16_bn").eval()
    x = torch.rand(2, 3, 32, 32)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    model = convert(nn.Sequential(Normalize(3, mean, std), plain), "relu", input_shape=(3, 32, 32))
    with torch.no_grad():
        expected = plain((x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
        torch.testing.assert_close(model.eval()(x), expected)
