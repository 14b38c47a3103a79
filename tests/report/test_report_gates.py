import numpy as np
import pytest
import torch

from pipeline.report.gates import SURROUNDINGS, gate_maps, last_sites, responses
from sparta_models import ACTIVATIONS, build_model
from tests.report.conftest import network


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def site_inputs(model: torch.nn.Module, x: torch.Tensor) -> dict[int, torch.Tensor]:
    found = {}
    for info in last_sites(model):
        hook = lambda _, args, stage=info.stage: found.update({stage: args[0].clone()})  # noqa: E731
        model.get_submodule(info.name).register_forward_pre_hook(hook)
    with torch.no_grad():
        model(x)
    return found


def test_the_gate_of_relu_is_the_share_of_positive_channels(images: torch.Tensor):
    model = network("relu")
    maps = gate_maps(model, images)
    for stage, inner in site_inputs(model, images).items():
        assert maps[stage].shape == inner[:, 0].shape
        share = (inner > -1e-3).float().mean(dim=1).numpy()
        np.testing.assert_allclose(maps[stage], share, atol=1e-6)


def test_the_gate_of_a_new_sparta_is_that_of_silu(images: torch.Tensor):
    model = network("sparta")
    maps = gate_maps(model, images)
    for stage, inner in site_inputs(model, images).items():
        np.testing.assert_allclose(maps[stage], torch.sigmoid(inner).mean(dim=1).numpy(), atol=2e-3)


def test_the_gate_of_a_trained_smooth_maximum_is_its_phi(images: torch.Tensor):
    model = network("sparta")
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "gate"):
                torch.nn.init.normal_(module.gate.weight)
    maps = gate_maps(model, images)
    for info in last_sites(model):
        inner, gate = site_inputs(model, images)[info.stage], model.get_submodule(info.name).function.gate
        with torch.no_grad():
            phi = torch.sigmoid(gate.sharpness * (inner - gate(inner)))
        np.testing.assert_allclose(maps[info.stage], phi.mean(dim=1).numpy(), atol=1e-5)


def test_watching_changes_nothing(images: torch.Tensor):
    model = network("sparta")
    with torch.no_grad():
        before = model(images)
        gate_maps(model, images)
        responses(model, images[:1])
        torch.testing.assert_close(model(images), before, rtol=0, atol=0)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_relu_answers_the_same_whatever_surrounds_it(images: torch.Tensor):
    for response in responses(network("relu"), images[:1]):
        for around in SURROUNDINGS:
            np.testing.assert_allclose(response.y[around], response.x.clip(min=0), atol=1e-6)


def test_sparta_with_a_weight_beside_the_centre_answers_to_its_surroundings(images: torch.Tensor):
    model = network("sparta")
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "gate"):
                module.gate.weight[:, :, 0, 1] = 1.0
    for response in responses(model, images[:1]):
        for around, y in response.y.items():
            # T is the neighbour's value, and y the smooth maximum of it and x.
            above = response.x - around
            expected = around + above / (1 + np.exp(-above))
            np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_every_activation_has_gates_and_responses(name: str, images: torch.Tensor):
    torch.manual_seed(0)
    model = build_model("resnet8", activation=name, in_channels=1, num_classes=5, width=8).eval()
    with torch.no_grad():
        model(images)
    maps = gate_maps(model, images)
    assert list(maps) == [info.stage for info in last_sites(model)]
    assert all(np.isfinite(m).all() and m.min() >= 0 and m.max() <= 1 for m in maps.values())
    assert all(np.isfinite(y).all() for response in responses(model, images[:1]) for y in response.y.values())
