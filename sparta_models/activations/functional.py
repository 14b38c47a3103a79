"""y = x sigmoid(g), g a depthwise correlation: an explicit autograd function that keeps x and nothing of the gate.

A PGD step pays the gate forward and backward, so both are one pass where the compiled kernel fits, and the backward
computes the gate again instead of storing it: memory is that of SiLU. The gradients of weights are computed only where
they are asked for, which in an attack they need not be, and with a frozen bank never are.

    h  = dy x s (1 - s), s = sigmoid(g)
    dx = dy s + w^T * h,   dw = correlation of h with x,   db = sum of h
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparta_models.kernels import kernel

_KERNEL_TYPES = (torch.float32, torch.bfloat16)
_Inputs = tuple[Tensor, Tensor, Tensor | None]


def depthwise_gate(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int = 1) -> Tensor:
    """Return x sigmoid(w * x + b).

    Args:
        x: (B, C, H, W), any layout; channels_last is the fast one.
        weight: (C, 1, k, k).
        bias: (C,) or None.
        dilation: spacing of the taps.
    """
    # Tracers see the operators, which they can export and fuse in their own ways.
    if torch.compiler.is_compiling():
        return reference(x, weight, bias, dilation)
    return _DepthwiseGate.apply(x, _alias(weight), None if bias is None else _alias(bias), dilation)  # type: ignore[no-any-return]


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int = 1) -> Tensor:
    """The same by torch's differentiable operators."""
    return x * torch.sigmoid(correlate(x, weight, bias, dilation))


class _DepthwiseGate(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
        if not _fits(x, weight, dilation):
            return reference(x, weight, bias, dilation)
        y: Tensor = _operators().gate_forward(*_for_kernel(x, weight, bias))
        return y.contiguous(memory_format=_layout(x))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, int], output: Tensor) -> None:
        x, weight, bias, ctx.dilation = inputs
        ctx.save_for_backward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        needs = [ctx.needs_input_grad[0], _needed(ctx, 1), _needed(ctx, 2)]
        if torch.is_grad_enabled():
            return *_differentiable(grads[0], inputs, needs, ctx.dilation), None
        if _fits(inputs[0], inputs[1], ctx.dilation):
            return *_by_kernel(grads[0], inputs, needs), None
        return *_by_operators(grads[0], inputs, needs, ctx.dilation), None


def _alias(parameter: Tensor) -> Tensor:
    """Stand between a parameter and the function, because the engine tells `_needed` nothing about leaves."""
    return parameter.view_as(parameter)


def _needed(ctx: Any, index: int) -> bool:
    """Whether this backward pass uses the gradient of a parameter.

    needs_input_grad says only that it can have one; autograd.grad(loss, x) with learnable weights doesn't use theirs.
    """
    if not ctx.needs_input_grad[index]:
        return False
    return bool(torch._C._will_engine_execute_node(ctx.next_functions[index][0]))


def _differentiable(dy: Tensor, inputs: _Inputs, needs: Sequence[bool], dilation: int) -> list[Tensor | None]:
    """Gradients with a graph of their own, for second derivatives."""
    y = reference(*inputs, dilation)
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need and t is not None]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [next(found) if need else None for need in needs]


def _by_kernel(dy: Tensor, inputs: _Inputs, needs: Sequence[bool]) -> list[Tensor | None]:
    x, weight, bias = inputs
    weights = needs[1] or needs[2]
    xk, wk, bk = _for_kernel(x, weight, bias)
    dyk = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
    dx, sums = _operators().gate_backward(dyk, xk, wk, bk, weights)
    dx = dx.contiguous(memory_format=_layout(x))
    if not weights:
        return [dx, None, None]
    sums = sums.sum(0).to(weight.dtype)  # (10, C): nine taps and the bias
    return [dx, sums[:9].t().reshape(weight.shape), None if bias is None else sums[9]]


def _by_operators(dy: Tensor, inputs: _Inputs, needs: Sequence[bool], dilation: int) -> list[Tensor | None]:
    x, weight, bias = inputs
    s = torch.sigmoid(correlate(x, weight, bias, dilation))
    through = dy * s
    h = (through * x * (1 - s)).to(x.dtype)
    padding, channels = dilation * (weight.shape[-1] // 2), x.shape[1]
    # Arguments: bias sizes, stride, padding, dilation, transposed, output padding, groups, what is asked for.
    place = ([channels], [1, 1], [padding] * 2, [dilation] * 2, False, [0, 0], channels, list(needs))
    dx, dw, db = torch.ops.aten.convolution_backward(h, x, weight.to(x.dtype), *place)
    return [
        dx.add_(through) if needs[0] else None,
        dw.to(weight.dtype) if needs[1] else None,
        db.to(bias.dtype) if bias is not None and needs[2] else None,
    ]


def correlate(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int = 1) -> Tensor:
    """Return w * x + b: each channel of x (B, C, H, W) with its own kernel, zero padding, same size."""
    # The gate is computed in x's own precision, under autocast too: forward and backward then see the same gate.
    with torch.autocast(x.device.type, enabled=False):
        return F.conv2d(
            x,
            weight.to(x.dtype),
            None if bias is None else bias.to(x.dtype),
            padding=dilation * (weight.shape[-1] // 2),
            dilation=dilation,
            groups=x.shape[1],
        )


def _fits(x: Tensor, weight: Tensor, dilation: int) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype in _KERNEL_TYPES
        and weight.shape[-1] == 3
        and dilation == 1
        and x.numel() > 0
        and type(x) in (Tensor, torch.nn.Parameter)
        and kernel() is not None
    )


def _operators() -> Any:
    return kernel()


def _for_kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    b = None if bias is None else bias.detach().float().contiguous()
    taps = weight.detach().float().flatten(1).t().contiguous()  # (9, C)
    return x.detach().contiguous(memory_format=torch.channels_last), taps, b


def _layout(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format
