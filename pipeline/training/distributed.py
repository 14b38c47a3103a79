"""Data parallelism by one collective per step; synchronised batch norms and AWP need further ones.

After the backward pass every rank adds up its gradients (of the SUM of its examples' losses), its batch-norm statistics
weighted by its examples, and its counts, in one flat all-reduce; dividing by the joint count gives exactly the gradient
of the joint batch, also when the ranks hold different numbers of examples. All ranks are identical after every step, so
a checkpoint can be taken at any. Against DistributedDataParallel this gives up the overlap of communication with the
backward pass, which in adversarial training is 2 of 2 K + 3 parts of a step. It wins an order of summation that does
not change when a run is resumed, and a network without a wrapper that an attack could be sent through.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparta_models.activations.base import GateNorm


def sum_over_ranks(values: Tensor, world_size: int) -> Tensor:
    """The sum of a tensor over all ranks, in place."""
    if world_size > 1:
        dist.all_reduce(values)
    return values


def broadcast_module(module: nn.Module, world_size: int) -> None:
    """Give all ranks the parameters and buffers of rank 0."""
    if world_size > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.data, 0)


def moving_statistics(model: nn.Module) -> list[Tensor]:
    """Running means and variances of the batch norms that are in training mode."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.running_mean is not None]
    return [t for norm in norms for t in (norm.running_mean, norm.running_var) if t is not None]


class StepReducer:
    """Adds gradients, statistics and counts over the ranks. `parameters`: those in training, the same on all ranks."""

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter], world_size: int) -> None:
        self.parameters, self.world_size = list(parameters), world_size
        self.statistics = moving_statistics(model) if world_size > 1 else []

    def __call__(self, counts: Tensor) -> Tensor:
        """counts (k,): the first is this rank's number of examples n; returns their sums.

        Gradients of the sum of losses become those of the mean over all ranks' examples; statistics likewise.
        """
        if self.world_size > 1:
            return self._joint(counts)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        torch._foreach_div_(gradients, counts[0])
        return counts

    def _joint(self, counts: Tensor) -> Tensor:
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        flat = torch.cat([t.reshape(-1) for t in (*gradients, *(s * counts[0] for s in self.statistics), counts)])
        dist.all_reduce(flat)
        sums = flat[-len(counts) :].clone()
        flat /= sums[0]
        offset = 0
        for target in (*gradients, *self.statistics):
            target.copy_(flat[offset : offset + target.numel()].view_as(target))
            offset += target.numel()
        return sums


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose derivative is the all-reduce of the derivatives."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class SyncBatchNorm(_BatchNorm):
    """Batch normalisation over the joint batch of all ranks, on any device and for unequal batches.

    n, sum x and sum x^2 are added over the ranks; mean m = sum x / n, variance v = sum x^2 / n - m^2;
    y = (x - m) / sqrt(v + eps) * weight + bias. torch.nn.SyncBatchNorm refuses CPU tensors.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 4:
            raise ValueError(f"expected (B, C, H, W), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise input (B, C, H, W)."""
        if not self.training:
            return super().forward(input)
        x = input.to(self.weight.dtype)
        count = x.new_full((1,), x.numel() // x.shape[1])
        sums = _joint_sums(torch.cat((count, x.sum((0, 2, 3)), (x * x).sum((0, 2, 3)))))
        total, (first, second) = sums[0], sums[1:].chunk(2)
        mean = first / total
        variance = (second / total - mean * mean).clamp(min=0)
        if self.track_running_stats:
            self._record(mean.detach(), variance.detach() * total / (total - 1).clamp(min=1))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        y: Tensor = (x - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]
        return y.to(input.dtype)

    def _record(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance, self.momentum)


def _joint_sums(sums: Tensor) -> Tensor:
    joint: Tensor = _SumOverRanks.apply(sums)
    return joint


def synchronise_batch_norms(model: nn.Module) -> nn.Module:
    """Replace, in place, the batch norms in training mode by `SyncBatchNorm` with the same tensors."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            # Of other kinds, such as timm's with an activation inside, something would be lost.
            if isinstance(child, nn.BatchNorm2d) and type(child) in (nn.BatchNorm2d, GateNorm) and child.training:
                setattr(module, name, _synchronised(child))
    return model


def _synchronised(norm: nn.BatchNorm2d) -> SyncBatchNorm:
    if not norm.affine or norm.momentum is None or norm.running_mean is None:
        raise ValueError(f'batch_norm="sync" expected batch norms with weights, momentum and statistics, got {norm}')
    twin = SyncBatchNorm(norm.num_features, norm.eps, norm.momentum).to(norm.running_mean)
    twin.load_state_dict(norm.state_dict())
    return twin
