"""The fast path of the gate: agreement with the reference, what it saves and computes, and how it falls back."""

import os
import pwd
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparta_models import Sparta, kernel_status
from sparta_models.activations.gate import depthwise_gate, reference, smooth_max
from sparta_models.kernels import _state, kernel

compiled = pytest.mark.skipif(kernel() is None, reason=f"no compiled kernel: {kernel_status()}")
LAYOUTS = [torch.channels_last, torch.contiguous_format]
# Groups of 16 (or 8) channels: whole, with a rest, less than one; maps down to a single pixel.
SHAPES = [(2, 32, 8, 8), (3, 20, 5, 7), (2, 3, 1, 1), (1, 17, 1, 6), (2, 16, 6, 1), (2, 1, 4, 4), (5, 64, 2, 2)]


def problem(
    shape, *, dtype=torch.float32, layout=torch.channels_last, bias=True, kernel_size=3, scale=1.0, smooth=False
):
    """Arguments of `fast` and `slow` that want gradients, and a gradient of the output."""
    g = torch.Generator().manual_seed(0)
    of_weights, channels = torch.promote_types(dtype, torch.float32), shape[1]
    x = (scale * torch.randn(shape, generator=g)).to(dtype).contiguous(memory_format=layout)
    inputs = {"x": x, "weight": torch.randn(channels, 1, kernel_size, kernel_size, generator=g, dtype=of_weights)}
    if bias:
        inputs["bias"] = torch.randn(channels, generator=g, dtype=of_weights)
    if smooth:
        inputs["sharpness"] = 2 * torch.rand(channels, generator=g, dtype=of_weights)
    dy = torch.randn(shape, generator=g).to(dtype).contiguous(memory_format=layout)
    return {name: t.requires_grad_() for name, t in inputs.items()}, dy


def fast(x, weight, bias=None, sharpness=None, dilation=1):
    if sharpness is None:
        return depthwise_gate(x, weight, bias, dilation)
    return smooth_max(x, weight, sharpness, bias, dilation)


def slow(x, weight, bias=None, sharpness=None, dilation=1):
    return reference(x, weight, bias, dilation, sharpness)


def both(inputs, dy, dilation=1):
    """Values and gradients of the fast path and of the reference."""
    results = []
    for function in (fast, slow):
        y = function(**inputs, dilation=dilation)
        results.append((y, *torch.autograd.grad(y, list(inputs.values()), dy)))
    return zip(*results, strict=True)


forms = pytest.mark.parametrize("smooth", [False, True], ids=["gate", "smooth maximum"])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["last", "first"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kernel_size", [3, 5])
@forms
def test_values_and_gradients_agree_with_the_reference_in_fp32(shape, layout, bias, kernel_size, smooth):
    for got, want in both(*problem(shape, layout=layout, bias=bias, kernel_size=kernel_size, smooth=smooth)):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        assert got.dtype == want.dtype


@pytest.mark.parametrize("layout", LAYOUTS, ids=["last", "first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel_size", [3, 5, 7])
def test_value_and_gradient_have_the_layout_of_the_input(layout, dtype, kernel_size):
    inputs, dy = problem((2, 20, 5, 7), dtype=dtype, layout=layout, kernel_size=kernel_size)
    # Whatever the layout in which the gradient comes.
    for gradient in (dy, dy.contiguous(), dy.contiguous(memory_format=torch.channels_last)):
        y = fast(**inputs)
        (dx,) = torch.autograd.grad(y, inputs["x"], gradient)
        assert y.is_contiguous(memory_format=layout)
        assert dx.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    ("kernel_size", "dilation"), [(1, 1), (7, 1), (3, 2), (5, 2)], ids=["1x1", "7x7", "dilated", "5x5 dilated"]
)
@forms
def test_other_kernels_agree_with_the_reference_by_operators(kernel_size, dilation, smooth):
    for got, want in both(*problem((2, 6, 7, 5), kernel_size=kernel_size, smooth=smooth), dilation):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 30.0, 1e4])
@forms
def test_extreme_inputs_agree_with_the_reference(scale, smooth):
    for got, want in both(*problem((2, 16, 4, 4), scale=scale, smooth=smooth)):
        torch.testing.assert_close(got, want, atol=1e-5 * max(1.0, scale), rtol=1e-5)
        assert got.isfinite().all()


def test_not_a_number_stays_one():
    x = torch.zeros(1, 16, 3, 3).contiguous(memory_format=torch.channels_last)
    x[0, 2, 1, 1] = float("nan")
    for dtype in (torch.float32, torch.bfloat16):
        y = Sparta(16)(x.to(dtype))
        assert y[0, 2, 1, 1].isnan()
        assert y.isnan().sum() == y[:, 2].isnan().sum() == 9


@pytest.mark.parametrize("kernel_size", [3, 5])
@forms
def test_bf16_is_as_close_to_fp32_as_rounding_allows(smooth, kernel_size):
    inputs, dy = problem((2, 20, 6, 6), dtype=torch.bfloat16, smooth=smooth, kernel_size=kernel_size)
    exact = {name: t.detach().float().requires_grad_() for name, t in inputs.items()}
    y, truth = fast(**inputs), slow(**exact)
    assert y.dtype == torch.bfloat16
    # bf16 has 8 bits of mantissa: half a unit in the last place is 2^-9.
    torch.testing.assert_close(y.float(), truth, atol=1e-6, rtol=2**-8)
    gradients = torch.autograd.grad(y, list(inputs.values()), dy)
    wanted = torch.autograd.grad(truth, list(exact.values()), dy.float())
    for (name, t), got, want in zip(inputs.items(), gradients, wanted, strict=True):
        torch.testing.assert_close(got.float(), want, atol=3e-2, rtol=3e-2, msg=name)
        assert got.dtype == t.dtype


def test_autocast_keeps_the_inputs_type():
    sparta = Sparta(8)
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(2, 8, 4, 4, dtype=dtype, requires_grad=True)
            y = sparta(x)
            assert y.dtype == dtype
            y.sum().backward()
            assert x.grad.dtype == dtype
            assert sparta.gate.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dilation", [1, 2])
@forms
def test_explicit_backward_passes_gradcheck_and_gradgradcheck(bias, dilation, smooth):
    inputs, _ = problem((2, 3, 4, 3), dtype=torch.float64, bias=bias, smooth=smooth)

    def function(*tensors):
        return fast(**dict(zip(inputs, tensors, strict=True)), dilation=dilation)

    assert torch.autograd.gradcheck(function, list(inputs.values()))
    assert torch.autograd.gradgradcheck(function, list(inputs.values()))


@forms
def test_second_derivatives_through_the_fast_path_are_the_references(smooth):
    results = []
    for function in (fast, slow):
        inputs, dy = problem((2, 16, 4, 4), smooth=smooth)
        (dx,) = torch.autograd.grad(function(**inputs), inputs["x"], dy, create_graph=True)
        dx.square().sum().backward()
        results.append([t.grad for t in inputs.values()])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def saved_elements(sparta, x):
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        sparta(x)
    return sum(saved.values())


@pytest.mark.parametrize("variant", ["depthwise", "shared", "smoothmax"])
def test_only_the_input_and_the_weights_are_saved(variant):
    sparta = Sparta(16, variant=variant)
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    assert saved_elements(sparta, x) == x.numel() + sparta.num_parameters()


@compiled
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("variant", ["depthwise", "smoothmax"])
def test_gradients_of_weights_are_not_computed_for_an_attack_or_a_frozen_bank(variant, frozen, monkeypatch):
    asked = []
    operators = kernel()

    class Spy:
        gate_forward = operators.gate_forward

        @staticmethod
        def gate_backward(*args):
            asked.append(args[-1])
            return operators.gate_backward(*args)

    monkeypatch.setattr("sparta_models.activations.fused.kernel", lambda: Spy)
    sparta = Sparta(16, variant=variant)
    if frozen:
        sparta.freeze()
    x = torch.randn(2, 16, 4, 4, requires_grad=True)
    torch.autograd.grad(sparta(x).sum(), x)
    sparta(x).sum().backward()
    # autograd.grad with respect to x alone asks for no weights, and backward() for them only where they learn.
    assert asked == [False, not frozen]


class Asked(TorchDispatchMode):
    """Notes for every backward of a convolution whether the gradients of input and kernel are computed."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.asked.append(tuple(args[-1][:2]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", ["depthwise", "attention", "smoothmax"])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_operators_compute_no_gradients_of_weights_for_an_attack_or_a_frozen_bank(variant, frozen, monkeypatch):
    monkeypatch.setattr("sparta_models.activations.fused.kernel", lambda: None)
    sparta = Sparta(16, variant=variant)
    if frozen:
        sparta.freeze()
    x = torch.randn(2, 16, 4, 4, requires_grad=True)
    with Asked() as attack:
        torch.autograd.grad(sparta(x).sum(), x)
    assert set(attack.asked) == {(True, False)}
    with Asked() as training:
        sparta(x).sum().backward()
    assert set(training.asked) == {(True, not frozen)}


@forms
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_results_do_not_depend_on_the_number_of_threads_beyond_rounding(smooth, kernel_size):
    threads = torch.get_num_threads()
    inputs, dy = problem((8, 32, 16, 16), smooth=smooth, kernel_size=kernel_size)
    results = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            y = fast(**inputs)
            results.append((y, *torch.autograd.grad(y, list(inputs.values()), dy)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][2:], results[1][2:], atol=1e-3, rtol=1e-4)


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_is_the_same_each_time(smooth, dtype):
    inputs, dy = problem((8, 32, 8, 8), dtype=dtype, smooth=smooth, kernel_size=5)
    first, second = (torch.autograd.grad(fast(**inputs), list(inputs.values()), dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_function_transforms_pass():
    sparta = Sparta(4)
    torch.nn.init.normal_(sparta.gate.weight)
    x = torch.randn(1, 4, 3, 3)
    gradient = torch.func.grad(lambda x: sparta(x).sum())(x)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sparta(leaf).sum(), leaf)
    torch.testing.assert_close(gradient, expected)


@compiled
@pytest.mark.parametrize(
    ("weight", "sharpness"), [((3, 16), 16), ((9, 8), 16), ((25, 16), 1)], ids=["row", "channels", "one for all"]
)
def test_the_kernel_refuses_parameters_of_other_shapes(weight, sharpness):
    x = torch.randn(1, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match=r"expected (weights|a parameter)"):
        kernel().gate_forward(x, torch.randn(weight), torch.randn(sharpness), None)


@pytest.mark.parametrize("variant", ["smoothmax", "depthwise", "attention"])
def test_a_batch_of_gradients_passes_by_the_operators(variant):
    gate = Sparta(3, variant=variant, kernel_size=3)
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 3, 4, 4)

    def output(x):
        return gate(x).sum(dim=(2, 3)).flatten()

    batched, looped = (torch.autograd.functional.jacobian(output, x, vectorize=v) for v in (True, False))
    torch.testing.assert_close(batched, looped)


def test_an_empty_batch_passes():
    assert Sparta(4)(torch.zeros(0, 4, 3, 3)).shape == (0, 4, 3, 3)


SCRIPT = """
import torch
from sparta_models import Sparta, kernel_status
torch.manual_seed(0)
x = torch.randn(2, 16, 4, 4, requires_grad=True)
sparta = Sparta(16, beta=2.0)
torch.nn.init.normal_(sparta.gate.weight)
y = sparta(x)
t = torch.nn.functional.conv2d(x, sparta.gate.weight, padding=2, groups=16)
z = t + (x - t) * torch.sigmoid(2 * (x - t))
assert torch.allclose(y, z, atol=1e-5)
(want,) = torch.autograd.grad(z.sum(), x)
y.sum().backward()
assert torch.allclose(x.grad, want, atol=1e-4)
print(kernel_status())
"""


def run(script, **environment):
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        check=False,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize(
    ("environment", "status"),
    [
        ({"SPARTA_KERNEL": "off"}, "off: SPARTA_KERNEL=off"),
        ({"CXX": "no-such-compiler"}, "off: no C++ compiler"),
        ({"CXX": "false"}, "off: Command"),
    ],
    ids=["by request", "no compiler", "broken compiler"],
)
def test_without_a_kernel_the_operators_give_the_same_and_the_status_says_why(environment, status, tmp_path):
    assert run(SCRIPT, SPARTA_CACHE=str(tmp_path), **environment).startswith(status)
    assert not list(tmp_path.glob("*.so"))


def test_a_cache_that_cannot_be_written_falls_back(tmp_path):
    (tmp_path / "file").write_text("")
    assert run(SCRIPT, SPARTA_CACHE=str(tmp_path / "file" / "cache")).startswith("off: ")


def test_without_a_home_directory_the_operators_take_over(monkeypatch):
    for name in ("HOME", "SPARTA_CACHE", "XDG_CACHE_HOME", "SPARTA_KERNEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CXX", sys.executable)  # any program: the cache comes before the compiler

    def nobody(_):
        raise KeyError("no such user")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    operators, status = _state.__wrapped__()
    assert operators is None
    assert status.startswith("off: ")
    assert "home directory" in status


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("variant", ["depthwise", "shared", "attention", "smoothmax"])
def test_torch_jit_traces_the_operators(variant):
    sparta, x = Sparta(4, variant=variant), torch.randn(2, 4, 5, 5)
    torch.nn.init.normal_(sparta.gate.weight)
    traced = torch.jit.trace(sparta, x)
    assert "prim::PythonOp" not in {node.kind() for node in traced.inlined_graph.nodes()}
    torch.testing.assert_close(traced(-x), sparta(-x), atol=1e-6, rtol=1e-5)


@compiled
def test_the_kernel_is_built_once_and_kept(tmp_path):
    first = run(SCRIPT, SPARTA_CACHE=str(tmp_path))
    (library,) = tmp_path.glob("*.so")
    assert first == f"on: {library}"
    written = library.stat().st_mtime_ns
    assert run(SCRIPT, SPARTA_CACHE=str(tmp_path)) == first
    assert library.stat().st_mtime_ns == written


IMPORTS = """
import sys
import sparta_models
heavy = {"ray", "mlflow", "ffcv", "pydantic", "torchvision", "timm", "onnx", "safetensors", "triton", "pipeline"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert "sparta_models.kernels" in sys.modules
from sparta_models.kernels import _state
assert _state.cache_info().currsize == 0
import torch
assert not hasattr(torch.ops.sparta_models, "gate_forward")
"""


def test_importing_the_library_imports_no_system_package_and_builds_nothing(tmp_path):
    run(IMPORTS, SPARTA_CACHE=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_backward_pass_that_is_compiled_alone_sees_plain_operators():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), Sparta(4))
    x = torch.randn(2, 3, 8, 8)
    (expected,) = torch.autograd.grad(network(x).sum(), network[1].gate.sharpness)
    loss = network(x).sum()
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda y: y.backward(), backend="eager")(loss)
    torch.testing.assert_close(network[1].gate.sharpness.grad, expected)
