"""What test_triton.py runs in processes of their own, because TRITON_INTERPRET is read at import."""

import itertools
import sys

import torch

from sparta_models.activations.gate import reference
from sparta_models.kernels import gate_triton

# One block of channels and several, whole and with a rest; more positions than one chunk takes at a time.
CASES = [
    ((2, 16, 5, 7), torch.float32, True, False, 3),
    ((1, 3, 1, 1), torch.float32, False, False, 3),
    ((2, 70, 3, 4), torch.float32, False, True, 3),
    ((3, 8, 9, 9), torch.bfloat16, True, False, 3),
    ((1, 20, 2, 3), torch.bfloat16, False, False, 3),
    ((3, 8, 9, 9), torch.bfloat16, True, True, 3),
    ((2, 5, 6, 4), torch.float32, True, True, 5),
    ((1, 7, 6, 3), torch.float32, False, False, 5),
    ((2, 6, 5, 5), torch.bfloat16, True, True, 5),
]


def interpret() -> None:
    """Hold the kernels to the reference, on a CPU, one operation of a block at a time."""
    gate_triton._CHUNKS = 3
    generator = torch.Generator().manual_seed(0)
    for shape, dtype, has_bias, smooth, k in CASES:
        channels = shape[1]
        x, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
        w = torch.randn(k * k, channels, generator=generator)
        b = torch.randn(channels, generator=generator) if has_bias else None
        sharpness = 2 * torch.rand(channels, generator=generator) if smooth else None
        # bf16: y is rounded once, to 2^-9 of its size; h, and dx twice.
        close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 2**-7}
        weight = w.t().reshape(-1, 1, k, k).contiguous()
        inputs = {"x": x.float(), "weight": weight, "bias": b, "sharpness": sharpness}
        inputs = {n: None if t is None else t.detach().clone().requires_grad_() for n, t in inputs.items()}
        y = reference(**inputs)
        wanted = {n: t for n, t in inputs.items() if t is not None}
        grads = dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), dy.float()), strict=True))
        torch.testing.assert_close(gate_triton.gate_forward(x, w, sharpness, b).float(), y.detach(), **close)
        for weights in (False, True):
            got, sums = gate_triton.gate_backward(dy, x, w, sharpness, b, weights)
            assert got.dtype == dtype
            torch.testing.assert_close(got.float(), grads["x"], **close)
        close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 6e-2, "rtol": 2**-6}
        sums = sums.sum(0)
        torch.testing.assert_close(sums[:-2], grads["weight"].flatten(1).t(), **close)
        if has_bias:
            torch.testing.assert_close(sums[-2], grads["bias"], **close)
        torch.testing.assert_close(sums[-1], grads["sharpness"] if smooth else torch.zeros(channels), **close)


def compile_for(capability: int) -> None:
    """Compile all kernels for a GPU that isn't there: to its machine code, which only a wrong kernel can't reach."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernels = [gate_triton._forward, gate_triton._terms, gate_triton._add_transposed, gate_triton._sums]
    forms = [("*fp32", True, False, 3), ("*bf16", False, True, 3), ("*bf16", True, True, 5)]
    for kernel, (storage, bias, smooth, k) in itertools.product(kernels, forms):
        signature, constants = {}, {"P": 32, "N": 64, "K": k}
        # `_sums` gets h where there is no second map; `_terms` has none in an attack or for a frozen bank.
        there = {"b": bias, "sharpness": smooth, "bend": (smooth and bias) or kernel is gate_triton._sums}
        for name in kernel.arg_names:
            if name in constants or not there.get(name, True):
                signature[name] = "constexpr"
                constants.setdefault(name, None)
            elif name in ("w", "b", "sharpness", "sums"):
                signature[name] = "*fp32"
            else:
                signature[name] = storage if name in ("x", "dy", "y", "h", "dx", "bend") else "i32"
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]


if __name__ == "__main__":
    interpret() if sys.argv[1] == "interpret" else compile_for(int(sys.argv[1]))
