"""Getting at a model's gates: y = base + value * sigmoid(g) at every Sparta site, to look at and to replace.

For most variants base = 0 and value = x; for the smooth maximum base is the spatial condition T, value = x - T and
g = sharpness * (x - T). All maps are (B, C, H, W) or broadcast to it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparta_models import Sparta


class Parts(NamedTuple):
    """One gated site at one call."""

    base: Tensor
    value: Tensor
    g: Tensor


Rule = Callable[[int, Parts], Tensor]
"""(number of the call in this forward pass, parts) -> what the site returns instead."""


def gated_sites(model: nn.Module) -> dict[str, Sparta]:
    """Every Sparta module of `model` by its name; empty for models without gates."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Sparta)}


def parts(site: Sparta, x: Tensor) -> Parts:
    """The parts of one site's output for its input x (B, C, H, W)."""
    if site.variant == "smoothmax":
        T = site.gate(x)
        value = x - T
        return Parts(T, value, site.gate.sharpness.to(value.dtype) * value)
    return Parts(torch.zeros_like(x), x, site.gate(x))


@contextmanager
def gates_replaced(model: nn.Module, rule: Rule) -> Iterator[None]:
    """While inside, every gated site returns rule(call, parts). A shared module is called once per site."""
    calls = 0

    def start(*_: object) -> None:
        nonlocal calls
        calls = 0

    def replace(site: nn.Module, args: tuple[Tensor], _: Tensor) -> Tensor:
        nonlocal calls
        assert isinstance(site, Sparta)
        calls += 1
        return rule(calls - 1, parts(site, args[0]))

    handles = [model.register_forward_pre_hook(start)]
    handles += [site.register_forward_hook(replace) for site in gated_sites(model).values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gate_maps(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits of x and the gates sigmoid(g) of every call in order; gradients flow where they are enabled."""
    maps: list[Tensor] = []

    def record(_: int, found: Parts) -> Tensor:
        maps.append(torch.sigmoid(found.g))
        return found.base + found.value * maps[-1]

    with gates_replaced(model, record):
        logits: Tensor = model(x)
    return logits, maps
