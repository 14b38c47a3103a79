"""Where images come from: every source becomes a `Source`, whose images are read one at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.config.data import DataConfig
from pipeline.data.errors import DataError

BAD_IMAGES = "bad_images.txt"
"""Names the files that were left out, beside the prepared data."""


class ImageSequence(Protocol):
    """Images by position: uint8 arrays (H, W) or (H, W, C), or PIL images. Picklable, for the writer process."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@dataclass(frozen=True)
class SourceSplit:
    """The images of one split of a source, with labels (N,) in [0, classes) and, where known, groups (N,)."""

    images: ImageSequence
    labels: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Source:
    """A data set before splitting; `splits` holds train and, where the source has them, val and test."""

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, SourceSplit]
    size: int | None
    """Side of the images, None where they differ."""
    channels: int
    bad_images: tuple[str, ...] = ()
    """Files left out because they do not decode, each with the reason."""


def open_source(config: DataConfig) -> Source:
    """The source that `config.dataset` names.

    Raises:
        DataError: a file is missing or malformed, labels are out of range, or a download failed.
    """
    if config.dataset == "digits":
        return _digits()
    if config.dataset == "npz":
        from pipeline.data.npz import npz_source

        return npz_source(config)
    if config.dataset == "folder":
        from pipeline.data.folder import folder_source

        return folder_source(config)
    from pipeline.data.vision import vision_source

    return vision_source(config)


def _digits() -> Source:
    """Scikit-learn's 1,797 handwritten digits, 8 x 8, grey levels 0 to 16 stretched to 0 to 255."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = np.rint(raw.images * (255 / 16)).astype(np.uint8)
    split = SourceSplit(images, raw.target.astype(np.int64))
    return Source("digits", tuple(str(n) for n in range(10)), {"train": split}, size=8, channels=1)


def checked_labels(labels: npt.NDArray[Any], num_classes: int, what: str) -> npt.NDArray[np.int64]:
    """Labels (N,) as int64, or an error that names the first one out of range."""
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{what}: expected integer labels of shape (N,), got {labels.dtype} of shape {labels.shape}")
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise DataError(
            f"{what}: expected labels from 0 to {num_classes - 1}, got {labels[wrong[0]]} at position {wrong[0]} "
            f"({len(wrong)} such labels); correct the labels or class_names"
        )
    return labels.astype(np.int64)


def class_numbers(wanted: Sequence[int | str], names: Sequence[str]) -> list[int]:
    """The class numbers that `data.classes` means, given as numbers or names.

    Raises:
        DataError: an unknown class, one that is meant twice, or a number that also reads as another class's name.
    """
    numbers = []
    for item in wanted:
        if isinstance(item, str) and item in names:
            numbers.append(list(names).index(item))
        elif isinstance(item, int) and 0 <= item < len(names):
            _refuse_a_name(item, names)
            numbers.append(item)
        else:
            shown = ", ".join(names[:20]) + (" ..." if len(names) > 20 else "")
            raise DataError(
                f"data.classes: expected class numbers from 0 to {len(names) - 1} or names, "
                f"got {item!r}; known: {shown}"
            )
    if len(set(numbers)) < len(numbers):
        raise DataError(f"data.classes names a class twice: {list(wanted)}")
    return numbers


def _refuse_a_name(number: int, names: Sequence[str]) -> None:
    """Folders named by numbers stand in the order of their names as text: 10 before 2."""
    meant = [name for name in names if name.isdecimal() and int(name) == number]
    if meant and names[number] not in meant:
        raise DataError(
            f"data.classes: {number} is the number of class {names[number]!r}, but reads as the name {meant[0]!r} too; "
            "give the names of the classes, in quotes"
        )
