"""Projected gradient ascent (Madry et al., arXiv 1706.06083) and its one-step case, the fast gradient sign method.

x_0 = start in the ball; x_{k+1} = project(x_k + a_k ascent(grad_x objective(model(x_k)))), k = 0 .. K - 1.
Cost: 2 K forwards' worth (gradient to the input alone), + 1 for the clean logits of "kl", + 2 K + 1 per restart.
The caller's model comes back as it was: parameters' gradients, requires_grad, modes, running statistics, random state.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.training.attacks.geometry import Norm, Projection, norm_named
from pipeline.training.attacks.losses import Objective, objective

Model = Callable[[Tensor], Tensor]
Start = bool | Literal["uniform", "normal"]
_NORMAL_START = 1e-3  # standard deviation of the start of TRADES

STEP_RULES: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),
}
"""Factor of the step length, given the share k / K of the steps already done."""


def default_step_size(eps: float, steps: int) -> float:
    """2.5 eps / steps, so that the far side of the ball is in reach (Madry et al., 2018)."""
    return 2.5 * eps / steps


@contextmanager
def attack_mode(model: Model, bn: str = "eval") -> Iterator[None]:
    """All modules in eval mode; bn="train" leaves batch norms in the caller's mode, but without moving statistics."""
    if bn not in ("eval", "train"):
        raise ValueError(f'expected bn="eval" or "train", got {bn!r}')
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    norms = [m for m in modules if isinstance(m, _BatchNorm) and m.training] if bn == "train" else []
    kept = set(map(id, norms))
    silenced = [m for m in modules if m.training and id(m) not in kept]
    tracked = [m for m in norms if m.track_running_stats]
    try:
        for module in silenced:
            module.training = False
        for norm in tracked:
            norm.track_running_stats = False
        yield
    finally:
        for module in silenced:
            module.training = True
        for norm in tracked:
            norm.track_running_stats = True


def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    norm: str = "linf",
    loss: str = "ce",
    random_start: Start = True,
    restarts: int = 1,
    generator: torch.Generator | None = None,
    targets: Tensor | None = None,
    step_rule: str = "constant",
    bn: str = "eval",
) -> Tensor:
    """Adversarial images x_adv (B, C, H, W) with |x_adv - x| <= eps in `norm` and values in [0, 1].

    model: images -> logits (B, C), nowhere in it a DistributedDataParallel wrapper. x: floating, in [0, 1]; y: (B,)
    labels or, for "ce" and "kl", (B, C) probabilities. eps, step_size in pixel units. loss: ce, margin, dlr, kl.
    random_start: False, True or "uniform" (in the ball), "normal" (0.001 N(0, 1)). restarts: the worst of every example
    is kept. targets: (B,) classes to reach. step_rule: a name in STEP_RULES. Without a generator a copy of the global
    one draws. A GPU is never waited for.
    Raises ValueError for values out of range and unknown names.
    """
    _check(model, x, y, eps=eps, step_size=step_size, steps=steps, restarts=restarts, step_rule=step_rule)
    if loss == "kl" and random_start is False:
        raise ValueError('loss="kl" has no gradient at the image itself; use random_start="normal" or "uniform"')
    geometry, x = norm_named(norm), x.detach()
    project = geometry.projection(x, eps)
    draw = generator or _copy_of_global(x.device)
    rule = STEP_RULES[step_rule]
    lengths = [step_size * rule(k / steps) for k in range(steps)]
    with attack_mode(model, bn), torch.enable_grad():
        reference = _logits(model, x) if loss == "kl" else None
        goal = objective(loss, y, targets=targets, reference=reference)

        def run() -> Tensor:
            start = x if random_start is False else project(x + _start(geometry, x, eps, random_start, draw))
            return _ascend(model, start, goal, lengths, ascent=geometry.ascent, project=project)

        best = run()
        if restarts > 1:
            worst = _Worst(y if targets is None else targets, targeted=targets is not None)
            worst.update(best, _logits(model, best), goal)
            for _ in range(restarts - 1):
                x_adv = run()
                worst.update(x_adv, _logits(model, x_adv), goal)
            best = worst.x
        return best


def fgsm(
    model: Model, x: Tensor, y: Tensor, *, eps: float, norm: str = "linf", loss: str = "ce", bn: str = "eval"
) -> Tensor:
    """One step of length eps from x itself (Goodfellow et al., arXiv 1412.6572); arguments as `pgd`."""
    return pgd(model, x, y, eps=eps, step_size=eps, steps=1, norm=norm, loss=loss, random_start=False, bn=bn)


def _ascend(
    model: Model, x: Tensor, goal: Objective, lengths: list[float], *, ascent: Projection, project: Projection
) -> Tensor:
    x_adv = x
    for length in lengths:
        x_adv = x_adv.detach().requires_grad_()
        (g,) = torch.autograd.grad(goal(model(x_adv)).sum(), x_adv)
        x_adv = project(x_adv.detach() + length * ascent(g))
    return x_adv.detach()


class _Worst:
    """Per example, the successful result if there is one, and among equals the one of larger objective."""

    def __init__(self, y: Tensor, *, targeted: bool) -> None:
        self.y, self.targeted = y if y.dim() == 1 else y.argmax(1), targeted
        self.x = torch.empty(0)

    def update(self, x: Tensor, z: Tensor, goal: Objective) -> None:
        reached = z.argmax(1) == self.y
        won, value = (reached if self.targeted else ~reached), goal(z)
        if not self.x.numel():
            self.x, self.won, self.value = x, won, value
            return
        better = (won & ~self.won) | ((won == self.won) & (value > self.value))
        self.x = torch.where(better.reshape(-1, *[1] * (x.dim() - 1)), x, self.x)
        self.won, self.value = torch.where(better, won, self.won), torch.where(better, value, self.value)


def _logits(model: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def _start(geometry: Norm, x: Tensor, eps: float, kind: Start, generator: torch.Generator) -> Tensor:
    dtype = x.dtype if x.dtype.itemsize >= 4 else torch.float32

    def noise() -> Tensor:
        return torch.randn(x.shape, generator=generator, device=generator.device, dtype=dtype).to(x.device)

    def uniform() -> Tensor:
        return torch.rand(x.shape, generator=generator, device=generator.device, dtype=dtype).to(x.device)

    delta = _NORMAL_START * noise() if kind == "normal" else geometry.start(noise, uniform, eps)
    return delta.to(x.dtype)


def _copy_of_global(device: torch.device) -> torch.Generator:
    """A generator in the state of the global one, so that torch.manual_seed governs and the global one stays put."""
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return torch.Generator(device if device.type == "cuda" else "cpu").set_state(state)


def _check(
    model: Model, x: Tensor, y: Tensor, *, eps: float, step_size: float, steps: int, restarts: int, step_rule: str
) -> None:
    modules = model.modules() if isinstance(model, nn.Module) else ()
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in modules):
        raise ValueError("expected the bare module, got a DistributedDataParallel wrapper; pass its .module")
    if not x.is_floating_point():
        raise ValueError(f"expected floating images in [0, 1], got {x.dtype}; divide by 255 first")
    if len(x) != len(y):
        raise ValueError(f"expected as many labels as images, got {len(y)} labels for {len(x)} images")
    if eps < 0 or step_size < 0 or steps < 0 or restarts < 1:
        raise ValueError(
            f"expected eps, step_size, steps >= 0 and restarts >= 1, got {eps=}, {step_size=}, {steps=}, {restarts=}"
        )
    if step_rule not in STEP_RULES:
        raise ValueError(f"unknown step rule {step_rule!r}; known: {', '.join(sorted(STEP_RULES))}")
