"""Conversion of torchvision's, timm's and hand-written networks."""

import copy
import pickle

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from sparta_models import ActivationBank, Normalize, Sparta, build_model, convert, named_sites, sites
from sparta_models.activations.shared_independent import ReLU
from sparta_models.transfer import match

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


@over_zoo
def test_a_converted_sparta_learns(name, network):
    converted = convert(network(name), {"name": "sparta", "sharing": "stage"}, input_shape=SHAPE).train()
    F.cross_entropy(converted(torch.rand(2, *SHAPE)), torch.tensor([0, 1])).backward()
    kernels = [p for n, p in converted.named_parameters() if "gate.weight" in n]
    assert len(kernels) == len(converted.shared_activations) >= 4
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
    assert all(p.channels >= 512 for p in places if p.stage == 4)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("resnet50", [1, 9, 12, 18, 9]),
        # Three convolutions in the stem.
        ("timm resnet50d", [3, 9, 12, 18, 9]),
        # Dense layers of two, and behind all but the last block a transition; one norm at the end.
        ("densenet121", [1, 13, 25, 49, 33]),
        # No activation in the stem.
        ("convnext_tiny", [0, 3, 3, 9, 3]),
        # The first block of a stage expands at the resolution before it, and belongs to the stage that it leads to.
        ("efficientnet_b0", [1, 1, 4, 4, 12, 11]),
        ("mobilenet_v3", [1, 1, 4, 10, 7]),
        ("vgg16_bn", [0, 2, 2, 3, 3, 3]),
    ],
)
def test_stages_have_as_many_sites_as_the_architectures_say(name, counts, network):
    places = sites(convert(network(name), "relu", input_shape=SHAPE))
    assert [sum(p.stage == s for p in places) for s in range(len(counts))] == counts
    assert sum(counts) == len(places)


TWINS = ["resnet18", "resnet34", "resnet50", "vgg16_bn", "mobilenet_v2"]


@pytest.mark.parametrize("in_front", [False, True], ids=["alone", "behind a normalisation"])
@pytest.mark.parametrize("name", TWINS)
def test_a_converted_network_has_the_places_of_ours(name, in_front, network):
    theirs = network(name) if name in ZOO else getattr(torchvision.models, name)()
    converted = convert(nn.Sequential(Normalize(3), theirs) if in_front else theirs, "relu", input_shape=SHAPE)
    with torch.device("meta"):
        ours = build_model(name, activation="relu", **({} if name == "vgg16_bn" else {"stem": "imagenet"}))
    a, b = sites(converted), sites(ours)
    assert [(s.stage, s.block, s.position, s.depth, s.channels) for s in a] == [
        (s.stage, s.block, s.position, s.depth, s.channels) for s in b
    ]
    # So that a bank of ours goes in site by site, and one of theirs comes back.
    assert [s.name for s in match(a, b).values()] == [s.name for s in b]
    assert [s.name for s in match(b, a).values()] == [s.name for s in a]


def test_the_first_and_second_activation_of_a_block_get_those_of_a_resnet18_bank():
    torch.manual_seed(0)
    source = build_model("resnet18")
    for i, (_, site) in enumerate(named_sites(source)):
        nn.init.constant_(site.function.gate.weight, float(i))
    bank = ActivationBank.from_model(source)
    converted = bank.apply_to(convert(torchvision.models.resnet18(num_classes=10), input_shape=SHAPE))
    found = {name: site.function.gate.weight.mean().item() for name, site in named_sites(converted)}
    blocks = [f"layer{i}.{j}.relu" for i in range(1, 5) for j in range(2)]
    expected = ["relu", *(name for block in blocks for name in (block, f"{block}_2"))]
    assert found == {name: float(i) for i, name in enumerate(expected)}
    assert ActivationBank.from_model(converted).digest != bank.digest  # the keys are the target's
    back = ActivationBank.from_model(converted).apply_to(build_model("resnet18"))
    assert ActivationBank.from_model(back) == bank


class Mixed(nn.Module):
    """A residual block that calls a function first and a module second."""

    def __init__(self):
        super().__init__()
        self.act, self.conv1, self.conv2 = nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.act(self.conv2(F.relu(self.conv1(x))) + x)


class Add(nn.Module):
    def forward(self, x, y):
        return x + y


class AddsByAModule(Mixed):
    def __init__(self):
        super().__init__()
        self.add = Add()

    def forward(self, x):
        return self.act(self.add(self.conv2(F.relu(self.conv1(x))), x))


@pytest.mark.parametrize("block", [Mixed, AddsByAModule])
def test_sites_of_a_users_block_are_in_the_order_of_their_calls(block):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), block(), nn.Sequential(block()))
    converted = convert(model, "relu", input_shape=(3, 8, 8))
    assert [(s.name, s.stage, s.block, s.position) for s in sites(converted)] == [
        ("1", 0, 0, 0),
        ("sites.relu", 1, 0, 0),
        ("2.act", 1, 0, 1),
        ("sites.relu_1", 1, 1, 0),
        ("3.0.act", 1, 1, 1),
    ]


def test_a_block_that_is_called_twice_is_two_blocks():
    block = Mixed()
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), block, block)
    places = [(s.block, s.position) for s in sites(convert(model, "relu", input_shape=(3, 8, 8)))]
    assert places == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_in_a_network_without_blocks_every_call_is_one(network):
    places = sites(convert(network("vgg16_bn"), "relu", input_shape=SHAPE))
    assert [s.block for s in places] == [s.depth for s in places]


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


def test_sites_that_a_network_has_are_not_overwritten():
    trained = build_model("resnet8", width=4)
    with pytest.raises(ValueError, match="expected a network without activation sites, got one that has them"):
        convert(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), trained), "relu", input_shape=(3, 8, 8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_network_of_another_type_is_converted(dtype):
    converted = convert(Hand().to(dtype), "sparta", input_shape=(3, 8, 8))
    assert {p.dtype for p in converted.parameters()} == {dtype}
    assert converted(torch.rand(2, 3, 8, 8).to(dtype)).dtype == dtype


def test_every_module_keeps_its_mode():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model[1].eval()
    converted = convert(model, "relu", input_shape=(3, 8, 8))
    modes = [converted.get_submodule(name).training for name in ("0", "1", "3", "4")]
    assert modes == [True, False, True, True]


def test_a_refused_input_shape_prints_nothing(capsys):
    with pytest.raises(
        ValueError, match=r"got: Invalid channel dimensions; pass the shape of its images as input_shape"
    ) as refusal:
        convert(Hand(), "sparta", input_shape=(1, 8, 8))
    assert "\n" not in str(refusal.value)
    assert capsys.readouterr() == ("", "")


def test_a_network_that_holds_our_activations_is_traced_and_they_are_kept_and_reported():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Sparta(4), nn.Conv2d(4, 4, 3), nn.ReLU())
    nn.init.normal_(model[1].gate.weight)
    converted = convert(model, "relu", input_shape=(3, 8, 8))
    assert [(r.kind, r.was, r.site) for r in converted.replacements] == [
        ("sparta", "1 (Sparta)", None),
        ("relu", "3 (ReLU)", "3"),
    ]
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(converted(x), model(x))


@pytest.mark.parametrize("sharing", ["site", "stage"])
def test_copies_and_averages_of_a_converted_network_know_what_it_knows(sharing):
    torch.manual_seed(0)
    converted = convert(Hand(), {"name": "sparta", "sharing": sharing}, input_shape=(3, 8, 8))
    for parameter in converted.parameters():
        nn.init.normal_(parameter)
    bank, x = ActivationBank.from_model(converted), torch.randn(2, 3, 8, 8)
    twin, average = copy.deepcopy(converted), AveragedModel(converted)
    thawed = pickle.loads(pickle.dumps(converted))
    for other in (twin, average, copy.deepcopy(twin), thawed, copy.deepcopy(thawed)):
        assert ActivationBank.from_model(other) == bank
        assert ActivationBank.from_model(other).architecture == "Hand"
        assert sites(other) == sites(converted)
        assert torch.equal(other(x), converted(x))
    assert twin.replacements == converted.replacements
    assert twin.state_dict().keys() == converted.state_dict().keys() == thawed.state_dict().keys()
    assert thawed.replacements == converted.replacements
    # A copy has activations of its own.
    nn.init.zeros_(next(site for _, site in named_sites(twin)).function.gate.weight)
    average.update_parameters(twin)
    assert ActivationBank.from_model(converted) == bank
    assert bank not in (ActivationBank.from_model(twin), ActivationBank.from_model(average))


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


class Forward(nn.Module):
    """A small network with any forward."""

    def __init__(self, forward):
        super().__init__()
        self.conv, self.norm, self.linear, self.drop = (
            nn.Conv2d(3, 6, 3),
            nn.LayerNorm(6),
            nn.Linear(6, 12),
            nn.Dropout(),
        )
        self.scale, self.forward_ = torch.full((12,), 2.0), forward

    def forward(self, x):
        return self.forward_(self, x)


def behind(self, x):
    return self.linear(self.norm(self.conv(x).permute(0, 2, 3, 1)))


@pytest.mark.parametrize(
    ("forward", "channels"),
    [
        (lambda self, x: F.gelu(self.drop(behind(self, x))), 12),
        (lambda self, x: F.gelu(0.5 * self.scale * behind(self, x) + 1), 12),
        (lambda self, x: F.gelu(behind(self, x).split((4, 8), dim=-1)[1]), 8),
        (lambda self, x: F.gelu(torch.cat(behind(self, x).chunk(2, dim=-1)[::-1], -1)), 12),
        (lambda self, x: F.gelu(behind(self, x)[:, 1:, :, 2:]), 10),
        (lambda self, x: F.gelu(behind(self, x).permute(0, 3, 1, 2)), 12),
        (lambda self, x: F.gelu(self.conv(x).permute(dims=(0, 2, 3, 1))), 6),
        (lambda self, x: F.gelu(torch.permute(self.conv(x), (0, -2, -1, 1))), 6),
        (lambda self, x: F.gelu(self.conv(x).transpose(1, 2)), 6),
        (lambda self, x: F.gelu(self.conv(x).transpose(1, 2).transpose(-1, 1)), 6),
        (lambda self, x: F.gelu(self.conv(x)), 6),
    ],
)
@pytest.mark.parametrize("size", [8, 11])
def test_a_site_looks_at_the_channels_wherever_they_lie(forward, channels, size):
    torch.manual_seed(0)
    model = Forward(forward).eval()
    converted = convert(model, "gelu", input_shape=(3, size, size))
    assert [site.channels for site in sites(converted)] == [channels]
    x = torch.randn(2, 3, size, size + 2)  # rows and columns are no channels: another size passes too
    torch.testing.assert_close(converted(x), model(x))


def test_of_a_gated_network_the_maps_with_channels_behind_are_found():
    converted = convert(timm.create_model("mambaout_femto", num_classes=2), "gelu", input_shape=SHAPE)
    widths = {site.channels for site in sites(converted) if site.stage > 1}
    assert min(widths) >= 48  # none is the height of a map: 16, 8, 4, 2


def no_grad(self, x):
    with torch.no_grad():
        x = self.conv(x)
    return F.relu(x)


def autocast(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        x = self.conv(x)
    return F.relu(x)


@pytest.mark.parametrize("forward", [no_grad, autocast])
def test_what_a_graph_cannot_hold_is_refused(forward):
    with pytest.raises(ValueError, match=r"got Forward: its forward switches gradients or autocast.*put that around"):
        convert(Forward(forward), "relu", input_shape=(3, 8, 8))
    model = Forward(lambda self, x: F.relu(self.conv(x)))
    with torch.no_grad():  # around the whole it is no matter
        assert len(sites(convert(model, "relu", input_shape=(3, 8, 8)))) == 1


def test_constants_of_a_forward_and_plain_tensors_are_no_part_of_the_state():
    model = Forward(lambda self, x: F.relu(self.linear(self.conv(x).movedim(1, 3)) * self.scale + torch.tensor(0.5)))
    model.register_buffer("unsaved", torch.ones(12), persistent=False)
    converted = convert(model, "relu", input_shape=(3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(converted(x), model(x))
    assert converted.state_dict().keys() == {f"{m}.{p}" for m in ("conv", "linear") for p in ("weight", "bias")}


def test_wrappers_are_left_behind_and_one_kind_may_be_named_alone():
    inner = Forward(lambda self, x: F.relu(self.conv(F.gelu(x))))
    for model in (nn.DataParallel(inner), torch.compile(inner, backend="eager")):
        converted = convert(model, "sparta", input_shape=(3, 8, 8), only="relu")
        assert [replacement.kind for replacement in converted.replacements if replacement.site] == ["relu"]


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
        (nn.Sequential(DependsOnMode().eval()), {}, "expected the same graph"),
        (DependsOnMode(), {}, "expected the same graph in train and eval mode, got two of DependsOnMode"),
        (nn.Conv2d(3, 4, 3), {}, "got none to replace"),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU()), {"input_shape": (3, 2, 2)}, "got none to replace"),
        (Hand(), {"input_shape": (1, 8, 8)}, r"expected a network for images of shape \(1, 8, 8\)"),
        (Hand(), {"only": ["rel"]}, r"unknown kinds \['rel'\]; known: celu, elu"),
        (
            Hand(),
            {"activation": nn.ReLU, "input_shape": (3, 8, 8)},
            "expected the name of an activation or a mapping .*, got <class",
        ),
        (nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU()), {}, "got lazy ones; call it on an image first"),
    ],
)
def test_what_cannot_be_converted_is_refused_with_the_remedy(model, options, message):
    with pytest.raises(ValueError, match=message):
        convert(model, **options)


def test_a_normalisation_in_front_is_kept_and_the_network_takes_images_of_unit_range(network):
    plain = network("vgg16_bn").eval()
    x = torch.rand(2, 3, 32, 32)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    model = convert(nn.Sequential(Normalize(3, mean, std), plain), "relu", input_shape=(3, 32, 32))
    with torch.no_grad():
        expected = plain((x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
        torch.testing.assert_close(model.eval()(x), expected)
