"""Random access to the images of a verified split: through FFCV, or from memory. What a `Loader` reads from."""

import os
import zipfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.data.errors import UNREADABLE_NPZ, DataError
from pipeline.data.samples import Pixels
from pipeline.data.sidecar import Sidecar

Integers = npt.NDArray[np.int64]


class Reader(Protocol):
    """Images by position, in memory that belongs to the caller. Safe to call from several threads."""

    num_samples: int
    labels: Integers
    size: int
    channels: int
    storage: str
    shapes: Integers
    """(N, 2) height and width of the stored images."""

    def read(self, indices: Integers, boxes: Integers | None = None) -> Pixels:
        """Images uint8 (B, S, S, C)."""

    def close(self) -> None:
        """Let go of the file or the memory."""


class MemoryReader:
    """A split held as one array."""

    storage = "raw"

    def __init__(self, images: Pixels, labels: Integers) -> None:
        self._images, self.labels = images, labels
        self.num_samples, self.size, self.channels = len(images), images.shape[1], images.shape[3]
        self.shapes = np.full((len(images), 2), self.size, dtype=np.int64)

    def read(self, indices: Integers, boxes: Integers | None = None) -> Pixels:
        """Images uint8 (B, S, S, C)."""
        assert boxes is None
        return self._images[indices]

    def close(self) -> None:
        """Let go of the array."""
        self._images = self._images[:0]


class Chosen:
    """Some samples of another reader, in an order of one's own."""

    def __init__(self, reader: Reader, positions: Integers) -> None:
        self._reader, self._positions = reader, positions
        self.num_samples, self.labels, self.shapes = len(positions), reader.labels[positions], reader.shapes[positions]
        self.size, self.channels, self.storage = reader.size, reader.channels, reader.storage

    def read(self, indices: Integers, boxes: Integers | None = None) -> Pixels:
        """Images uint8 (B, S, S, C)."""
        return self._reader.read(self._positions[indices], boxes)

    def close(self) -> None:
        """Close the other reader."""
        self._reader.close()


def open_reader(path: Path, sidecar: Sidecar, loader: str = "auto", *, mapped: bool = False) -> Reader:
    """The reader of a file that `check_file` has passed.

    Args:
        loader: "ffcv" streams a .beton, "memory" holds the split in memory, "auto" does what the file was written for.
        mapped: leave the images of an .npz on the disk.

    Raises:
        DataError: FFCV is asked for and absent, or the file does not hold what its sidecar says.
    """
    if path.suffix == ".npz":
        if loader == "ffcv":
            raise DataError(f"{path}: loader=ffcv needs a .beton; install ffcv and run the prepare stage again")
        return _npz_reader(path, sidecar, mapped)
    reader: Reader = _beton_reader(path, sidecar)
    if loader != "memory":
        return reader
    if sidecar.storage == "jpeg":
        raise DataError(f"{path}: loader=memory needs storage=raw, got jpeg; prepare again with data.storage=raw")
    images = np.empty((sidecar.count, sidecar.image_size, sidecar.image_size, sidecar.channels), np.uint8)
    for start in range(0, sidecar.count, 4096):
        part = np.arange(start, min(start + 4096, sidecar.count))
        images[part] = reader.read(part)
    labels = reader.labels
    reader.close()
    return MemoryReader(images, labels)


def _beton_reader(path: Path, sidecar: Sidecar) -> Any:
    try:
        from pipeline.data import beton
    except Exception as error:  # whatever a package raises that is damaged, or does not fit the others
        raise DataError(
            f"{path}: reading it needs ffcv, which does not import here ({type(error).__name__}: {error}); "
            "install ffcv, or run the prepare stage on this machine"
        ) from error
    reader = beton.BetonReader(
        path, storage=sidecar.storage, expected=sidecar.fields, size=sidecar.image_size, channels=sidecar.channels
    )
    if reader.num_samples != sidecar.count or not _counts_match(reader.labels, sidecar):
        reader.close()
        raise DataError(f"{path}: count or labels differ from its sidecar; delete the folder and prepare again")
    return reader


def _npz_reader(path: Path, sidecar: Sidecar, mapped: bool) -> MemoryReader:
    try:
        with np.load(path, allow_pickle=False) as archive:
            images = _mapped(path, "images") if mapped else archive["images"]
            labels = archive["labels"]
    except UNREADABLE_NPZ as error:
        raise DataError(f"{path}: expected the arrays images and labels ({error}); prepare again") from error
    shape = (sidecar.count, sidecar.image_size, sidecar.image_size, sidecar.channels)
    if images.dtype != np.uint8 or images.shape != shape or not _counts_match(labels, sidecar):
        raise DataError(f"{path}: images or labels differ from its sidecar; delete the folder and prepare again")
    return MemoryReader(images, labels)


def _mapped(path: Path, name: str) -> npt.NDArray[Any]:
    """An array of an .npz that is not compressed, where it lies in the file."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entry = archive.getinfo(f"{name}.npy")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed")
        # Before an entry's data: 30 bytes that end with the lengths of its name and of an extra field, and these.
        file.seek(entry.header_offset + 26)
        file.seek(int.from_bytes(file.read(2), "little") + int.from_bytes(file.read(2), "little"), os.SEEK_CUR)
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        return np.memmap(path, dtype, "r", file.tell(), shape)


def _counts_match(labels: Integers, sidecar: Sidecar) -> bool:
    num_classes = len(sidecar.class_counts)
    if len(labels) != sidecar.count or labels.min(initial=0) < 0 or labels.max(initial=0) >= num_classes:
        return False
    return bool(np.bincount(labels, minlength=num_classes).tolist() == list(sidecar.class_counts))
