"""The kernels in Triton: by its interpreter, by its compiler for GPUs that aren't here, and on one that is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparta_models import Sparta
from sparta_models.activations.fused import kernel_for
from sparta_models.activations.gate import depthwise_gate, reference, smooth_max
from sparta_models.kernels import triton_kernel

pytestmark = pytest.mark.skipif(triton_kernel() is None, reason="Triton isn't installed, or SPARTA_KERNEL=off")


def run(*arguments, **environment):
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("triton_toys.py")), *arguments],
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_the_interpreted_kernels_agree_with_the_reference():
    run("interpret", TRITON_INTERPRET="1")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [pytest.param("80", marks=pytest.mark.extended), "90"])
def test_the_kernels_compile_to_machine_code_of_a_gpu(capability, tmp_path):
    run(capability, TRITON_CACHE_DIR=str(tmp_path))


def test_switching_kernels_off_switches_it_off(monkeypatch):
    monkeypatch.setenv("SPARTA_KERNEL", "off")
    assert triton_kernel.__wrapped__() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("smooth", [False, True], ids=["gate", "smooth maximum"])
def test_on_a_gpu_channels_last_goes_to_the_kernel_and_agrees_with_the_reference(
    dtype, kernel_size, smooth, monkeypatch
):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(8, 70, 13, 11, generator=generator).to("cuda", dtype) for _ in range(2))
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    weight = torch.randn(70, 1, kernel_size, kernel_size, generator=generator).cuda()
    bias, sharpness = (torch.rand(70, generator=generator).cuda() for _ in range(2))
    assert kernel_for("gate", x, weight, 1) is triton_kernel()
    assert kernel_for("gate", x.contiguous(), weight, 1) is None
    assert kernel_for("attention", x, weight, 1) is None

    def fast(x, weight, bias, sharpness):
        return smooth_max(x, weight, sharpness, bias) if smooth else depthwise_gate(x, weight, bias)

    def slow(x, weight, bias, sharpness):
        return reference(x, weight, bias, sharpness=sharpness if smooth else None)

    results = []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for function, to in ((fast, dtype), (slow, torch.float32)):
        inputs = [t.detach().to(to if t is x else torch.float32).requires_grad_() for t in (x, weight, bias, sharpness)]
        y = function(*inputs)
        results.append((y, *torch.autograd.grad(y, inputs[: 4 if smooth else 3], dy.to(to))))
    # Convolutions of the reference without TF32; sums over 1,144 positions; bf16 rounds dx twice, to 2^-9.
    close = {"atol": 1e-4, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-1, "rtol": 2**-6}
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.float(), want, **close)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_an_attack_computes_no_gradients_of_weights(monkeypatch):
    asked = []
    backward = triton_kernel().gate_backward
    monkeypatch.setattr(triton_kernel(), "gate_backward", lambda *args: asked.append(args[-1]) or backward(*args))
    sparta = Sparta(16).cuda()
    x = torch.randn(2, 16, 4, 4, device="cuda").contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.autograd.grad(sparta(x).sum(), x)
    sparta(x).sum().backward()
    assert asked == [False, True]
