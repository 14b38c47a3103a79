"""y = x sigmoid(g), g = w_c * x_c + b_c + v * [mean_c x, max_c x]: an explicit autograd function that keeps x alone.

The pooled maps move few bytes, but by torch's operators the backward of the channel maximum alone costs more than the
depthwise gate. The compiled kernel makes maps, gate and gradients of an image while it is in the cache; elsewhere the
backward goes through torch's operators again. Gradients of weights are computed only where they are asked for.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparta_models.activations.fused import alias, for_kernel, gradients, kernel_for, layout, needed, traced
from sparta_models.activations.gate import correlate, own_precision

_Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]


def attention_gate(x: Tensor, weight: Tensor, pooled: Tensor, bias: Tensor | None, dilation: int = 1) -> Tensor:
    """Return x sigmoid(w * x + b + v * [mean_c x, max_c x]).

    Args:
        x: (B, C, H, W), any layout; channels_last is the fast one.
        weight: (C, 1, k, k).
        pooled: v, (1, 2, k, k).
        bias: (C,) or None.
        dilation: spacing of the taps.
    """
    if traced():
        return reference(x, weight, pooled, bias, dilation)
    return _AttentionGate.apply(x, alias(weight), alias(pooled), alias(bias), dilation)  # type: ignore[no-any-return]


def reference(x: Tensor, weight: Tensor, pooled: Tensor, bias: Tensor | None, dilation: int = 1) -> Tensor:
    """The same by torch's differentiable operators."""
    return x * torch.sigmoid(logits(x, weight, pooled, bias, dilation))


def logits(x: Tensor, weight: Tensor, pooled: Tensor, bias: Tensor | None, dilation: int = 1) -> Tensor:
    """Return g (B, C, H, W). Channels that share the maximum share its gradient."""
    maps = torch.cat([x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1)  # (B, 2, H, W)
    padding = dilation * (pooled.shape[-1] // 2)
    with own_precision(x):
        shared = F.conv2d(maps, pooled.to(x.dtype), padding=padding, dilation=dilation)
    return correlate(x, weight, bias, dilation) + shared


class _AttentionGate(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, pooled: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
        operators = kernel_for("attention", x, weight, dilation)
        if operators is None:
            return reference(x, weight, pooled, bias, dilation)
        y: Tensor = operators.attention_forward(*for_kernel(x, weight, bias), _rows(pooled))
        return y.contiguous(memory_format=layout(x))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.dilation = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = x, weight, pooled, bias = ctx.saved_tensors
        needs = needed(ctx, inputs)
        create_graph = torch.is_grad_enabled()
        operators = None if create_graph else kernel_for("attention", x, weight, ctx.dilation, grads[0])
        if operators is not None:
            return *_by_kernel(operators, grads[0], inputs, needs), None
        with torch.enable_grad():
            y = reference(x, weight, pooled, bias, ctx.dilation)
        return *gradients(y, grads[0], inputs, needs, create_graph=create_graph), None


def _by_kernel(operators: Any, dy: Tensor, inputs: _Inputs, needs: Sequence[bool]) -> list[Tensor | None]:
    x, weight, pooled, bias = inputs
    weights = any(needs[1:])
    dyk = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
    dx, sums, dv = operators.attention_backward(dyk, *for_kernel(x, weight, bias), _rows(pooled), weights)
    dx = dx.contiguous(memory_format=layout(x))
    if not weights:
        return [dx, None, None, None]
    sums = sums.sum(0).to(weight.dtype)  # (11, C): nine taps, the bias, and nothing
    dw, db = sums[:9].t().reshape(weight.shape), None if bias is None else sums[9]
    return [dx, dw, dv.sum(0).to(pooled.dtype).reshape(pooled.shape), db]


def _rows(pooled: Tensor) -> Tensor:
    return pooled.detach().float().reshape(2, -1).contiguous()
