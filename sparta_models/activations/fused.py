"""What the explicit autograd functions have in common: which compiled kernel serves an input, how tensors reach it,
and whose gradients a backward pass asks for."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparta_models.kernels import kernel, triton_kernel

_KERNEL_TYPES = (torch.float32, torch.bfloat16)


def traced() -> bool:
    """Whether a tracer looks on. It sees torch's operators, which it can export, and fuse in its own ways."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def kernel_for(name: str, x: Tensor, weight: Tensor, dilation: int) -> Any:
    """What holds `name`_forward and `name`_backward for x (B, C, H, W) and kernels `weight` (C, 1, k, k); None where
    torch's operators have to serve."""
    fits = (
        x.dtype in _KERNEL_TYPES
        and weight.shape[-1] == 3
        and dilation == 1
        and x.numel() > 0
        and type(x) in (Tensor, torch.nn.Parameter)
    )
    if fits and x.device.type == "cpu":
        return kernel()
    # On a GPU two copies of the layout would cost more than the kernel saves.
    if fits and x.device.type == "cuda" and name == "gate" and layout(x) == torch.channels_last:
        return triton_kernel()
    return None


def for_kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """x in channels_last; the taps of `weight` (C, 1, 3, 3) as (9, C); the bias (C,); both in float32."""
    b = None if bias is None else bias.detach().float().contiguous()
    taps = weight.detach().float().flatten(1).t().contiguous()
    return x.detach().contiguous(memory_format=torch.channels_last), taps, b


def layout(x: Tensor) -> torch.memory_format:
    """The layout that an output like x has."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def alias(parameter: Tensor | None) -> Tensor | None:
    """Stand between a parameter and the function, because the engine tells `needed` nothing about leaves."""
    return None if parameter is None else parameter.view_as(parameter)


def needed(ctx: Any, index: int) -> bool:
    """Whether this backward pass uses the gradient of a parameter that came through `alias`.

    needs_input_grad says only that it can have one; autograd.grad(loss, x) with learnable weights doesn't use theirs.
    next_functions lists tensors only, so an input that may be None comes last.
    """
    if not ctx.needs_input_grad[index]:
        return False
    return bool(torch._C._will_engine_execute_node(ctx.next_functions[index][0]))


def gradients(
    y: Tensor, dy: Tensor, inputs: Sequence[Tensor | None], needs: Sequence[bool], *, create_graph: bool
) -> list[Tensor | None]:
    """Gradients of y by torch's engine, where `needs` asks for them; None elsewhere."""
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need and t is not None]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=create_graph))
    return [next(found) if need else None for need in needs]
