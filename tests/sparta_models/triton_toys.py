"""What test_triton.py runs in processes of their own, because TRITON_INTERPRET is read at import."""

import itertools
import sys

import torch

from sparta_models.activations.functional import reference
from sparta_models.kernels import gate_triton

# One block of channels and several, whole and with a rest; more positions than one chunk takes at a time.
CASES = [
    ((2, 16, 5, 7), torch.float32, True),
    ((1, 3, 1, 1), torch.float32, False),
    ((2, 70, 3, 4), torch.float32, False),
    ((3, 8, 9, 9), torch.bfloat16, True),
    ((1, 20, 2, 3), torch.bfloat16, False),
]


def interpret() -> None:
    """Hold the kernels to the reference, on a CPU, one operation of a block at a time."""
    gate_triton._CHUNKS = 3
    generator = torch.Generator().manual_seed(0)
    for shape, dtype, has_bias in CASES:
        x, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
        w = torch.randn(9, shape[1], generator=generator)
        b = torch.randn(shape[1], generator=generator) if has_bias else None
        # bf16: y is rounded once, to 2^-9 of its size; h, and dx twice.
        close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 2**-7}
        inputs = [x.float(), w.t().reshape(-1, 1, 3, 3).contiguous(), *([b] if has_bias else [])]
        inputs = [t.detach().clone().requires_grad_() for t in inputs]
        y = reference(*inputs, *([] if has_bias else [None]))
        dx, dw, *db = torch.autograd.grad(y, inputs, dy.float())
        torch.testing.assert_close(gate_triton.gate_forward(x, w, b).float(), y.detach(), **close)
        for weights in (False, True):
            got, sums = gate_triton.gate_backward(dy, x, w, b, weights)
            assert got.dtype == dtype
            torch.testing.assert_close(got.float(), dx, **close)
        close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 6e-2, "rtol": 2**-6}
        torch.testing.assert_close(sums.sum(0)[:9], dw.flatten(1).t(), **close)
        if has_bias:
            torch.testing.assert_close(sums.sum(0)[9], db[0], **close)


def compile_for(capability: int) -> None:
    """Compile all kernels for a GPU that isn't there: to its machine code, which only a wrong kernel can't reach."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernels = [gate_triton._forward, gate_triton._terms, gate_triton._add_transposed, gate_triton._sums]
    for kernel, (storage, bias) in itertools.product(kernels, (("*fp32", True), ("*bf16", False))):
        signature, constants = {}, {"P": 32, "N": 64}
        for name in kernel.arg_names:
            if name in constants or (name == "b" and not bias):
                signature[name] = "constexpr"
                constants.setdefault(name, None)
            elif name in ("w", "b", "sums"):
                signature[name] = "*fp32"
            else:
                signature[name] = storage if name in ("x", "dy", "y", "h", "dx") else "i32"
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]


if __name__ == "__main__":
    interpret() if sys.argv[1] == "interpret" else compile_for(int(sys.argv[1]))
