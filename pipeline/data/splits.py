"""Which source images go into train, val and test: seeded, stratified by class, whole groups together."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.config.data import DataConfig, SplitLimits
from pipeline.data.errors import DataError
from pipeline.data.sources import Source, SourceSplit, class_numbers

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Selection:
    """A split: positions in a split of the source, in the source's order, and their labels in the kept classes."""

    origin: str
    """The source's split that the indices count in."""
    indices: Indices
    labels: Indices


def select(source: Source, config: DataConfig, seed: int) -> tuple[dict[str, Selection], tuple[str, ...]]:
    """Split, filter and limit a source.

    Returns:
        train, val and test, and the names of the kept classes.

    Raises:
        DataError: an unknown class, a class without training images, a limit below one image per class.
    """
    kept = list(range(len(source.class_names)))
    if config.classes is not None:
        kept = class_numbers(config.classes, source.class_names)
    names = tuple(source.class_names[n] for n in kept)
    chosen = {name: _filtered(name, split, kept, len(source.class_names)) for name, split in source.splits.items()}
    _require_every_class(chosen["train"], names, source.name)
    for number, (split, fraction) in enumerate((("test", config.test_fraction), ("val", config.val_fraction))):
        if split not in chosen:
            rng = np.random.default_rng([seed, number])
            chosen["train"], chosen[split] = _hold_out(chosen["train"], source.splits["train"], fraction, rng)
    for number, split in enumerate(("train", "val", "test")):
        chosen[split] = _limited(
            split, chosen[split], config.limit, len(names), np.random.default_rng([seed, 2, number])
        )
        if not len(chosen[split].indices):
            raise DataError(
                f"{source.name}: the {split} split would be empty (classes "
                f"{', '.join(names[:10])}); give it more images, or raise data.{split}_fraction"
            )
    _require_every_class(chosen["train"], names, source.name)
    return chosen, names


def _filtered(name: str, split: SourceSplit, kept: list[int], num_classes: int) -> Selection:
    relabel = np.full(num_classes, -1, dtype=np.int64)
    relabel[kept] = np.arange(len(kept))
    labels = relabel[split.labels]
    indices = np.flatnonzero(labels >= 0)
    return Selection(name, indices, labels[indices])


def _require_every_class(train: Selection, names: tuple[str, ...], source: str) -> None:
    counts = np.bincount(train.labels, minlength=len(names))
    empty = [names[n] for n in np.flatnonzero(counts == 0)]
    if empty:
        raise DataError(
            f"{source}: expected training images of every class, got none of {', '.join(empty[:10])}"
            f"{' ...' if len(empty) > 10 else ''}; add images, or leave the class out with data.classes"
        )


def _hold_out(
    train: Selection, origin: SourceSplit, fraction: float, rng: np.random.Generator
) -> tuple[Selection, Selection]:
    groups = train.indices if origin.groups is None else origin.groups[train.indices]
    held = _held_groups(train.labels, groups, fraction, rng)
    inside = np.isin(groups, held)
    return _part(train, ~inside), _part(train, inside)


def _held_groups(labels: Indices, groups: Indices, fraction: float, rng: np.random.Generator) -> Indices:
    """Groups worth about `fraction` of every class. An ungrouped image is a group of its own."""
    unique, first, sizes = np.unique(groups, return_index=True, return_counts=True)
    held: list[int] = []
    for label in np.unique(labels):
        # A group belongs to the class of its first image: nearly always the only one it has.
        mine = rng.permutation(np.flatnonzero(labels[first] == label))
        held.extend(unique[mine[: _num_held(sizes[mine], fraction)]])
    return np.array(held, dtype=np.int64)


def _num_held(sizes: Indices, fraction: float) -> int:
    """How many of the shuffled groups come closest to the share, at least one, and never all of them."""
    share = np.abs(np.cumsum(sizes) - fraction * sizes.sum())
    return min(int(np.argmin(share)) + 1, len(sizes) - 1) if len(sizes) else 0


def _limited(
    split: str, chosen: Selection, limits: SplitLimits, num_classes: int, rng: np.random.Generator
) -> Selection:
    limit: int | None = getattr(limits, split)
    if limit is None or limit >= len(chosen.indices):
        return chosen
    if limit < num_classes:
        raise DataError(f"data.limit.{split}={limit} is below the number of classes, {num_classes}; raise it")
    counts = np.bincount(chosen.labels, minlength=num_classes)
    kept = np.zeros(len(chosen.indices), dtype=bool)
    for label, quota in enumerate(_quotas(counts, limit)):
        kept[rng.permutation(np.flatnonzero(chosen.labels == label))[:quota]] = True
    return _part(chosen, kept)


def _quotas(counts: Indices, total: int) -> Indices:
    """Shares of `total` in proportion to `counts`, at least one where there is one (largest remainder)."""
    exact = counts * (total / counts.sum())
    quotas = np.maximum(np.floor(exact).astype(np.int64), counts > 0)
    while quotas.sum() < total:
        quotas[np.argmax(exact - quotas)] += 1
    while quotas.sum() > total:
        quotas[np.argmin(np.where(quotas > 1, exact - quotas, np.inf))] -= 1
    return np.asarray(quotas)


def _part(chosen: Selection, mask: npt.NDArray[np.bool_]) -> Selection:
    return Selection(chosen.origin, chosen.indices[mask], chosen.labels[mask])
