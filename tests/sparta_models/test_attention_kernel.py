"""The fast path of the attention gate (channel mean and maximum): agreement with the reference, ties, what it saves."""

import pytest
import torch

from sparta_models import Sparta, kernel_status
from sparta_models.activations.attention import attention_gate, reference
from sparta_models.kernels import kernel

compiled = pytest.mark.skipif(kernel() is None, reason=f"no compiled kernel: {kernel_status()}")
LAYOUTS = [torch.channels_last, torch.contiguous_format]
# Groups of 16 (or 8) channels: whole, with a rest, less than one; maps down to a single pixel.
SHAPES = [(2, 32, 8, 8), (3, 20, 5, 7), (2, 3, 1, 1), (1, 17, 1, 6), (2, 16, 6, 1), (2, 1, 4, 4), (5, 64, 2, 2)]


def problem(shape, *, dtype=torch.float32, layout=torch.channels_last, bias=True, kernel_size=3, ties=False):
    g = torch.Generator().manual_seed(0)
    own = torch.promote_types(dtype, torch.float32)
    x = torch.randn(shape, generator=g)
    if ties:
        # Three channels hold the maximum at every position.
        x[:, : min(3, shape[1])] = x.amax(1, keepdim=True)
    x = x.to(dtype).contiguous(memory_format=layout)
    weight = torch.randn(shape[1], 1, kernel_size, kernel_size, generator=g, dtype=own)
    pooled = torch.randn(1, 2, kernel_size, kernel_size, generator=g, dtype=own)
    offset = torch.randn(shape[1], generator=g, dtype=own) if bias else None
    dy = torch.randn(shape, generator=g).to(dtype).contiguous(memory_format=layout)
    return [t.requires_grad_() for t in (x, weight, pooled, offset) if t is not None], dy


def results(function, inputs, dy, dilation=1):
    y = function(*inputs, *([None] * (4 - len(inputs))), dilation)
    return y, *torch.autograd.grad(y, inputs, dy)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["last", "first"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_values_and_gradients_agree_with_the_reference_in_fp32(shape, layout, bias, ties):
    inputs, dy = problem(shape, layout=layout, bias=bias, ties=ties)
    for fast, slow in zip(results(attention_gate, inputs, dy), results(reference, inputs, dy), strict=True):
        # Sums over a batch of up to 1,000 positions add their rounding.
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
        assert (fast.dtype, fast.shape) == (slow.dtype, slow.shape)
    assert attention_gate(*inputs[:3], None).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("options", [{"kernel_size": 5}, {"kernel_size": 1}, {"dilation": 2}], ids=str)
def test_other_kernels_agree_with_the_reference_by_operators(options):
    dilation = options.get("dilation", 1)
    inputs, dy = problem((2, 6, 7, 5), kernel_size=options.get("kernel_size", 3))
    for fast, slow in zip(
        results(attention_gate, inputs, dy, dilation), results(reference, inputs, dy, dilation), strict=True
    ):
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)


def test_bf16_is_as_close_to_fp32_as_rounding_allows():
    inputs, dy = problem((2, 20, 6, 6), dtype=torch.bfloat16)
    exact = [t.detach().float().requires_grad_() for t in inputs]
    y, *gradients = results(attention_gate, inputs, dy)
    truth, *wanted = results(reference, exact, dy.float())
    if kernel() is not None:
        # bf16 has 8 bits of mantissa: half a unit in the last place is 2^-9; dx is rounded twice.
        torch.testing.assert_close(y.float(), truth, atol=1e-6, rtol=2**-8)
    for got, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got.float(), want, atol=3e-2, rtol=3e-2)
    assert [t.dtype for t in (y, *gradients)] == [torch.bfloat16, torch.bfloat16, *[torch.float32] * 3]


def test_autocast_keeps_the_inputs_type():
    sparta = Sparta(8, variant="attention", kernel_size=3)
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(2, 8, 4, 4, dtype=dtype, requires_grad=True)
            y = sparta(x)
            y.sum().backward()
            assert (y.dtype, x.grad.dtype, sparta.gate.pooled.grad.dtype) == (dtype, dtype, torch.float32)


@pytest.mark.parametrize("bias", [False, True])
def test_the_function_passes_gradcheck_and_gradgradcheck(bias):
    inputs, _ = problem((1, 3, 3, 2), dtype=torch.float64, bias=bias)

    def function(*tensors):
        return attention_gate(*tensors, *([None] * (not bias)))

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_second_derivatives_through_the_fast_path_are_the_references():
    found = []
    for function in (attention_gate, reference):
        inputs, dy = problem((2, 16, 4, 4))
        (dx,) = torch.autograd.grad(function(*inputs), inputs[0], dy, create_graph=True)
        dx.square().sum().backward()
        found.append([t.grad for t in inputs])
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kernel_size", [3, 5], ids=["kernel", "operators"])
def test_only_the_input_and_the_weights_are_saved(kernel_size):
    sparta = Sparta(16, variant="attention", kernel_size=kernel_size)
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        sparta(x)
    assert sum(saved.values()) == x.numel() + sparta.num_parameters()


@compiled
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_weights_are_not_computed_for_an_attack_or_a_frozen_bank(frozen, monkeypatch):
    asked = []
    operators = kernel()

    class Spy:
        attention_forward = operators.attention_forward

        @staticmethod
        def attention_backward(*args):
            asked.append(args[-1])
            return operators.attention_backward(*args)

    monkeypatch.setattr("sparta_models.activations.fused.kernel", lambda: Spy)
    sparta = Sparta(16, variant="attention", kernel_size=3)
    if frozen:
        sparta.freeze()
    x = torch.randn(2, 16, 4, 4, requires_grad=True)
    torch.autograd.grad(sparta(x).sum(), x)
    sparta(x).sum().backward()
    assert asked == [False, not frozen]


@compiled
def test_threads_and_repetition_change_nothing_beyond_the_order_of_sums():
    threads = torch.get_num_threads()
    inputs, dy = problem((8, 32, 16, 16))
    found = []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            found.append(results(attention_gate, inputs, dy))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(found[1], found[2], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found[0][:2], found[1][:2], strict=True))
    torch.testing.assert_close(found[0][2:], found[1][2:], atol=1e-3, rtol=1e-4)


def test_not_a_number_stays_one_and_in_its_image():
    x = torch.zeros(2, 16, 3, 3).contiguous(memory_format=torch.channels_last)
    x[0, 2, 1, 1] = float("nan")
    for dtype in (torch.float32, torch.bfloat16):
        y = Sparta(16, variant="attention", kernel_size=3)(x.to(dtype))
        assert y[0, 2, 1, 1].isnan()
        assert y[1].isfinite().all()


def test_function_transforms_and_empty_batches_pass():
    sparta = Sparta(4, variant="attention", kernel_size=3)
    x = torch.randn(1, 4, 3, 3)
    gradient = torch.func.grad(lambda x: sparta(x).sum())(x)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sparta(leaf).sum(), leaf)
    torch.testing.assert_close(gradient, expected)
    assert sparta(torch.zeros(0, 4, 3, 3)).shape == (0, 4, 3, 3)
