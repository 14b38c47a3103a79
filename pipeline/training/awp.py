"""Adversarial weight perturbation (Wu et al., arXiv 2004.05884), around the loss of any method.

v_l = gamma ||w_l|| g_l / ||g_l||, g the gradient of the loss at w over the joint batch, for every weight tensor of two
or more dimensions that is in training; the step's gradient is taken at w + v, and the optimizer steps from w itself.
Cost: the method's own training passes once more, and a second collective between ranks.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipeline.training.attacks import attack_mode
from pipeline.training.distributed import sum_over_ranks

_TINY = 1e-20


@contextmanager
def perturbed_weights(model: nn.Module, loss: Callable[[], Tensor], *, gamma: float, world_size: int) -> Iterator[None]:
    """Inside the block the weights are w + v; after it, exactly w.

    loss: makes a forward pass and sums over this rank's examples; in it no running statistic moves.
    """
    weights = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    before = [w.detach().clone() for w in weights]
    with attack_mode(model, "train"):
        gradients = _joint(torch.autograd.grad(loss(), weights), world_size)
    try:
        with torch.no_grad():
            for w, g in zip(weights, gradients, strict=True):
                w.add_(g * (gamma * w.norm() / (g.norm() + _TINY)))
        yield
    finally:
        with torch.no_grad():
            for w, value in zip(weights, before, strict=True):
                w.copy_(value)


def _joint(gradients: Sequence[Tensor], world_size: int) -> Sequence[Tensor]:
    if world_size == 1:
        return gradients
    flat = sum_over_ranks(torch.cat([g.reshape(-1) for g in gradients]), world_size)
    parts = torch.split_with_sizes(flat, [g.numel() for g in gradients])
    return [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]
