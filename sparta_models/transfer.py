"""Where a bank's functions go in another network, and how they are fitted to another width."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from torch.nn import functional as F

from sparta_models.sites import SiteInfo


def match(target: Sequence[SiteInfo], source: Sequence[SiteInfo]) -> dict[str, SiteInfo]:
    """Give every target site the source site that corresponds: stage to stage, and inside a stage by relative depth.

    Stages >= 1 correspond by relative number (3 stages against 4: first to first, last to last); a stem goes to a
    stem, or, where the source has none, to the first stage. Blocks correspond by relative depth in their stage (a lone
    block to the first), sites by relative position in their block (a lone site to the last), so that the site behind a
    residual addition gets the function of such a site.
    """
    return {site.name: _nearest(site, target, source) for site in target}


def _nearest(site: SiteInfo, target: Sequence[SiteInfo], source: Sequence[SiteInfo]) -> SiteInfo:
    stage = _stage(site.stage, _stages(target), _stages(source))
    candidates = [s for s in source if s.stage == stage]
    own = [s for s in target if s.stage == site.stage]
    block = _relative(site.block, max(s.block for s in own), max(s.block for s in candidates), alone=0)
    candidates = [s for s in candidates if s.block == block]
    own = [s for s in own if s.block == site.block]
    last = len(candidates) - 1
    position = _relative(site.position, len(own) - 1, last, alone=last)
    return candidates[position]


def _stages(infos: Sequence[SiteInfo]) -> list[int]:
    return sorted({s.stage for s in infos})


def _stage(stage: int, target: Sequence[int], source: Sequence[int]) -> int:
    if stage == 0 and 0 in source:
        return 0
    bodies = [[s for s in stages if s > 0] or list(stages) for stages in (target, source)]
    if stage not in bodies[0]:
        return bodies[1][0]
    return bodies[1][_relative(bodies[0].index(stage), len(bodies[0]) - 1, len(bodies[1]) - 1, alone=0)]


def _relative(index: int, last: int, other_last: int, *, alone: int) -> int:
    """Index in 0 .. other_last at the same relative depth as index in 0 .. last; `alone` where last is 0."""
    if last == 0:
        return alone
    # Halves round down, in integers, so that no platform decides differently.
    return (2 * index * other_last + last - 1) // (2 * last)


def _mean(tensor: Tensor, width: int) -> Tensor:
    return tensor.mean(dim=0, keepdim=True).expand(width, *tensor.shape[1:]).contiguous()


def _interpolate(tensor: Tensor, width: int) -> Tensor:
    lines = tensor.reshape(1, tensor.shape[0], -1).movedim(1, 2)  # (1, rest, C)
    out = F.interpolate(lines, size=width, mode="linear", align_corners=True)
    return out.movedim(2, 1).reshape(width, *tensor.shape[1:]).contiguous()


ADAPT: dict[str, Callable[[Tensor, int], Tensor]] = {"mean": _mean, "interpolate": _interpolate}
"""Rules for another width. mean: every channel gets the mean function; interpolate: linear in the channel's relative
number."""


def adapt_tensors(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: SiteInfo, target: SiteInfo, rule: str | None
) -> dict[str, Tensor]:
    """Fit a function's tensors to the shapes of another width.

    Raises:
        ValueError: for an unknown rule, shapes that differ when there is no rule, and functions that mix channels,
            which no rule fits to another width.
    """
    if rule is not None and rule not in ADAPT:
        raise ValueError(f"unknown adapt rule {rule!r}; known: {', '.join(sorted(ADAPT))}")
    fitted = {}
    for name, tensor in tensors.items():
        shape = wanted[name].shape
        others = [dim for dim, width in enumerate(shape) if tensor.shape[dim] != width]
        if others and rule is None:
            raise ValueError(
                f"expected {target.channels} channels at site {target.name!r}, got a function for {source.channels} "
                f"channels (site {source.name!r} of the bank); pass adapt= one of {', '.join(sorted(ADAPT))}"
            )
        if others and (others != [0] or tensor.shape[0] != source.channels):
            raise ValueError(
                f"expected a function of each channel by itself for the rule {rule!r}, got one that mixes the channels "
                f"({name!r} of shape {tuple(tensor.shape)}); train the target with {source.channels} channels at "
                f"site {target.name!r}"
            )
        fitted[name] = tensor if not others else ADAPT[str(rule)](tensor, shape[0])
    return fitted
