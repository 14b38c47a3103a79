"""The arithmetic floor of a training step: what the bare network costs, counted and timed alone."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.training.methods import Cost
from pipeline.training.network import Forward


def floor_seconds(
    attacked: Forward,
    trained: Forward,
    x: Tensor,
    cost: Cost,
    *,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Time of a step's passes over the batch x, each timed alone: the median of `repeats`, after one to warm up.

    attacked: the network that attacks differentiate. trained: a copy of the network in training; its statistics move.
    """
    weights = [p for p in trained.parameters() if p.requires_grad]

    def forward() -> None:
        with torch.no_grad():
            attacked(x)

    def to_input() -> None:
        x_adv = x.detach().requires_grad_()
        torch.autograd.grad(attacked(x_adv).logsumexp(1).sum(), x_adv)

    def to_weights() -> None:
        torch.autograd.grad(trained(x).logsumexp(1).sum(), weights)

    parts = ((to_input, cost.attack_steps), (forward, cost.forwards), (to_weights, cost.batches))
    return sum(count * _median(part, x.device, repeats, clock) for part, count in parts if count)


def _median(part: Callable[[], None], device: torch.device, repeats: int, clock: Callable[[], float]) -> float:
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        _wait(device)
        begin = clock()
        part()
        _wait(device)
        times.append(clock() - begin)
    return statistics.median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
