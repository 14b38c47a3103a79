"""The ball of a threat, cut with the box [0, 1] of images: steepest ascent direction, projection, random start.

x, x_adv, g: (B, C, H, W). Whatever the dtype of x, no rounding takes a projected point out of the ball: linf bounds are
rounded inwards, and l2 below float32 rounds towards x; what is left is the rounding of eps and norms themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Projection = Callable[[Tensor], Tensor]
_TINY = 1e-30


def _norms(delta: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(delta.flatten(1), dim=1)
    return norms.reshape(-1, *[1] * (delta.dim() - 1))


def _rounded(bound: Tensor, dtype: torch.dtype, towards: float) -> Tensor:
    """`bound` in a narrower dtype, never on the far side of itself."""
    cast = bound.to(dtype)
    beyond = cast.to(bound.dtype) > bound if towards < 0 else cast.to(bound.dtype) < bound
    return torch.where(beyond, torch.nextafter(cast, torch.full_like(cast, towards)), cast)


def _linf_projection(x: Tensor, eps: float) -> Projection:
    wide = x.double() if x.dtype == torch.float32 else x.float() if x.dtype.itemsize < 4 else x
    lower = _rounded((wide - eps).clamp(min=0), x.dtype, torch.inf)
    upper = _rounded((wide + eps).clamp(max=1), x.dtype, -torch.inf)
    return lambda x_adv: torch.clamp(x_adv, lower, upper)


def _l2_projection(x: Tensor, eps: float) -> Projection:
    wide = x.float() if x.dtype.itemsize < 4 else x

    def project(x_adv: Tensor) -> Tensor:
        delta = x_adv - wide
        shrink = (eps / _norms(delta).clamp(min=_TINY)).clamp(max=1)
        exact = (wide + shrink * delta).clamp(0, 1)
        return exact if x.dtype == wide.dtype else _rounded_towards(exact, x)

    return project


def _rounded_towards(values: Tensor, x: Tensor) -> Tensor:
    """`values` in the dtype of x, rounded to the side of x, so that no rounding lengthens the way between them."""
    cast = values.to(x.dtype)
    longer = (cast.float() - x.float()).abs() > (values - x.float()).abs()
    return torch.where(longer, torch.nextafter(cast, x), cast)


def _linf_start(noise: Callable[[], Tensor], uniform: Callable[[], Tensor], eps: float) -> Tensor:
    del noise
    return (2 * uniform() - 1) * eps


def _l2_start(noise: Callable[[], Tensor], uniform: Callable[[], Tensor], eps: float) -> Tensor:
    """Uniform in the ball: a uniform direction, and a radius whose d-th power is uniform."""
    direction = noise()
    radius = uniform().flatten(1)[:, 0].reshape(-1, *[1] * (direction.dim() - 1))
    return eps * radius ** (1 / max(direction[0].numel(), 1)) * direction / _norms(direction).clamp(min=_TINY)


def _l2_ascent(g: Tensor) -> Tensor:
    """g / |g|, by way of its largest value: squares of a saturated network's gradients are no float32 numbers."""
    g = g / g.flatten(1).abs().amax(1).reshape(-1, *[1] * (g.dim() - 1)).clamp(min=_TINY)
    return g / _norms(g).clamp(min=_TINY)


@dataclass(frozen=True)
class Norm:
    """One norm: `ascent(g)` of unit norm, `projection(x, eps)`, and `start(noise, uniform, eps)` within the ball."""

    ascent: Callable[[Tensor], Tensor]
    projection: Callable[[Tensor, float], Projection]
    start: Callable[[Callable[[], Tensor], Callable[[], Tensor], float], Tensor]


NORMS: dict[str, Norm] = {
    "linf": Norm(torch.sign, _linf_projection, _linf_start),
    "l2": Norm(_l2_ascent, _l2_projection, _l2_start),
}
"""Norms of perturbations by name."""


def norm_named(name: str) -> Norm:
    """The entry of NORMS, or a ValueError that lists the known names."""
    if name not in NORMS:
        raise ValueError(f"unknown norm {name!r}; known: {', '.join(sorted(NORMS))}")
    return NORMS[name]
