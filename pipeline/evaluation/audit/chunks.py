"""Attacks and predictions on at most CHUNK images at a time, so that memory does not grow with the number of images.

The first chunk has the problem's own seed: up to CHUNK images see what they would see if there were no chunks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pipeline.evaluation.attacks import Problem, worst_of
from pipeline.evaluation.blocks import predict, short_seed

CHUNK = 128
"""The images of a quick audit; PGD through a ResNet-50 at 224 x 224 holds some ten GB for so many."""

Attack = Callable[[Problem], Tensor]
"""x_adv (B, C, H, W) for a problem of B images."""


def slices(count: int) -> list[slice]:
    """Consecutive pieces of `count` images, none for none."""
    return [slice(start, start + CHUNK) for start in range(0, count, CHUNK)]


def chunks(problem: Problem) -> Iterator[Problem]:
    """The problem in pieces, each with random numbers of its own."""
    for i, piece in enumerate(slices(len(problem.y))):
        seed = short_seed(problem.seed, "chunk", i) if i else problem.seed
        yield replace(problem, x=problem.x[piece], y=problem.y[piece], seed=seed)


def attacked(attack: Attack, problem: Problem) -> Tensor:
    """x_adv (B, C, H, W) of all images."""
    return torch.cat([problem.x[:0], *(attack(chunk) for chunk in chunks(problem))])


def fooled(attack: Attack, problem: Problem) -> Tensor:
    """(B,) bool: whom the attack makes the problem's model misclassify. Its images are not kept."""
    found = [_fooled(chunk, attack(chunk)) for chunk in chunks(problem)]
    return torch.cat([problem.y[:0].bool(), *found])


def _fooled(problem: Problem, x_adv: Tensor) -> Tensor:
    # An image with a value that is not a number is none, whatever the model makes of it.
    return x_adv.isfinite().flatten(1).all(1) & (predict(problem.model, x_adv) != problem.y)


def predicted(model: nn.Module, x: Tensor) -> Tensor:
    """Predicted class (B,) of x (B, C, H, W)."""
    found = [predict(model, x[piece]) for piece in slices(len(x))]
    return torch.cat([torch.zeros(0, dtype=torch.int64, device=x.device), *found])


def worst(model: nn.Module, x: Tensor, y: Tensor, candidates: Sequence[Tensor]) -> Tensor:
    """Per example the first candidate (B, C, H, W) that is misclassified, or the last one."""
    found = [worst_of(model, x[piece], y[piece], [one[piece] for one in candidates]) for piece in slices(len(y))]
    return torch.cat([x[:0], *found])
