"""The networks: published sizes, torchvision's outputs, and every network with small images."""

import copy

import pytest
import torch
import torchvision

from sparta_models import MODELS, Normalize, build_model, install, sites
from sparta_models.sites import ActivationSpec

SMALL = {
    "mobilenet_v2": {"width_mult": 0.1},
    "wideresnet28_10": {"width": 4, "widen": 1},
    "wideresnet34_10": {"width": 4, "widen": 1},
}


def small(name, activation="relu", **kwargs):
    return build_model(name, activation=activation, **{**SMALL.get(name, {"width": 4}), **kwargs})


def count(name, **kwargs):
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(name, activation="relu", **kwargs).parameters())


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("resnet8", 75_290),
        ("resnet14", 172_506),
        ("resnet20", 269_722),
        ("resnet32", 464_154),
        ("resnet56", 853_018),
        ("resnet18", 11_173_962),
        ("resnet34", 21_282_122),
        ("resnet50", 23_520_842),
        ("preactresnet18", 11_172_170),
        ("wideresnet28_10", 36_479_194),
        ("wideresnet34_10", 46_160_474),
        ("vgg16_bn", 14_728_266),
    ],
)
def test_cifar_networks_have_the_published_number_of_parameters(name, published):
    assert count(name) == published


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("vgg16_bn", 138_365_992),
        ("mobilenet_v2", 3_504_872),
    ],
)
def test_imagenet_networks_have_the_published_number_of_parameters(name, published):
    assert count(name, stem="imagenet", num_classes=1000) == published


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "mobilenet_v2"])
def test_imagenet_networks_give_torchvisions_outputs(name):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)().eval()
    ours = build_model(
        name, stem="imagenet", num_classes=1000, activation="relu6" if name == "mobilenet_v2" else "relu"
    )
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert set(missing) == {"normalize.mean", "normalize.std"}
    assert unexpected == []
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_imagenet_vgg_gives_torchvisions_outputs():
    torch.manual_seed(0)
    theirs = torchvision.models.vgg16_bn(init_weights=False).eval()
    with torch.device("meta"):
        ours = build_model("vgg16_bn", stem="imagenet", num_classes=1000, activation="relu")
    # 138 million weights, which both use.
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False, assign=True)
    assert set(missing) == {"normalize.mean", "normalize.std"}
    assert unexpected == []
    ours.normalize = Normalize(3)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32)])
def test_every_network_takes_small_and_usual_images(name, channels, size):
    model = small(name, in_channels=channels, num_classes=5)
    assert model(torch.rand(2, channels, size, size)).shape == (2, 5)


@pytest.mark.parametrize("name", MODELS)
def test_sites_are_listed_in_the_order_of_their_calls_with_their_channels(name):
    model, calls = small(name), []
    names = {module: name for name, module in model.named_modules()}
    for info in sites(model):
        model.get_submodule(info.name).register_forward_hook(lambda m, _, y: calls.append((names[m], y.shape[1])))
    model(torch.rand(2, 3, 16, 16))
    assert calls == [(info.name, info.channels) for info in sites(model)]
    places = [(info.stage, info.depth) for info in sites(model)]
    assert places == sorted(places)
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("name", MODELS)
def test_no_rectifier_is_left_outside_the_sites(name):
    relu = [m for m in small(name).modules() if isinstance(m, torch.nn.ReLU | torch.nn.ReLU6)]
    assert relu == []


@pytest.mark.parametrize("name", MODELS)
def test_first_layer_normalises_pixels(name):
    model = small(name, mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 0.125])
    assert next(iter(model.children())) is model.normalize
    called = []
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda m, *_: called.append(m))
    model(torch.rand(2, 3, 16, 16))
    assert called[0] is model.normalize
    x = torch.rand(2, 3, 4, 4)
    expected = (x - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 0.25, 0.125])[:, None, None]
    torch.testing.assert_close(model.normalize(x), expected)


def test_the_same_seed_gives_the_same_convolutions_whatever_the_activation():
    weights = []
    for name in ("relu", "acon_c", "sparta"):
        torch.manual_seed(3)
        weights.append(build_model("resnet8", activation=name).layer3[0].conv2.weight)
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("sharing", ["site", "stage", "network"])
def test_sharing_sets_how_many_functions_there_are_and_state_dict_holds_each_once(sharing):
    model = build_model("resnet14", activation={"name": "sparta", "variant": "shared", "sharing": sharing})
    keys = [k for k in model.state_dict() if k.endswith("gate.weight")]
    assert len(keys) == {"site": 13, "stage": 4, "network": 1}[sharing]
    assert len({info.key for info in sites(model)}) == len(keys)
    assert sum("gate" in name for name, _ in model.named_parameters()) == len(keys)


def test_a_shared_function_stays_shared_and_separate_in_a_copy():
    model = build_model("resnet8", activation={"name": "sparta", "sharing": "stage", "variant": "depthwise"})
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.shared_activations["stage1_c16"].gate.weight.zero_()
    assert twin.layer1[0].act1.function is twin.layer1[0].act2.function
    assert twin.layer1[0].act1.function.gate.weight.abs().sum() == 0
    assert model.layer1[0].act1.function.gate.weight.abs().sum() > 0


def test_stage_sharing_keeps_one_function_for_each_width_of_a_bottleneck():
    model = build_model("resnet50", width=4, activation={"name": "sparta", "sharing": "stage"})
    assert set(model.shared_activations) >= {"stage1_c4", "stage1_c16", "stage4_c32", "stage4_c128"}


def test_network_sharing_of_a_function_bound_to_a_width_is_refused():
    with pytest.raises(ValueError, match=r"fits every width of the network \(\[16, 32, 64\]\).*variant=.shared"):
        build_model("resnet8", activation={"name": "sparta", "sharing": "network"})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_model("resnet9"), "unknown model 'resnet9'; known: mobilenet_v2"),
        (lambda: build_model("resnet8", activation="sparter"), "unknown activation 'sparter'; known: acon_c"),
        (lambda: build_model("resnet8", activation={"kernel_size": 3}), 'mapping with "name"'),
        (lambda: build_model("resnet8", activation={"name": "relu", "sharing": "all"}), "expected sharing among site"),
        (lambda: build_model("resnet18", stem="big"), "expected stem among cifar, imagenet, got 'big'"),
        (lambda: build_model("resnet8", num_classes=0), "expected num_classes > 0, got 0"),
        (lambda: build_model("mobilenet_v2", width_mult=-1.0), "expected width_mult > 0, got -1.0"),
        (lambda: ActivationSpec("relu", "all", {}), "expected sharing among site"),
        (lambda: build_model("resnet8", mean=[0.5]), "expected 3 values of mean, one per channel, got 1"),
        (lambda: build_model("resnet8", std=[0.5, 0.0, 1.0]), "expected std > 0"),
        (lambda: Normalize(3)(torch.rand(3, 4, 4)), r"expected images of shape \(B, 3, H, W\), got \(3, 4, 4\)"),
        (lambda: install(torch.nn.Linear(2, 2), "relu"), "expected a network with activation sites, got none"),
    ],
)
def test_wrong_requests_are_refused_with_the_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_network_without_dropout_is_built():
    assert build_model("mobilenet_v2", width_mult=0.1, dropout=0.0)(torch.rand(1, 3, 32, 32)).shape == (1, 10)


def test_an_unknown_option_of_a_network_is_refused():
    with pytest.raises(TypeError, match="stem"):
        build_model("resnet8", stem="imagenet")
