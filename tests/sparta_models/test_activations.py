"""The whole registry: gradients, the 2 x 2 as properties, closed forms, extreme inputs, costs."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from sparta_models import ACTIVATIONS, build_activation
from sparta_models.activations.gates import GATES

CASES = [(name, {}) for name in ACTIVATIONS if name != "sparta"] + [("sparta", {"variant": v}) for v in GATES]
IDS = [options.get("variant", name) for name, options in CASES]
over_registry = pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)


def perturbed(name, options, channels=4, dtype=torch.float64):
    """An activation away from its starting point, where its parameters matter; statistics fixed."""
    torch.manual_seed(0)
    activation = build_activation(name, channels, **options).to(dtype).eval()
    with torch.no_grad():
        for parameter in activation.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return activation


def with_statistics(activation):
    """Batch norms whose running statistics matter, too."""
    for module in activation.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
    return activation


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@over_registry
def test_gradients_agree_with_finite_differences(name, options):
    activation = perturbed(name, options)
    x = images(2, 4, 3, 5).requires_grad_()
    names, parameters = zip(*activation.named_parameters(), strict=True) if activation.num_parameters() else ((), ())

    def function(x, *values):
        return torch.func.functional_call(activation, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *parameters), atol=1e-6)


@over_registry
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # torch's own, in torch.func.jvp
def test_per_sample_gradients_and_forward_mode_agree_with_the_backward_pass(name, options):
    activation = perturbed(name, options)
    x, direction = images(3, 4, 4, 5), images(3, 4, 4, 5, seed=2)
    parameters = dict(activation.named_parameters())

    def loss(values, image):
        return torch.func.functional_call(activation, values, (image.unsqueeze(0),)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    whole = torch.autograd.grad(activation(x).square().sum(), list(parameters.values())) if parameters else ()
    for name_, gradient in zip(parameters, whole, strict=True):
        torch.testing.assert_close(each[name_].sum(0), gradient)
    _, forward = torch.func.jvp(activation, (x,), (direction,))
    x.requires_grad_()
    (backward,) = torch.autograd.grad(activation(x).sum(), x)
    torch.testing.assert_close(forward.sum(), (backward * direction).sum())


@over_registry
def test_shared_rules_give_equal_outputs_for_equal_inputs_and_varying_ones_do_not(name, options):
    activation = perturbed(name, options, channels=4)
    x = images(2, 4, 5, 5)
    equal = []
    # Both signs: a rectifier hides what happens to one of them.
    for value in (0.8, -0.8):
        x[:, 0, 3, 1] = x[:, 0, 1, 2] = value
        y = activation(x)
        equal.append(torch.allclose(y[:, 0, 3, 1], y[:, 0, 1, 2], atol=1e-12))
    assert all(equal) == (activation.cell.spatial == "shared")


@over_registry
def test_shared_rules_are_equivariant_to_permutations_of_positions(name, options):
    activation = perturbed(name, options)
    x = images(2, 4, 5, 5)
    order = torch.randperm(25, generator=torch.Generator().manual_seed(2))

    def permute(t):
        return t.flatten(2)[:, :, order].view_as(t)

    equivariant = torch.allclose(activation(permute(x)), permute(activation(x)), atol=1e-12)
    # ATAC's rule varies with the position through the other channels there, and knows nothing of neighbours.
    assert equivariant == (activation.cell.spatial == "shared" or name == "atac")


@over_registry
def test_input_independent_rules_act_element_by_element_and_dependent_ones_do_not(name, options):
    activation = perturbed(name, options)
    x = images(1, 4, 5, 5)
    elsewhere = []
    # Each channel in turn and both signs: a bottleneck's rectifier may be blind to one of them.
    for channel, step in itertools.product(range(4), (30.0, -30.0)):
        moved = x.clone()
        moved[0, channel, 2, 2] += step
        changed = ((activation(moved) - activation(x)).abs() > 1e-12).squeeze(0)
        changed[channel, 2, 2] = False
        elsewhere.append(bool(changed.any()))
    assert any(elsewhere) == (activation.cell.dependence == "dependent")


@over_registry
def test_no_input_is_broadcast_to_another_shape(name, options):
    activation = build_activation(name, 6, **options)
    for shape in ((2, 6), (6, 4, 6), (6,)):
        x = torch.rand(shape)
        try:
            y = activation(x)
        except (ValueError, RuntimeError, IndexError):
            continue
        assert y.shape == x.shape


@over_registry
def test_the_meta_device_gives_shapes(name, options):
    with torch.device("meta"):
        assert build_activation(name, 4, **options)(torch.empty(2, 4, 6, 5)).shape == (2, 4, 6, 5)


@over_registry
def test_images_of_a_batch_do_not_touch_each_other(name, options):
    activation = perturbed(name, options)
    x = images(3, 4, 5, 5)
    torch.testing.assert_close(activation(x)[1:2], activation(x[1:2]), atol=1e-12, rtol=0)


@over_registry
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e4, 1.0, 1e-30, 0.0])
def test_values_and_gradients_are_finite_for_large_tiny_and_bf16_inputs(name, options, dtype, scale):
    activation = perturbed(name, options, dtype=dtype)
    x = (scale * images(2, 4, 6, 6)).to(dtype).requires_grad_()
    y = activation(x)
    assert y.dtype == dtype
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in activation.parameters())


@over_registry
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_bf16_stays_bf16_under_autocast_beside_fp32_parameters(name, options, device):
    activation = perturbed(name, options, channels=8, dtype=torch.float32).to(device)
    x = images(2, 8, 6, 6).to(device, torch.bfloat16).requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        y = activation(x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert {p.grad.dtype for p in activation.parameters()} <= {torch.float32}
    # Parameters of 8 bits of mantissa, and a few roundings of the result.
    torch.testing.assert_close(y.float(), activation(x.float()), atol=0.1, rtol=0.1)


@over_registry
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layout_changes_no_value_and_is_kept(name, options, layout):
    activation = perturbed(name, options)
    x = images(2, 4, 6, 5).contiguous(memory_format=layout)
    y = activation(x)
    torch.testing.assert_close(y, activation(x.contiguous()), atol=1e-12, rtol=1e-12)
    assert y.is_contiguous(memory_format=layout)


# At 8 channels, by hand: kernels of 3 x 3 (Sparta: 5 x 5) and 7 x 7, bottlenecks of 8 / r channels with biases, norms
# of 2 each.
PARAMETERS = {
    **dict.fromkeys(("relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "softplus", "mish"), 0),
    "prelu": 8,
    "swish": 8,
    "pssilu": 2,
    "acon_c": 3 * 8,
    "meta_acon": 2 * 8 + (8 * 16 + 16) + (16 * 8 + 8),
    "dy_relu_b": (8 * 1 + 1) + (1 * 32 + 32),
    "se_relu": (8 * 1 + 1) + (1 * 8 + 8),
    "position_prelu": 8 * 8 * 8,
    "frelu": 9 * 8 + 2 * 8,
    "atac": 8 * 2 + 2 * 2 + 2 * 8 + 2 * 8,
    "cbam_relu": (8 * 1 + 1) + (1 * 8 + 8) + 2 * 49,
    "depthwise": 25 * 8,
    "attention": 25 * 8 + 2 * 25,
    "lowrank": 25 * 8 + 8 + 8,
    "shared": 25,
    "smoothmax": 25 * 8 + 8,
}


@over_registry
def test_the_number_of_parameters_is_the_one_by_hand(name, options):
    assert build_activation(name, 8, **options).num_parameters() == PARAMETERS[options.get("variant", name)]


@pytest.mark.parametrize(("channels", "hidden"), [(8, 16), (256, 16), (512, 32)])
def test_meta_acon_has_the_hidden_width_of_its_authors_code(channels, hidden):
    assert build_activation("meta_acon", channels).sharpness.reduce.out_channels == hidden


# FLOPs for one element at k = 5. Of those made of others: a sigmoid is exponential, addition and division.
PER_ELEMENT = {
    "relu": 1,
    **dict.fromkeys(("relu6", "leaky_relu", "prelu"), 2),
    "elu": 3,
    "silu": 3 + 1,
    "gelu": 5,
    **dict.fromkeys(("softplus", "mish"), 5),
    "swish": 1 + 3 + 1,
    "pssilu": 1 + 3 + 3,
    "acon_c": 1 + 1 + 3 + 1 + 2,
    "position_prelu": 2 + 4 + 3,  # four slopes weighted and added
    **dict.fromkeys(("depthwise", "shared"), 2 * 25 + 3 + 1),
    "smoothmax": 2 * 25 + 7,
}


@pytest.mark.parametrize("name", PER_ELEMENT)
def test_flops_are_those_by_hand(name):
    options = {"name": "sparta", "variant": name} if name in GATES else {"name": name}
    assert build_activation(num_channels=8, **options).flops(5, 4) == PER_ELEMENT[name] * 8 * 5 * 4


def test_slopes_that_fit_the_map_are_not_resized():
    assert build_activation("position_prelu", 8).flops(8, 8) == build_activation("prelu", 8).flops(8, 8)


# Beside the convolutions, for 8 channels and what a bottleneck leaves of them: at each position, and once for an image.
# Norms of 2, sigmoids of 3; one each for a rectifier, product, maximum, addition, and an element's part in a mean.
CONVOLVED = {
    "meta_acon": ({}, 8 * (1 + 8), 8 * 3),
    "dy_relu_b": ({}, 8 * (1 + 2 + 2 + 1), 1 + 4 * 8 * (3 + 2) + 3 * 8),
    "se_relu": ({}, 8 * (1 + 1 + 1), 1 + 8 * 3),
    "frelu": ({}, 8 * (2 + 1), 0),
    "frelu without norm": ({"batch_norm": False}, 8 * (1 + 1), 0),
    "atac": ({}, 2 * (2 + 1) + 8 * (2 + 3 + 1), 0),
    "atac without norm": ({"batch_norm": False}, 2 * (1 + 1) + 8 * (1 + 3 + 1), 0),
    "cbam_relu": ({}, 8 * (1 + 2 + 1 + 2 + 1) + 3, 2 * 1 + 8 * (1 + 3)),
    "sparta lowrank": ({"variant": "lowrank"}, 8 * (1 + 3 + 1), 0),
    "sparta attention": ({"variant": "attention"}, 8 * (2 + 1 + 3 + 1), 0),
}


@pytest.mark.parametrize("case", CONVOLVED)
def test_flops_are_those_of_the_convolutions_as_torch_counts_them_and_the_rest(case):
    options, everywhere, once = CONVOLVED[case]
    activation = build_activation(case.split()[0], 8, **options).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        activation(torch.randn(1, 8, 6, 5))
    assert activation.flops(6, 5) == counter.get_total_flops() + everywhere * 6 * 5 + once


def test_the_flops_of_every_activation_are_held_to_a_count():
    counted = {*PER_ELEMENT, *(case.split()[0] for case in CONVOLVED), *GATES}
    assert counted >= set(ACTIVATIONS) - {"sparta"}


@over_registry
def test_every_activation_says_its_formula_paper_and_cell(name, options):
    kind = ACTIVATIONS[name]
    assert kind.formula
    assert kind.paper
    assert kind.cell.spatial in ("shared", "varying")
    assert kind.cell.dependence in ("independent", "dependent")


@over_registry
def test_state_dict_round_trips(name, options):
    source, target = perturbed(name, options), build_activation(name, 4, **options).double().eval()
    target.load_state_dict(source.state_dict())
    x = images(1, 4, 4, 4)
    assert torch.equal(source(x), target(x))


@over_registry
def test_frozen_activations_keep_eval_mode_values_and_statistics(name, options):
    activation = build_activation(name, 4, **options).freeze()
    before = {k: v.clone() for k, v in activation.state_dict().items()}
    activation.train()
    activation(torch.randn(4, 4, 5, 5))
    assert not any(module.training for module in activation.modules())
    assert not any(p.requires_grad for p in activation.parameters())
    assert all(torch.equal(v, before[k]) for k, v in activation.state_dict().items())


@over_registry
def test_a_frozen_function_stays_when_the_norms_of_a_network_are_switched_one_by_one(name, options):
    activation = with_statistics(perturbed(name, options)).freeze()
    x = images(4, 4, 5, 5)
    before = activation(x)
    for module in activation.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.train()
    assert torch.equal(activation(x), before)


@over_registry
def test_freezing_changes_no_output_and_drops_old_gradients(name, options):
    activation = with_statistics(perturbed(name, options))
    x = images(2, 4, 5, 5).requires_grad_()
    activation(x).sum().backward()
    optimizer = torch.optim.SGD([*activation.parameters(), torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    before, y = {k: v.clone() for k, v in activation.state_dict().items()}, activation(x)
    activation.freeze()
    optimizer.step()
    assert torch.equal(activation(x), y)
    assert all(torch.equal(v, before[k]) for k, v in activation.state_dict().items())


def test_all_four_cells_of_the_study_are_filled():
    assert len({kind.cell for kind in ACTIVATIONS.values()}) == 4


# Closed forms at x = 1 and x = -1, by hand.
E, S1 = math.e, 1 / (1 + math.exp(-1))
CLOSED = {
    "relu": (1, 0),
    "relu6": (1, 0),
    "leaky_relu": (1, -0.01),
    "prelu": (1, -0.25),
    "elu": (1, 1 / E - 1),
    "gelu": (0.5 * (1 + math.erf(0.5**0.5)), -0.5 * (1 + math.erf(-(0.5**0.5)))),
    "silu": (S1, -(1 - S1)),
    "swish": (S1, -(1 - S1)),
    "softplus": (math.log(1 + E), math.log(1 + 1 / E)),
    "mish": (math.tanh(math.log(1 + E)), -math.tanh(math.log(1 + 1 / E))),
    "pssilu": (S1, -(1 - S1)),
    "position_prelu": (1, -0.25),
    "sparta": (S1, -(1 - S1)),
}


@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms(name):
    x = torch.tensor([1.0, -1.0], dtype=torch.float64).view(1, 1, 1, 2)
    y = build_activation(name, 1).double()(x).flatten()
    torch.testing.assert_close(y, torch.tensor(CLOSED[name], dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("name", "options", "values"),
    [
        ("leaky_relu", {"slope": 0.2}, (1, -0.2)),
        ("elu", {"alpha": 2.0}, (1, 2 / E - 2)),
        ("softplus", {"beta": 2.0}, (math.log(1 + E**2) / 2, math.log(1 + E**-2) / 2)),
        ("prelu", {"slope": 0.5}, (1, -0.5)),
        ("swish", {"beta": 2.0}, (1 / (1 + E**-2), -1 / (1 + E**2))),
    ],
)
def test_closed_forms_with_options(name, options, values):
    x = torch.tensor([1.0, -1.0], dtype=torch.float64).view(1, 1, 1, 2)
    y = build_activation(name, 1, **options).double()(x).flatten()
    torch.testing.assert_close(y, torch.tensor(values, dtype=torch.float64), atol=1e-7, rtol=0)


def test_position_prelu_has_its_own_slope_everywhere_and_resizes_the_grid_bilinearly():
    activation = perturbed("position_prelu", {"size": 4})
    x = -images(1, 4, 4, 4).abs()
    torch.testing.assert_close(activation(x), x * activation.weight)
    large = -images(1, 4, 8, 8).abs()
    # The centre of the large map's second pixel lies a quarter of the way from the first slope to the second.
    along = activation.weight[0, 0]
    first = along[0] + 0.25 * (along[1] - along[0])
    torch.testing.assert_close(activation(large)[0, 0, 0, 1], large[0, 0, 0, 1] * first)


def test_relu6_is_clipped():
    assert build_activation("relu6", 1)(torch.full((1, 1, 1, 1), 9.0)).item() == 6


def test_pssilu_with_a_shift_is_its_formula():
    x = images(1, 2, 3, 3)
    y = build_activation("pssilu", 2, alpha=2.0, beta=0.25).double()(x)
    torch.testing.assert_close(y, x * (torch.sigmoid(2 * x) - 0.25) / 0.75)


def test_pssilu_stays_finite_where_training_takes_its_shift_past_one():
    activation = build_activation("pssilu", 2)
    for beta in (1.0, 1.5):
        torch.nn.init.constant_(activation.beta, beta)
        assert activation(images(1, 2, 3, 3).float()).isfinite().all()


def test_acon_c_is_swish_for_slopes_one_and_zero():
    activation = build_activation("acon_c", 3, beta=1.7).double()
    torch.nn.init.ones_(activation.p1)
    torch.nn.init.zeros_(activation.p2)
    x = images(1, 3, 4, 4)
    torch.testing.assert_close(activation(x), x * torch.sigmoid(torch.tensor(1.7) * x))


def test_meta_acon_sharpness_is_computed_from_the_channel_means():
    activation = perturbed("meta_acon", {})
    x = images(2, 4, 3, 3)
    reduce, expand = activation.sharpness.reduce, activation.sharpness.expand
    hidden = x.mean((2, 3)) @ reduce.weight.flatten(1).T + reduce.bias
    beta = torch.sigmoid(hidden @ expand.weight.flatten(1).T + expand.bias)[:, :, None, None]
    p1, p2 = activation.p1.view(1, -1, 1, 1), activation.p2.view(1, -1, 1, 1)
    torch.testing.assert_close(activation(x), (p1 - p2) * x * torch.sigmoid(beta * (p1 - p2) * x) + p2 * x)


def bottleneck(module, z):
    """W2 relu(W1 z + b1) + b2 for z (B, C)."""
    w1, w2 = module.reduce.weight[:, :, 0, 0], module.expand.weight[:, :, 0, 0]
    return (z @ w1.T + module.reduce.bias).clamp(min=0) @ w2.T + module.expand.bias


def norm(module, x):
    """Batch norm of x (B, C, ...) by its running statistics."""
    mean, var, weight, bias = (
        t.view(1, -1, 1, 1) for t in (module.running_mean, module.running_var, module.weight, module.bias)
    )
    return (x - mean) / (var + module.eps).sqrt() * weight + bias


def neighbours(x, k):
    """The k x k neighbours of every position, (B, C, k * k, H, W)."""
    return F.unfold(x, k, padding=k // 2).view(*x.shape[:2], k * k, *x.shape[2:])


def test_dy_relu_b_is_its_formula():
    activation = perturbed("dy_relu_b", {"reduction": 2})
    x = images(2, 4, 3, 3)
    theta = 2 * torch.sigmoid(bottleneck(activation.coefficients, x.mean((2, 3)))) - 1
    a1, a2, b1, b2 = theta.view(2, 4, 4, 1, 1).unbind(1)
    lines = torch.stack([(1 + a1) * x + b1 / 2, a2 * x + b2 / 2])
    torch.testing.assert_close(activation(x), lines.max(0).values)


def test_se_relu_is_its_formula():
    activation = perturbed("se_relu", {"reduction": 2})
    x = images(2, 4, 3, 3)
    gate = torch.sigmoid(bottleneck(activation.excite, x.mean((2, 3))))
    torch.testing.assert_close(activation(x), torch.einsum("bchw,bc->bchw", x.clamp(min=0), gate))


def test_frelu_is_its_formula():
    activation = with_statistics(perturbed("frelu", {}))
    x = images(2, 4, 5, 3)
    condition = torch.einsum("bcthw,ct->bchw", neighbours(x, 3), activation.condition.weight.flatten(1))
    torch.testing.assert_close(activation(x), torch.maximum(x, norm(activation.norm, condition)))


def test_atac_is_its_formula():
    activation = with_statistics(perturbed("atac", {"reduction": 2}))
    x = images(2, 4, 3, 5)
    w1, w2 = activation.reduce.weight.flatten(1), activation.expand.weight.flatten(1)
    hidden = norm(activation.reduce_norm, torch.einsum("bchw,dc->bdhw", x, w1)).clamp(min=0)
    gate = torch.sigmoid(norm(activation.expand_norm, torch.einsum("bdhw,cd->bchw", hidden, w2)))
    torch.testing.assert_close(activation(x), x * gate)


def test_cbam_relu_is_its_formula():
    activation = perturbed("cbam_relu", {"reduction": 2})
    x = images(2, 4, 5, 6)
    h = x.clamp(min=0)
    logits = bottleneck(activation.channel, h.mean((2, 3))) + bottleneck(activation.channel, h.flatten(2).max(2).values)
    h = torch.einsum("bchw,bc->bchw", h, torch.sigmoid(logits))
    maps = torch.stack([h.mean(1), h.max(1).values], dim=1)
    spatial = torch.einsum("bcthw,ct->bhw", neighbours(maps, 7), activation.spatial.weight.view(2, 49))
    torch.testing.assert_close(activation(x), h * torch.sigmoid(spatial)[:, None])


def test_the_low_rank_gate_is_its_formula():
    activation = perturbed("sparta", {"variant": "lowrank", "kernel_size": 3, "bias": True}, channels=16)
    x = images(2, 16, 4, 3)
    gate = activation.gate
    own = torch.einsum("bcthw,ct->bchw", neighbours(x, 3), gate.weight.flatten(1)) + gate.bias.view(1, -1, 1, 1)
    mixing = gate.expand.flatten(1) @ gate.reduce.flatten(1)
    torch.testing.assert_close(activation(x), x * torch.sigmoid(own + torch.einsum("dc,bchw->bdhw", mixing, x)))


def test_dy_relu_with_a_zero_last_layer_is_relu():
    activation = build_activation("dy_relu_b", 4).double()
    torch.nn.init.zeros_(activation.coefficients.expand.weight)
    torch.nn.init.zeros_(activation.coefficients.expand.bias)
    x = images(2, 4, 3, 3)
    torch.testing.assert_close(activation(x), F.relu(x))


def test_se_relu_with_a_zero_last_layer_is_half_a_relu():
    activation = build_activation("se_relu", 4).double()
    torch.nn.init.zeros_(activation.excite.expand.weight)
    torch.nn.init.zeros_(activation.excite.expand.bias)
    x = images(2, 4, 3, 3)
    torch.testing.assert_close(activation(x), 0.5 * F.relu(x))


def test_frelu_with_a_zero_kernel_is_relu():
    activation = build_activation("frelu", 4).double().eval()
    torch.nn.init.zeros_(activation.condition.weight)
    x = images(2, 4, 3, 3)
    torch.testing.assert_close(activation(x), F.relu(x))


def test_atac_with_zero_last_norm_is_half_the_identity():
    activation = build_activation("atac", 4).double().eval()
    torch.nn.init.zeros_(activation.expand_norm.weight)
    x = images(2, 4, 3, 3)
    torch.testing.assert_close(activation(x), 0.5 * x)


def test_cbam_relu_with_zero_gates_is_a_quarter_of_a_relu():
    activation = build_activation("cbam_relu", 4).double()
    for parameter in activation.parameters():
        torch.nn.init.zeros_(parameter)
    x = images(2, 4, 3, 3)
    # Each gate is sigmoid(0) = 1/2.
    torch.testing.assert_close(activation(x), 0.25 * F.relu(x))


def test_position_prelu_has_its_own_slope_at_every_position():
    activation = build_activation("position_prelu", 2, size=3).double()
    with torch.no_grad():
        activation.weight.copy_(torch.arange(18.0).view(2, 3, 3))
    x = -torch.ones(1, 2, 3, 3, dtype=torch.float64)
    assert torch.equal(activation(x)[0], -activation.weight)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_activation("sparta", 0), "expected a whole num_channels >= 1, got 0"),
        (lambda: build_activation("softplus", 4, beta=0), "expected beta > 0, got 0"),
        (lambda: build_activation("pssilu", 4, beta=1.0), r"expected beta in \[0, 0.999\], got 1.0"),
        (lambda: build_activation("se_relu", 4, reduction=0), "expected reduction >= 1, got 0"),
        (lambda: build_activation("atac", 4, reduction=0), "expected reduction >= 1, got 0"),
        (lambda: build_activation("position_prelu", 4, size=0), "expected size >= 1, got 0"),
        (lambda: build_activation("frelu", 4, kernel_size=2), "expected an odd kernel_size >= 1, got 2"),
        (lambda: build_activation("cbam_relu", 4, kernel_size=4), "expected an odd kernel_size >= 1, got 4"),
    ],
)
def test_options_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@over_registry
def test_unknown_options_are_refused(name, options):
    with pytest.raises(TypeError, match="no_such_option"):
        build_activation(name, 4, **options, no_such_option=1)
