"""Attacks without gradients that no library offers in this form: SPSA (scores) and RayS (decisions)."""

import torch
from torch import Tensor

from pipeline.evaluation.attacks import Problem, uniform_noise
from pipeline.evaluation.judged_model import predict
from pipeline.training.attacks import LOSSES, NORMS, default_step_size

_DELTA = 0.01  # distance of SPSA's two evaluations, in pixel units, as Uesato et al. have it


def spsa(problem: Problem, *, steps: int, num_samples: int) -> Tensor:
    """Ascent of the margin along simultaneous-perturbation estimates of its gradient (Uesato et al., 2018, 1802.05666).

    g = mean_j (f(x + d v_j) - f(x - d v_j)) / (2 d) v_j, v_j random signs. Costs 2 num_samples queries a step.

    Returns:
        x_adv (B, C, H, W) in the ball and in [0, 1].
    """
    generator, threat, margin = problem.generator(), problem.threat, LOSSES["margin"]
    step_size, norm = default_step_size(threat.eps, steps), NORMS[threat.norm]
    project = norm.projection(problem.x, threat.eps)
    x_adv = uniform_noise(problem.x, threat, generator)
    for _ in range(steps):
        g = torch.zeros_like(x_adv)
        for _ in range(num_samples):
            v = (torch.rand(x_adv.shape, generator=generator) < 0.5).to(x_adv) * 2 - 1
            with torch.no_grad():
                high, low = (margin(problem.model(x_adv + sign * _DELTA * v), problem.y) for sign in (1, -1))
            g += (high - low).view(-1, 1, 1, 1) * v
        x_adv = project(x_adv + step_size * norm.ascent(g))
    return x_adv


def rays(problem: Problem, *, num_flips: int) -> Tensor:
    """Decision-based search of the sign direction with the nearest boundary (Chen and Gu, 2020, arXiv 2006.12792).

    Ever smaller blocks of a sign vector are flipped; a flip stays where the boundary comes nearer. Instead of the exact
    distance a few radii and bisections are asked, that at eps first: it alone decides whether the attack succeeds.

    Returns:
        x_adv (B, C, H, W) in the ball and in [0, 1].
    """
    x = problem.x
    size = x[0].numel()
    signs = torch.ones(len(x), size, device=x.device)
    distance = _boundary(problem, signs, torch.full((len(x),), torch.inf, device=x.device))
    block, position, flips = size, 0, 0
    while flips < num_flips and bool((distance > 1).any()):
        flipped = signs.clone()
        flipped[:, position : position + block] *= -1
        nearer = _boundary(problem, flipped, distance)
        better = nearer < distance
        signs[better], distance[better] = flipped[better], nearer[better]
        flips, position = flips + 1, position + block
        if position >= size:
            block, position = max(1, block // 2), 0
    return _along(problem, signs, torch.ones_like(distance))


_RADII = (1.0, 2.0, 4.0, 8.0)
_BISECTIONS = 3


def _boundary(problem: Problem, signs: Tensor, best: Tensor) -> Tensor:
    """Multiple of eps at which each direction leaves the class; infinite where it does not, or not before `best`."""
    high, low = torch.full_like(best, torch.inf), torch.zeros_like(best)
    for radius in _RADII:
        todo = high.isinf() & (radius / 2 < best)
        if todo.any():
            wrong = predict(problem.model, _along(problem, signs, torch.full_like(best, radius))) != problem.y
            high = torch.where(todo & wrong, radius, high)
            low = torch.where(todo & ~wrong, radius, low)
    for _ in range(_BISECTIONS):
        middle = (high.nan_to_num(posinf=0) + low) / 2
        wrong = predict(problem.model, _along(problem, signs, middle)) != problem.y
        known = ~high.isinf()
        high, low = torch.where(known & wrong, middle, high), torch.where(known & ~wrong, middle, low)
    return high


def _along(problem: Problem, signs: Tensor, multiple: Tensor) -> Tensor:
    direction = NORMS[problem.threat.norm].ascent(signs.view_as(problem.x))
    return (problem.x + problem.threat.eps * multiple.view(-1, 1, 1, 1) * direction).clamp(0, 1)
