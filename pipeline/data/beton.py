"""The adapter to FFCV: the only module that imports ffcv. Import it lazily, where a .beton is written or read.

FFCV's file format, writer, index reader and native decoders (libjpeg-turbo, OpenCV) are used; its `Loader` is not.
That class hangs on an exception, leaks a thread per abandoned epoch, overwrites batches that are kept, and pads shards
with duplicates. Here a batch is decoded by one call that holds no state and releases the GIL, into memory of its own,
so order, shards, prefetching and errors are the business of `pipeline.data.loader`, the same for every reader.

Files are read, not mapped: the page cache serves both alike, but mapped pages count as the process's own memory, by how
much depends on the kernel, and one that a truncated file no longer has ends the process by SIGBUS.
"""

import errno
import multiprocessing
import os
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numba
import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

# Importing ffcv sets torch and numba to one thread for the whole process, and spends seconds on compiling a dictionary.
_threads, _numba_threads, _jit = torch.get_num_threads(), numba.get_num_threads(), numba.config.DISABLE_JIT
numba.config.DISABLE_JIT = 1
try:
    import ffcv.libffcv
    import ffcv.writer
    from ffcv.fields import IntField, NDArrayField, RGBImageField
    from ffcv.fields.rgb_image import encode_jpeg
    from ffcv.reader import Reader
    from ffcv.writer import DatasetWriter
finally:
    torch.set_num_threads(_threads)
    numba.set_num_threads(_numba_threads)
    numba.config.DISABLE_JIT = _jit

from llvmlite import binding  # type: ignore[import-untyped]  # noqa: E402
from numba import types  # noqa: E402

from pipeline.data.errors import DataError  # noqa: E402
from pipeline.data.samples import Pixels, Samples  # noqa: E402
from pipeline.data.sidecar import Storage  # noqa: E402

Integers = npt.NDArray[np.int64]

_AGAIN = "delete the folder and prepare again"
_SMALL_PAGE, _PAGE, _LARGEST_PAGE = 1 << 21, 1 << 23, 1 << 31
"""FFCV takes powers of two from the first to the third."""
_MOST_PIXELS = 2048
"""Per byte of a JPEG: far above the 64 of a picture of one colour, far below what a wrong index would ask for."""
_GOOD, _SHORT, _BAD = 0, 1, 2
"""What became of an image: it was read, the file ends before it, it does not decode."""

# Named as symbols, not through ctypes pointers, so that numba may keep the compiled code on disk.
binding.load_library_permanently(ffcv.libffcv.ffcv._libffcv.__file__)
_u4, _u8, _pointer, _i8 = types.uint32, types.uint64, types.intp, types.int64
_imdecode = types.ExternalFunction(
    "imdecode", types.int32(_pointer, _u8, _u4, _u4, _pointer, *[_u4] * 6, types.boolean, types.boolean)
)
_resize = types.ExternalFunction("resize", types.void(*[_i8] * 11))
_pread = types.ExternalFunction("pread", types.intp(types.int32, _pointer, _u8, _i8))


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any]
    try:
        compiled = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # neither this folder nor the user's cache folder can be written to
        compiled = numba.njit(nogil=True, error_model="numpy")(function)
    return compiled


@_compiled
def _gather(file, starts, out):  # type: ignore[no-untyped-def]
    for k in range(len(starts)):
        if _pread(file, out[k].ctypes.data, out.shape[1], starts[k]) != out.shape[1]:
            return _SHORT, k
    return _GOOD, -1


@_compiled
def _decode(file, starts, sizes, shapes, boxes, packed, scratch, out):  # type: ignore[no-untyped-def]  # noqa: PLR0917
    for k in range(len(starts)):
        height, width = shapes[k]
        top, left, rows, columns = boxes[k]
        if _pread(file, packed.ctypes.data, sizes[k], starts[k]) != sizes[k]:
            return _SHORT, k
        status = _imdecode(
            packed.ctypes.data, sizes[k], height, width, scratch.ctypes.data, height, width, 0, 0, 1, 1, False, False
        )
        if status != 0:
            return _BAD, k
        target = out[k]
        _resize(
            0, scratch.ctypes.data, height, width, top, top + rows, left, left + columns,
            target.ctypes.data, target.shape[0], target.shape[1],
        )  # fmt: skip
    return _GOOD, -1


def fields(storage: Storage, channels: int, size: int, quality: int) -> dict[str, Any]:
    """FFCV's fields of a split: RGB images as `RGBImageField`, grey ones (which it cannot hold) as `NDArrayField`."""
    if storage == "jpeg":
        image = RGBImageField("jpg", jpeg_quality=quality)
    elif channels == 3:
        image = RGBImageField("raw")
    else:
        image = NDArrayField(np.dtype("u1"), (size, size, channels))
    return {"image": image, "label": IntField()}


def field_names(storage: Storage, channels: int) -> dict[str, str]:
    """What the sidecar says of the fields."""
    return {name: type(field).__name__ for name, field in fields(storage, channels, 1, 90).items()}


def page_size(num_bytes: int, count: int) -> int:
    """Size of the writer's pages for `count` images of up to `num_bytes`: one of them fits.

    A file has two pages at least, and every process of the writer two in memory.
    """
    usual = _SMALL_PAGE if num_bytes * count <= _PAGE else _PAGE
    return min(_LARGEST_PAGE, max(usual, 1 << (num_bytes - 1).bit_length()))


def write(
    samples: Samples,
    path: Path,
    *,
    storage: Storage,
    quality: int,
    writers: int,
    report: Callable[[str], None],
    terminal: TextIO | None,
) -> None:
    """Write every sample. To be called in a process of its own, which the caller ends once `report` was called.

    Args:
        report: takes the reason when a worker fails: FFCV's writer itself would then wait for ever.
        terminal: takes the progress bar.
    """
    side = samples.size or samples.max_side
    # Noise at the highest quality can come out larger as JPEG than its pixels are.
    num_bytes = side * side * samples.channels * (2 if storage == "jpeg" else 1)
    columns = fields(storage, samples.channels, side, quality)
    page = page_size(num_bytes, len(samples))
    writer = _ReportingWriter(str(path), columns, page_size=page, num_workers=writers)
    writer.report = report
    workers: list[Any] = []

    def recorded(**arguments: Any) -> Any:
        workers.append(multiprocessing.Process(**arguments))
        return workers[-1]

    ffcv.writer.Process = recorded
    ffcv.writer.tqdm = partial(tqdm, desc=path.stem, file=terminal, disable=terminal is None)
    threading.Thread(target=_watch, args=(workers, report), daemon=True).start()
    writer.from_indexed_dataset(samples)


class _ReportingWriter(DatasetWriter):  # type: ignore[misc]
    report: Callable[[str], None]

    def _write_common(self, num_samples: int, work: Any, function: Any, arguments: Any) -> None:
        def reporting(*args: Any) -> None:
            try:
                function(*args)
            except BaseException as error:
                self.report(f"{type(error).__name__}: {error}")
                raise

        super()._write_common(num_samples, work, reporting, arguments)


def _watch(workers: list[Any], report: Callable[[str], None]) -> None:
    """Report a worker that was killed from outside, for example for want of memory."""
    while True:
        for worker in list(workers):
            if worker.exitcode not in (None, 0):
                report(f"a writer process ended with exit code {worker.exitcode} (killed, or out of memory?)")
                return
        time.sleep(0.2)


class BetonReader:
    """Random access to the images of a .beton that `check_file` has passed.

    Raises:
        DataError: the file is not FFCV's, or its fields are not those the sidecar names.
    """

    def __init__(self, path: Path, *, storage: Storage, expected: dict[str, str], size: int, channels: int) -> None:
        self.storage, self.size, self.channels = storage, size, channels
        reader = _open(path, expected)
        self.num_samples = int(reader.num_samples)
        self.labels: Integers = reader.metadata["f1"].astype(np.int64)
        image = reader.metadata["f0"]
        self._starts: Integers = (image if image.dtype.names is None else image["data_ptr"]).astype(np.int64)
        table = reader.alloc_table[np.argsort(reader.alloc_table["sample_id"], kind="stable")]
        self._sizes: Integers = table["size"].astype(np.int64)
        self.shapes: Integers = np.full((len(self.labels), 2), size, dtype=np.int64)
        if image.dtype.names is not None:
            self.shapes = np.stack([image["height"], image["width"]], 1).astype(np.int64)
        self._check_index(path)
        self._path, self._file = path, os.open(path, os.O_RDONLY)
        self._close = weakref.finalize(self, os.close, self._file)

    def _check_index(self, path: Path) -> None:
        """Refuse what would lead the compiled kernels out of the file, or out of an image: they do not look."""
        starts, sizes, shapes = self._starts, self._sizes, self.shapes
        whole = len(self.labels) == len(starts) == len(sizes) == self.num_samples
        # Signed: what does not fit into 63 bits is negative here.
        if not whole or (sizes < 0).any() or (starts < 0).any() or (starts > path.stat().st_size - sizes).any():
            raise DataError(f"{path}: its index does not fit its content; {_AGAIN}")
        odd = (shapes < 1).any()
        if self.storage == "raw":
            odd |= (sizes != self.size * self.size * self.channels).any()
        else:
            odd |= (shapes.prod(1) > sizes * _MOST_PIXELS).any()
        if odd:
            raise DataError(f"{path}: its images cannot have the shapes that its index says; {_AGAIN}")

    def read(self, indices: Integers, boxes: Integers | None = None) -> Pixels:
        """Images uint8 (B, S, S, C) in new memory.

        Args:
            indices: (B,) positions in the file.
            boxes: (B, 4) top, left, height, width of the part that becomes the image; for JPEG, which needs it.

        Raises:
            DataError: an image does not decode, or the file was cut since it was opened.
            OSError: the disk did not answer.
        """
        out = np.empty((len(indices), self.size, self.size, self.channels), np.uint8)
        starts = self._starts[indices]
        if self.storage == "raw":
            outcome, which = _gather(self._file, starts, out.reshape(len(indices), -1))
        else:
            assert boxes is not None
            shapes, sizes = self.shapes[indices], self._sizes[indices]
            packed = np.empty(int(sizes.max(initial=0)), np.uint8)
            scratch = np.empty(int(shapes.prod(1).max(initial=0)) * 3, np.uint8)
            outcome, which = _decode(self._file, starts, sizes, shapes, boxes, packed, scratch, out)
        if outcome == _SHORT:
            self._explain(int(indices[which]))
            raise DataError(f"{self._path}: was cut while it was read, image {indices[which]} is not there; {_AGAIN}")
        if outcome == _BAD:
            raise DataError(f"{self._path}: image {indices[which]} does not decode; {_AGAIN}")
        return out

    def _explain(self, index: int) -> None:
        """Raise what kept the kernels from reading an image, unless the file ends before it."""
        if len(self.stored(index)) == self._sizes[index]:  # raises what the operating system says
            raise OSError(errno.EIO, f"image {index} was read only in part, and whole the second time", str(self._path))

    def stored(self, index: int) -> Pixels:
        """The bytes of one image as they lie in the file."""
        return np.frombuffer(os.pread(self._file, int(self._sizes[index]), int(self._starts[index])), np.uint8)

    def close(self) -> None:
        """Close the file."""
        self._close()
        self._file = -1  # the number may soon be another file's


def _open(path: Path, expected: dict[str, str]) -> Any:
    try:
        reader = Reader(str(path))
    except Exception as error:  # what FFCV raises on a foreign file depends on the bytes it meets
        raise DataError(
            f"{path}: not a .beton file that FFCV can open ({type(error).__name__}: {error}); {_AGAIN}"
        ) from error
    found = {name: type(handler).__name__ for name, handler in reader.handlers.items()}
    if found != expected:
        raise DataError(f"{path}: expected the fields {expected}, got {found}; {_AGAIN}")
    return reader


def jpeg_bytes(pixels: Pixels, quality: int) -> Pixels:
    """What the writer stores for an RGB image (H, W, 3)."""
    packed: Pixels = encode_jpeg(pixels, quality)
    return packed
