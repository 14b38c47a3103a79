"""Where in a network each call of an activation stands: its stage, and its block in it.

Stages follow the resolutions. A block is the innermost module that adds or concatenates maps in its own forward, or
one of a class that does so elsewhere: residual and inverted residual blocks, dense layers, Inception modules. It
belongs to the stage of its last call. A call in no such module is a block of its own, as in VGG.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

from torch import fx, nn

from sparta_models.calls import JOINS, Call, is_map


class Place(NamedTuple):
    """Where a site comes: its stage, its block in it, and its position in this."""

    stage: int
    block: int
    position: int


def places(calls: Sequence[Call]) -> list[Place]:
    """Give each call its place."""
    blocks = _blocks(calls)
    ends = {block: call.shape[2] for call, block in zip(calls, blocks, strict=True)}
    heights = [ends[block] for block in blocks]
    stem = _stem(blocks, heights)
    sizes = sorted(set(heights[stem:]), reverse=True)
    numbers: dict[int, dict[str | int, int]] = {}
    positions: Counter[str | int] = Counter()
    found = []
    for i, (block, height) in enumerate(zip(blocks, heights, strict=True)):
        stage = 0 if i < stem else sizes.index(height) + 1
        number = numbers.setdefault(stage, {}).setdefault(block, len(numbers[stage]))
        found.append(Place(stage, number, positions[block]))
        positions[block] += 1
    return found


def _blocks(calls: Sequence[Call]) -> list[str | int]:
    """The block of each call: a module, by its name in the stack of calls; or the call alone, by its number."""
    joining = _joining_classes(calls)
    inside = [next((name for name, kind in _around(call.node) if kind in joining), None) for call in calls]
    heights: dict[str | None, set[int]] = {}
    for call, block in zip(calls, inside, strict=True):
        heights.setdefault(block, set()).add(call.shape[2])
    # A network, or a half of one, whose own forward adds maps is no block.
    small = {block for block, seen in heights.items() if len(seen) <= 2 and inside.count(block) < len(calls)}
    return [i if block is None or block not in small else block for i, block in enumerate(inside)]


def _joining_classes(calls: Sequence[Call]) -> set[type]:
    """Classes of modules with calls in them, the traced one apart, that add or concatenate maps."""
    holders = {name for call in calls for name, _ in _around(call.node)}
    found: set[type] = set()
    for node in calls[0].node.graph.nodes:
        maps = [n for n in node.all_input_nodes if n.op != "get_attr" and is_map(n.meta["shape"])]
        if node.target in JOINS and len(maps) > 1:
            # The addition may be a module of its own, whose call is then its owner's act.
            owners = [
                kind for name, kind in _around(node)[:2] if name in holders and not issubclass(kind, nn.Sequential)
            ]
            found.update(owners[:1])
    return found


def _around(node: fx.Node) -> list[tuple[str, type]]:
    """Name and class of the modules around a node, from the inside out. A module's second call has another name."""
    return [(name, kind) for name, (_, kind) in reversed(node.meta.get("nn_module_stack", {}).items())]


def _stem(blocks: Sequence[str | int], heights: Sequence[int]) -> int:
    """Number of calls that are the stem: those before the first block at the first resolution; in a network without
    blocks a single call there."""
    leading = len(
        list(takewhile(lambda i: isinstance(blocks[i], int) and heights[i] == heights[0], range(len(blocks))))
    )
    if any(isinstance(block, str) for block in blocks):
        return leading
    return int(leading == 1 < len(blocks) and heights[0] > max(heights[1:]))
