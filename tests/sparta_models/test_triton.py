"""The depthwise gate in Triton: by its interpreter, by its compiler for GPUs that aren't here, and on one that is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparta_models import Sparta
from sparta_models.activations.functional import depthwise_gate, reference
from sparta_models.activations.fused import kernel_for
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
def test_on_a_gpu_channels_last_goes_to_the_kernel_and_agrees_with_the_reference(dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(8, 70, 13, 11, generator=generator).to("cuda", dtype) for _ in range(2))
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    weight, bias = torch.randn(70, 1, 3, 3, generator=generator).cuda(), torch.randn(70, generator=generator).cuda()
    assert kernel_for("gate", x, weight, 1) is triton_kernel()
    assert kernel_for("gate", x.contiguous(), weight, 1) is None
    assert kernel_for("attention", x, weight, 1) is None
    results = []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for function, to in ((depthwise_gate, dtype), (reference, torch.float32)):
        inputs = [t.detach().to(to if t is x else torch.float32).requires_grad_() for t in (x, weight, bias)]
        y = function(*inputs)
        results.append((y, *torch.autograd.grad(y, inputs, dy.to(to))))
    # Convolutions of the reference without TF32; sums over 1,144 positions; bf16 rounds dx twice, to 2^-9.
    close = {"atol": 1e-4, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-1, "rtol": 2**-6}
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast.float(), slow, **close)


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
