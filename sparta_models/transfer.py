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
    residual addition gets the function of such a site. Where one of two stages has no block of several sites, as in
    VGG, its sites correspond by relative depth in the stage.
    """
    return {site.name: _nearest(site, target, source) for site in target}


def _nearest(site: SiteInfo, target: Sequence[SiteInfo], source: Sequence[SiteInfo]) -> SiteInfo:
    stage = _stage(site.stage, _stages(target), _stages(source))
    own, theirs = (
        sorted((s for s in infos if s.stage == number), key=lambda s: s.depth)
        for infos, number in ((target, site.stage), (source, stage))
    )
    own_blocks, their_blocks = _blocks(own), _blocks(theirs)
    if len(own) > 1 and (len(own_blocks) == len(own) or len(their_blocks) == len(theirs)):
        return theirs[_relative(own.index(site), len(own) - 1, len(theirs) - 1, alone=0)]
    number = list(own_blocks).index(site.block)
    chosen = list(their_blocks.values())[_relative(number, len(own_blocks) - 1, len(their_blocks) - 1, alone=0)]
    mates, last = own_blocks[site.block], len(chosen) - 1
    return chosen[_relative(mates.index(site), len(mates) - 1, last, alone=last)]


def _blocks(infos: Sequence[SiteInfo]) -> dict[int, list[SiteInfo]]:
    blocks: dict[int, list[SiteInfo]] = {}
    for info in infos:
        blocks.setdefault(info.block, []).append(info)
    return blocks


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
"""Rules for another width. mean: every channel gets the function of the mean parameters; interpolate: linear in the
channel's relative number."""


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
