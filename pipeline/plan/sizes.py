"""How large a data set will be, from its settings alone or, where it is prepared, from its record."""

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.config.data import DataConfig
from pipeline.config.plan import PlanConfig
from pipeline.data import DataError, PreparedData, wants_jpeg
from pipeline.data.errors import UNREADABLE_NPZ
from pipeline.data.paths import as_url, resolve_path
from pipeline.data.vision import VISION_SETS

_FOLDER_SIDE = 224
_JPEG_BYTES_PER_PIXEL = 0.4  # of a photograph at quality 90; measured for no data set in particular


class DataSize(NamedTuple):
    """Images per split, and what each of them is."""

    train: int
    val: int
    test: int
    side: int
    channels: int
    num_classes: int
    bytes_per_image: float

    @property
    def num_bytes(self) -> float:
        """Of all splits on disk, an 8-byte label per image included."""
        return (self.train + self.val + self.test) * (self.bytes_per_image + 8)


class _Origin(NamedTuple):
    train: int
    test: int
    side: int
    channels: int
    num_classes: int


# Test 0: held out of the training images.
_KNOWN = {"digits": _Origin(1_797, 0, 8, 1, 10)} | {
    name: _Origin(known.train, known.test, known.side, known.channels, known.num_classes)
    for name, known in VISION_SETS.items()
}


def prepared_size(prepared: PreparedData) -> DataSize:
    """The size that prepared data have."""
    counts = {name: split.count for name, split in prepared.splits.items()}
    stored = sum(prepared.path(name).stat().st_size for name in prepared.splits if prepared.path(name).is_file())
    return DataSize(
        counts["train"],
        counts["val"],
        counts["test"],
        prepared.image_size,
        prepared.channels,
        prepared.num_classes,
        stored / sum(counts.values()),
    )


def expected_size(config: DataConfig, plan: PlanConfig) -> DataSize | None:
    """The size that data will have when they are prepared, limits and classes considered; None when nobody can know."""
    origin = _KNOWN.get(config.dataset) or (_npz(config) if config.dataset == "npz" else None)
    if plan.num_images is not None and config.dataset in ("npz", "folder"):
        origin = (origin or _Origin(0, 0, config.image_size or _FOLDER_SIDE, 3, plan.num_classes or 2))._replace(
            train=plan.num_images, test=plan.num_test_images or 0
        )
    if origin is None:
        return None
    num_classes = len(config.classes) if config.classes else plan.num_classes or origin.num_classes
    share = num_classes / origin.num_classes if config.classes else 1.0
    train, test = origin.train * share, origin.test * share
    if not origin.test:
        test = train * config.test_fraction
        train -= test
    val = train * config.val_fraction
    side, channels = config.image_size or origin.side, config.channels or origin.channels
    jpeg = wants_jpeg(config, side, channels)
    stored = config.max_side**2 * _JPEG_BYTES_PER_PIXEL if jpeg else side**2 * channels
    limit = config.limit
    return DataSize(
        _limited(train - val, limit.train),
        _limited(val, limit.val),
        _limited(test, limit.test),
        side,
        channels,
        num_classes,
        stored,
    )


def _limited(count: float, limit: int | None) -> int:
    return round(count) if limit is None else min(round(count), limit)


def _npz(config: DataConfig) -> _Origin | None:
    """Shapes from the headers of an .npz on this machine; its images are not read."""
    if as_url(config.path or ""):
        return None
    try:
        path = resolve_path(config.path or "", "data.path")
        train, test = _shape(path, "train_images"), _shape(path, "test_images")
        with np.load(path, allow_pickle=False) as arrays:
            num_classes = int(arrays["train_labels"].max()) + 1
        return _Origin(train[0], test[0], train[1], train[3] if len(train) == 4 else 1, num_classes)
    except (DataError, TypeError, IndexError, *UNREADABLE_NPZ):
        return None


def _shape(path: Path, name: str) -> tuple[int, ...]:
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return tuple(read(file)[0])
