"""x sigmoid(g), or the smooth maximum of x and T; g, T depthwise correlations: an autograd function that keeps x alone.

A PGD step pays the gate forward and backward, so both are one pass where the compiled kernel fits, and the backward
computes the gate again instead of storing it: memory is that of SiLU. The gradients of weights are computed only where
they are asked for, which in an attack they need not be, and with a frozen bank never are.

    y  = x s, s = sigmoid(g)                            or the smooth maximum   y = T + d s, s = sigmoid(b d), d = x - T
    h  = dy x s (1 - s)                                                         h = dy (1 - s - b d s (1 - s))
    dx = dy s + w^T * h                                                         dx = dy - h + w^T * h
    dw = correlation of h with x, the bias's gradient the sum of h              db = sum of dy d^2 s (1 - s)

The kernels call the correlation g in both.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparta_models.activations.fused import alias, for_kernel, gradients, kernel_for, layout, needed, traced

_Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""x, weight, sharpness (None: the gate), bias."""


def depthwise_gate(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int = 1) -> Tensor:
    """Return x sigmoid(w * x + b).

    Args:
        x: (B, C, H, W), any layout; channels_last is the fast one.
        weight: (C, 1, k, k).
        bias: (C,) or None.
        dilation: spacing of the taps.
    """
    return _apply(x, weight, None, bias, dilation)


def smooth_max(x: Tensor, weight: Tensor, sharpness: Tensor, bias: Tensor | None, dilation: int = 1) -> Tensor:
    """Return the smooth maximum T + (x - T) sigmoid(sharpness (x - T)) of x and T = w * x + b.

    Args:
        x: (B, C, H, W), any layout; channels_last is the fast one.
        weight: (C, 1, k, k).
        sharpness: (C,).
        bias: (C,) or None.
        dilation: spacing of the taps.
    """
    return _apply(x, weight, sharpness, bias, dilation)


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int = 1, sharpness: Tensor | None = None
) -> Tensor:
    """The same by torch's differentiable operators: the gate, or with a sharpness the smooth maximum."""
    if sharpness is None:
        return x * torch.sigmoid(correlate(x, weight, bias, dilation))
    T = correlate(x, weight, bias, dilation)
    d = x - T
    return T + d * torch.sigmoid(sharpness.to(x.dtype)[:, None, None] * d)


def _apply(x: Tensor, weight: Tensor, sharpness: Tensor | None, bias: Tensor | None, dilation: int) -> Tensor:
    if traced():
        return reference(x, weight, bias, dilation, sharpness)
    return _Gate.apply(x, alias(weight), alias(sharpness), alias(bias), dilation)  # type: ignore[no-any-return]


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, sharpness: Tensor | None, bias: Tensor | None, dilation: int) -> Tensor:
        operators = kernel_for("gate", x, weight, dilation)
        if operators is None:
            return reference(x, weight, bias, dilation, sharpness)
        y: Tensor = operators.gate_forward(*for_kernel(x, weight, sharpness, bias))
        return y.contiguous(memory_format=layout(x))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.dilation = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = x, weight, sharpness, bias = ctx.saved_tensors
        needs = needed(ctx, inputs)
        if torch.is_grad_enabled():
            # With a graph of their own, for second derivatives.
            y = reference(x, weight, bias, ctx.dilation, sharpness)
            return *gradients(y, grads[0], inputs, needs, create_graph=True), None
        operators = kernel_for("gate", x, weight, ctx.dilation, grads[0])
        if operators is None:
            return *_by_operators(grads[0], inputs, needs, ctx.dilation), None
        return *_by_kernel(operators, grads[0], inputs, needs), None


def _by_kernel(operators: Any, dy: Tensor, inputs: _Inputs, needs: Sequence[bool]) -> list[Tensor | None]:
    x, weight, sharpness, bias = inputs
    weights = any(needs[1:])
    dyk = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
    dx, sums = operators.gate_backward(dyk, *for_kernel(x, weight, sharpness, bias), weights)
    dx = dx.contiguous(memory_format=layout(x))
    if not weights:
        return [dx, None, None, None]
    sums = sums.sum(0).to(weight.dtype)  # (k k + 2, C): taps, bias, sharpness
    dw = sums[:-2].t().reshape(weight.shape)
    return [dx, dw, None if sharpness is None else sums[-1], None if bias is None else sums[-2]]


def _by_operators(dy: Tensor, inputs: _Inputs, needs: Sequence[bool], dilation: int) -> list[Tensor | None]:
    x, weight, sharpness, bias = inputs
    correlation = correlate(x, weight, bias, dilation)
    direct, h, of_sharpness = _terms(dy, x, correlation, sharpness, needs[2])
    padding, channels = dilation * (weight.shape[-1] // 2), x.shape[1]
    # Arguments: bias sizes, stride, padding, dilation, transposed, output padding, groups, what is asked for.
    place = ([channels], [1, 1], [padding] * 2, [dilation] * 2, False, [0, 0], channels, [*needs[:2], needs[3]])
    dx, dw, db = torch.ops.aten.convolution_backward(h.to(x.dtype), x, weight.to(x.dtype), *place)
    return [
        dx.add_(direct) if needs[0] else None,
        dw.to(weight.dtype) if needs[1] else None,
        of_sharpness,
        db.to(bias.dtype) if bias is not None and needs[3] else None,
    ]


def _terms(
    dy: Tensor, x: Tensor, correlation: Tensor, sharpness: Tensor | None, asked: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dy times the derivatives of y by x alone and by g, or T (B, C, H, W); the sharpness's gradient (C,) if asked."""
    if sharpness is None:
        s = torch.sigmoid(correlation)
        through = dy * s
        return through, through * x * (1 - s), None
    d, b = x - correlation, sharpness.to(x.dtype)[:, None, None]
    s = torch.sigmoid(b * d)
    slope = d * s * (1 - s)
    direct = dy * (s + b * slope)
    return direct, dy - direct, (dy * d * slope).sum((0, 2, 3)).to(sharpness.dtype) if asked else None


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
