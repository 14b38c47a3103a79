"""A data set in one .npz file, local or behind an fsspec URL, opened without holding the images in memory."""

import mmap
import shutil
import tempfile
import weakref
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.config.base import one_line
from pipeline.config.data import DataConfig
from pipeline.data.errors import UNREADABLE_NPZ, DataError
from pipeline.data.paths import resolve_path
from pipeline.data.sources import Source, SourceSplit, checked_labels

_MAX_CLASSES = 100_000
_MAPPED = 32 << 20
"""Pages are given back after so many bytes: the page cache keeps them, and resident memory does not grow."""
_LAYOUT = "train_images uint8 (N, H, W) or (N, H, W, 3), train_labels (N,), test_images, test_labels"


class _TemporaryFolder:
    """A folder that goes when nothing refers to it any more."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="npz-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


class MappedImages:
    """Images of an .npz entry, unpacked beside it and mapped, so that any size is read in constant memory."""

    def __init__(self, path: Path, folder: "_TemporaryFolder") -> None:
        self._path, self._folder = path, folder
        self._array, self._unreturned = np.load(path, mmap_mode="r"), 0
        self.shape, self.dtype = self._array.shape, self._array.dtype

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, index: int) -> npt.NDArray[np.uint8]:
        image = np.array(self._array[index])
        self._unreturned += image.nbytes
        if self._unreturned > _MAPPED:
            self._unreturned = 0
            self._array._mmap.madvise(mmap.MADV_DONTNEED)
        return image

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "shape": self.shape, "dtype": self.dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._array, self._unreturned = np.load(self._path, mmap_mode="r"), 0


def npz_source(config: DataConfig) -> Source:
    """The arrays of `config.path`: see `docs/data.md` for the names.

    Raises:
        DataError: no such file, not an npz, a missing or misshapen array, labels out of range.
    """
    assert config.path is not None
    path = resolve_path(config.path, "data.path")
    folder = _TemporaryFolder()
    try:
        arrays = {name: _unpack(path, name, folder.path) for name in _names(path)}
    except DataError:
        raise
    except UNREADABLE_NPZ as error:
        raise DataError(
            f"{path}: expected an .npz file with {_LAYOUT}; it cannot be read ({one_line(error)})"
        ) from error
    _check(path, arrays)
    labels = {split: np.asarray(np.load(arrays[f"{split}_labels"])) for split in ("train", "test")}
    if "class_names" in arrays:
        names = tuple(str(n) for n in np.load(arrays["class_names"]).tolist())
    else:
        names = _numbered(path, labels["train"])
    splits = {}
    for split, values in labels.items():
        images = MappedImages(arrays[f"{split}_images"], folder)
        groups = np.load(arrays["train_groups"]) if split == "train" and "train_groups" in arrays else None
        checked = checked_labels(values, len(names), f"{path}: {split}_labels")
        splits[split] = SourceSplit(images, checked, None if groups is None else _group_numbers(groups))
    shape = splits["train"].images.shape  # type: ignore[attr-defined]
    size = int(shape[1]) if shape[1] == shape[2] else None
    return Source(path.stem, names, splits, size=size, channels=shape[3] if len(shape) == 4 else 1)


def _numbered(path: Path, labels: npt.NDArray[Any]) -> tuple[str, ...]:
    """Names for classes that have none: 0 to the highest training label."""
    highest = int(labels.max()) if np.issubdtype(labels.dtype, np.integer) else 0
    if highest >= _MAX_CLASSES:
        raise DataError(f"{path}: train_labels go up to {highest}; expected fewer than {_MAX_CLASSES} classes")
    return tuple(str(n) for n in range(highest + 1))


def _group_numbers(groups: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    return np.unique(groups, return_inverse=True)[1].astype(np.int64)


def _names(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    if strange := [name for name in names if not name.isidentifier()]:  # "../x" would leave the folder
        raise DataError(f"{path}: expected an .npz file with {_LAYOUT}; got an entry called {strange[0]!r}")
    return names


def _unpack(path: Path, name: str, folder: Path) -> Path:
    target = folder / f"{name}.npy"
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as packed, target.open("wb") as out:
        shutil.copyfileobj(packed, out, 1 << 20)
    return target


def _check(path: Path, arrays: dict[str, Path]) -> None:
    required = ["train_images", "train_labels", "test_images", "test_labels"]
    missing = [name for name in required if name not in arrays]
    if missing:
        raise DataError(
            f"{path}: expected {_LAYOUT}; {', '.join(missing)} missing; "
            f"it holds {', '.join(sorted(arrays)) or 'nothing'}"
        )
    shapes = {}
    for name, place in arrays.items():
        try:
            array = np.load(place, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise DataError(f"{path}: {name} is not a plain numeric array ({error}); expected {_LAYOUT}") from error
        shapes[name] = array.shape
        if name.endswith("_images") and (array.dtype != np.uint8 or not _is_image_shape(array.shape)):
            raise DataError(f"{path}: expected {name} uint8 (N, H, W[, 3]), got {array.dtype} {array.shape}")
        if not name.endswith("_images") and array.ndim != 1:
            raise DataError(f"{path}: expected {name} to have one dimension, got {array.shape}")
    for first, second in (
        ("train_images", "train_labels"),
        ("test_images", "test_labels"),
        ("train_groups", "train_labels"),
    ):
        if first in shapes and shapes[first][:1] != shapes[second][:1]:
            raise DataError(f"{path}: {first} has {shapes[first][:1]} entries, {second} has {shapes[second][:1]}")
    if shapes["train_images"][1:] != shapes["test_images"][1:]:
        raise DataError(
            f"{path}: train_images are {shapes['train_images'][1:]}, test_images {shapes['test_images'][1:]}; "
            "expected the same size and channels"
        )


def _is_image_shape(shape: tuple[int, ...]) -> bool:
    return min(shape, default=0) > 0 and (len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3)))
