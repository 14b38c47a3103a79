"""What the explicit autograd functions have in common: which compiled kernel serves an input, how tensors reach it,
and whose gradients a backward pass asks for."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparta_models.kernels import kernel, triton_kernel

_KERNEL_TYPES = (torch.float32, torch.bfloat16)
_KERNEL_SIZES = {"gate": (3, 5), "attention": (3,)}


def traced() -> bool:
    """Whether a tracer, a transform of torch.func or forward-mode differentiation looks on. They see torch's operators,
    which they can export, fuse, batch and differentiate in their own ways."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def kernel_for(name: str, x: Tensor, weight: Tensor, dilation: int, dy: Tensor | None = None) -> Any:
    """What holds `name`_forward and `name`_backward for x (B, C, H, W), kernels `weight` (C, 1, k, k) and in a backward
    pass the gradient dy of the output; None where torch's operators have to serve."""
    fits = (
        not traced()  # asked again in the backward pass, which compiled autograd traces alone
        and x.dtype in _KERNEL_TYPES
        and weight.shape[-1] in _KERNEL_SIZES[name]
        and dilation == 1
        and x.numel() > 0
        and weight.device == x.device
        and all(_is_plain(t) for t in (x, dy) if t is not None)
    )
    if fits and x.device.type == "cpu":
        return kernel()
    # On a GPU two copies of the layout would cost more than the kernel saves.
    if fits and x.device.type == "cuda" and name == "gate" and layout(x) == torch.channels_last:
        return triton_kernel()
    return None


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is one to the kernel: no subclass, and not a batch of gradients (is_grads_batched)."""
    batched = torch._C._functorch.is_legacy_batchedtensor(tensor)
    return type(tensor) in (Tensor, torch.nn.Parameter) and not batched


def for_kernel(x: Tensor, weight: Tensor, *of_channels: Tensor | None) -> tuple[Tensor | None, ...]:
    """x in channels_last; the taps of `weight` (C, 1, k, k) as (k k, C); parameters (C,); all but x in float32."""
    taps = weight.detach().float().flatten(1).t().contiguous()
    others = (None if p is None else p.detach().float().contiguous() for p in of_channels)
    return x.detach().contiguous(memory_format=torch.channels_last), taps, *others


def layout(x: Tensor) -> torch.memory_format:
    """The layout that an output like x has."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def alias(parameter: Tensor | None) -> Tensor | None:
    """Stand between a parameter and the function, because the engine tells `needed` nothing about leaves."""
    return None if parameter is None else parameter.view_as(parameter)


def needed(ctx: Any, inputs: Sequence[Tensor | None]) -> list[bool]:
    """Whether this backward pass uses the gradients of x and of parameters that came through `alias`.

    needs_input_grad says only that a parameter can have one; autograd.grad(loss, x) with learnable weights doesn't use
    theirs. next_functions lists tensors only, so an input that is None has no place there.
    """
    functions = iter(ctx.next_functions)
    nodes = [None if t is None else next(functions)[0] for t in inputs]
    return [
        bool(need) and (node is None or i == 0 or bool(torch._C._will_engine_execute_node(node)))
        for i, (need, node) in enumerate(zip(ctx.needs_input_grad, nodes, strict=False))
    ]


def gradients(
    y: Tensor, dy: Tensor, inputs: Sequence[Tensor | None], needs: Sequence[bool], *, create_graph: bool
) -> list[Tensor | None]:
    """Gradients of y by torch's engine, where `needs` asks for them; None elsewhere."""
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need and t is not None]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=create_graph))
    return [next(found) if need else None for need in needs]
