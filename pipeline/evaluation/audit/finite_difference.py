"""12: autograd tells the truth: directional derivatives against central differences in float64.

For each of some images the derivative of a random combination of the logits, along random directions and along the
gradient; gradcheck's fast mode makes the same comparison.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.evaluation.audit.subject import FLOAT32_ONLY, Subject
from pipeline.evaluation.audit.verdict import judged, skipped
from pipeline.evaluation.records import Check

WARN, FAIL = 0.05, 0.2
STEP = 1e-6
"""Half the distance of the two evaluations, in pixel units: far above rounding, far below a kink's spacing."""
ROUNDING = 1e-14
"""Of a forward pass in float64, relative to what it returns."""
TOLERANCE = 1e-2
"""Largest relative error; a kink of a piecewise linear network inside the step is worse, but rare."""
OFFSET = 1e-3
"""How far from the images it looks, at most, in pixel units: a flat area of an image lies exactly on kinks of an honest
network (a tie of a max pool, a ReLU behind a convolution without bias), where autograd takes one side and a difference
the mean of both."""
_DIRECTIONS = 4


def check(subject: Subject) -> Check:
    """Figure: share of directional derivatives that are wrong."""
    x = subject.x[: subject.effort.num_probed].double()
    if not len(x):
        return skipped(12, "finite_difference", "no image is classified correctly")
    generator = subject.problem("finite difference").generator()
    x = x + OFFSET * (2 * torch.rand(x.shape, generator=generator).to(x) - 1)
    try:
        wrong, derivatives = _compare(subject, x, generator)
    except FLOAT32_ONLY as error:
        return skipped(12, "finite_difference", f"the model does not run in float64: {type(error).__name__}: {error}")
    share = float(wrong.float().mean())
    if share > WARN and _lowers(subject.double, x[:1]):
        return skipped(12, "finite_difference", "parts of the model run in float32 where it is asked to in float64")
    return judged(
        12, "finite_difference", share, warn=WARN, fail=FAIL,
        summary=f"{int(wrong.sum())} of {wrong.numel()} directional derivatives differ from finite differences by more "
        f"than {TOLERANCE:.0%}",
        details={"median size of a derivative": float(derivatives.abs().median())},
    )  # fmt: skip


def _compare(subject: Subject, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(directions, B): which derivatives are wrong, and the finite differences."""
    model, wrong, derivatives = subject.double, [], []
    with torch.no_grad():
        mix = torch.randn(model(x[:1]).shape[1], generator=generator).to(x)
    inner = x.detach().requires_grad_()
    values = model(inner) @ mix
    g = torch.autograd.grad(values.sum(), inner, allow_unused=True)[0] if values.requires_grad else None
    g = torch.zeros_like(x) if g is None else g
    along_g = g / g.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, 1, 1, 1)
    rounding = ROUNDING * (1 + values.detach().abs()) / STEP
    draws = [torch.randn(x.shape, generator=generator).to(x) for _ in range(_DIRECTIONS)]
    for v in [along_g, *(v / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for v in draws)]:
        with torch.no_grad():
            exact = (model(x + STEP * v) - model(x - STEP * v)) @ mix / (2 * STEP)
        ours = (g * v).flatten(1).sum(1)
        scale = torch.maximum(exact.abs(), ours.abs())
        wrong.append(~((exact - ours).abs() <= TOLERANCE * scale + rounding))  # what is not a number is wrong too
        derivatives.append(exact)
    return torch.stack(wrong), torch.stack(derivatives)


class _Dtypes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether an operation comes to floats of less than 64 bits."""

    lower = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        floats = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()]
        self.lower |= any(t.dtype != torch.float64 for t in floats)
        return result


def _lowers(model: nn.Module, x: Tensor) -> bool:
    """Whether a network in float64 rounds to less on its way, as a softmax in float32 does."""
    seen = _Dtypes()  # type: ignore[no-untyped-call]
    with torch.no_grad(), seen:
        model(x)
    return bool(seen.lower)
