"""What the activations of a trained network do: gate maps of images, and responses to a change of one pixel.

Every activation is read as a gate, so that they can be compared. Sparta has one: phi in y = T + (x - T) phi, or in
y = x phi. For all others phi = y / x; for ReLU that is 1[x > 0].
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.evaluation.audit.gates import parts
from sparta_models import Activation, SiteInfo, Sparta, sites

Array = npt.NDArray[np.float32]

SURROUNDINGS = (-2.0, 0.0, 2.0)
_NEXT_TO_ZERO = 1e-3
_PATCH = 15
_POINTS = 81


class Response(NamedTuple):
    """Output at one position against the input there, for several values of all its neighbours, in one channel."""

    stage: int
    channel: int
    """The one that its neighbours sway most."""
    num_channels: int
    x: Array  # (P,)
    y: dict[float, Array]  # surroundings -> (P,)


def last_sites(model: nn.Module) -> list[SiteInfo]:
    """The last site of every resolution stage."""
    return list({info.stage: info for info in sites(model)}.values())


@torch.no_grad()
def gate_maps(model: nn.Module, x: Tensor) -> dict[int, Array]:
    """The gate of the last site of every stage, averaged over channels.

    Args:
        model: a network with sites, in eval mode.
        x: (B, C, H, W) images in [0, 1].

    Returns:
        stage -> (B, h, w) in [0, 1]. Where y / x is taken, inputs next to 0, where it means nothing, count as slightly
        positive.
    """
    maps = {}
    for info, inner in _inputs(model, x):
        gate = _gate(model.get_submodule(info.name), inner)
        maps[info.stage] = gate.mean(dim=1).clamp(0, 1).float().cpu().numpy()
    return maps


def _gate(site: nn.Module, x: Tensor) -> Tensor:
    """phi, (B, C, H, W)."""
    if isinstance(site.function, Sparta):
        return torch.sigmoid(parts(site.function, x).g)
    off_zero = torch.where(x.abs() < _NEXT_TO_ZERO, torch.full_like(x, _NEXT_TO_ZERO), x)
    gate: Tensor = site(off_zero) / off_zero
    return gate


def responses(model: nn.Module, x: Tensor) -> list[Response]:
    """How the last site of every stage answers to one position, given what surrounds it.

    Args:
        model: a network with sites, in eval mode.
        x: (1, C, H, W) an image, which only tells the sizes of the sites' inputs.
    """
    return [_response(model.get_submodule(info.name), info.stage, inner) for info, inner in _inputs(model, x)]


@torch.no_grad()
def _response(site: nn.Module, stage: int, like: Tensor) -> Response:
    function = site.function
    assert isinstance(function, Activation)
    # Only an activation with parameters per position needs its own size; a patch will do for the others.
    bound = function.cell == ("varying", "independent")
    height, width = like.shape[2:] if bound else (_PATCH, _PATCH)
    values = torch.linspace(-4, 4, _POINTS, dtype=like.dtype, device=like.device)
    curves = {}
    for around in SURROUNDINGS:
        patch = torch.full((_POINTS, like.shape[1], height, width), around, dtype=like.dtype, device=like.device)
        patch[:, :, height // 2, width // 2] = values[:, None]
        curves[around] = site(patch)[:, :, height // 2, width // 2].float()  # (P, C)
    sway = (curves[SURROUNDINGS[-1]] - curves[SURROUNDINGS[0]]).abs().amax(dim=0)
    channel = int(sway.argmax())
    chosen = {around: y[:, channel].cpu().numpy() for around, y in curves.items()}
    return Response(stage, channel, len(sway), values.float().cpu().numpy(), chosen)


@torch.no_grad()
def _inputs(model: nn.Module, x: Tensor) -> list[tuple[SiteInfo, Tensor]]:
    """What comes into the last site of every stage."""
    seen: dict[str, Tensor] = {}
    infos = last_sites(model)
    hooks = []
    for info in infos:

        def keep(_: nn.Module, args: tuple[Tensor, ...], name: str = info.name) -> None:
            seen[name] = args[0].clone()

        hooks.append(model.get_submodule(info.name).register_forward_pre_hook(keep))
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return [(info, seen[info.name]) for info in infos]
