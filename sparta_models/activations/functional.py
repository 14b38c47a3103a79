"""y = x sigmoid(g), g a depthwise correlation: an explicit autograd function that keeps x and nothing of the gate.

A PGD step pays the gate forward and backward, so both are one pass where the compiled kernel fits, and the backward
computes the gate again instead of storing it: memory is that of SiLU. The gradients of weights are computed only where
they are asked for, which in an attack they need not be, and with a frozen bank never are.

    h  = dy x s (1 - s), s = sigmoid(g)
    dx = dy s + w^T * h,   dw = correlation of h with x,   db = sum of h
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparta_models.activations.fused import alias, for_kernel, gradients, kernel_for, layout, needed, traced

_Inputs = tuple[Tensor, Tensor, Tensor | None]


def depthwise_gate(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int = 1) -> Tensor:
    """Return x sigmoid(w * x + b).

    Args:
        x: (B, C, H, W), any layout; channels_last is the fast one.
        weight: (C, 1, k, k).
        bias: (C,) or None.
        dilation: spacing of the taps.
    """
    if traced():
        return reference(x, weight, bias, dilation)
    return _DepthwiseGate.apply(x, alias(weight), alias(bias), dilation)  # type: ignore[no-any-return]


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int = 1) -> Tensor:
    """The same by torch's differentiable operators."""
    return x * torch.sigmoid(correlate(x, weight, bias, dilation))


class _DepthwiseGate(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
        operators = kernel_for("gate", x, weight, dilation)
        if operators is None:
            return reference(x, weight, bias, dilation)
        y: Tensor = operators.gate_forward(*for_kernel(x, weight, bias))
        return y.contiguous(memory_format=layout(x))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, int], output: Tensor) -> None:
        x, weight, bias, ctx.dilation = inputs
        ctx.save_for_backward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = x, weight, bias = ctx.saved_tensors
        needs = [ctx.needs_input_grad[0], needed(ctx, 1), needed(ctx, 2)]
        if torch.is_grad_enabled():
            # With a graph of their own, for second derivatives.
            y = reference(x, weight, bias, ctx.dilation)
            return *gradients(y, grads[0], inputs, needs, create_graph=True), None
        operators = kernel_for("gate", x, weight, ctx.dilation)
        if operators is None:
            return *_by_operators(grads[0], inputs, needs, ctx.dilation), None
        return *_by_kernel(operators, grads[0], inputs, needs), None


def _by_kernel(operators: Any, dy: Tensor, inputs: _Inputs, needs: Sequence[bool]) -> list[Tensor | None]:
    x, weight, bias = inputs
    weights = needs[1] or needs[2]
    dyk = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
    dx, sums = operators.gate_backward(dyk, *for_kernel(x, weight, bias), weights)
    dx = dx.contiguous(memory_format=layout(x))
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


def own_precision(x: Tensor) -> AbstractContextManager[object]:
    """Where a gate is computed in x's own type, under autocast too: forward and backward then see the same gate."""
    # The meta device has no autocast to be switched off.
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def correlate(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int = 1) -> Tensor:
    """Return w * x + b: each channel of x (B, C, H, W) with its own kernel, zero padding, same size."""
    with own_precision(x):
        return F.conv2d(
            x,
            weight.to(x.dtype),
            None if bias is None else bias.to(x.dtype),
            padding=dilation * (weight.shape[-1] // 2),
            dilation=dilation,
            groups=x.shape[1],
        )
