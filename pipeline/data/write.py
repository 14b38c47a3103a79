"""Writing one split: streamed from its source, verified by reading it back, and described by a sidecar."""

import math
import os
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO, cast

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from pipeline.artifacts import sha256_of
from pipeline.config.base import Section
from pipeline.data.errors import DataError
from pipeline.data.readers import Reader, open_reader
from pipeline.data.samples import RECORD, Samples, moments, record
from pipeline.data.sidecar import Sidecar, Storage, sampled_digest, sidecar_path, write_json

_NUM_CHECKED = {"raw": 2048, "jpeg": 64}
_SMALL = 10_000
TOO_SLOW = "writing the splits took longer than data.timeout; raise it, or data.writers"


class SplitRecipe(Section):
    """How one split is to be written, and what its sidecar says of where it comes from."""

    source: str
    """The data set's name."""
    split: str
    """train, val or test."""
    origin: str
    """The source's split that the samples' indices count in."""
    storage: Storage
    """raw or jpeg."""
    image_size: int
    """Side of the square images that the loader yields."""
    num_classes: int
    """Number of classes."""
    jpeg_quality: int
    """Quality of stored JPEG images."""
    writers: int
    """Processes that write; 0 takes the number of cores, or 1 for few images."""


@dataclass(frozen=True)
class SplitWork:
    """One split to be written."""

    samples: Samples
    path: Path
    recipe: SplitRecipe


def write_split(
    work: SplitWork,
    report: Callable[[str], None] = print,
    *,
    terminal: TextIO | None = None,
    deadline: float = math.inf,
) -> None:
    """Write a split to its path (.beton through FFCV, or .npz), verify it, and put its sidecar beside it.

    Args:
        report: takes the reason when a process of FFCV's writer fails (see `beton.write`).
        terminal: takes a progress bar.
        deadline: time of the monotonic clock at which an .npz is given up; FFCV's writer is ended by its parent.

    Raises:
        DataError: a sample cannot be read, what was written is not what was read, or the time is up.
        OSError: the disk is full.
        ImportError: a .beton without FFCV.
    """
    samples, path, recipe = work.samples, work.path, work.recipe
    ledger_path = path.with_suffix(".ledger")
    np.memmap(ledger_path, RECORD, "w+", shape=(len(samples),)).flush()
    _reserve(ledger_path)
    samples = replace(samples, ledger=ledger_path)
    if path.suffix == ".beton":
        from pipeline.data import beton

        beton.write(
            samples,
            path,
            storage=recipe.storage,
            quality=recipe.jpeg_quality,
            writers=recipe.writers or _num_writers(len(samples)),
            report=report,
            terminal=terminal,
        )
        fields = beton.field_names(recipe.storage, samples.channels)
    else:
        _write_npz(samples, path, terminal, deadline)
        fields = {"images": "uint8 (N, H, W, C)", "labels": "int64 (N,)"}
    ledger = np.fromfile(ledger_path, RECORD)
    sidecar = _describe(samples, path, ledger, recipe, fields)
    _verify(samples, path, ledger, sidecar, recipe.jpeg_quality)
    write_json(sidecar_path(path), sidecar.model_dump(mode="json"))
    ledger_path.unlink()


def _num_writers(num_samples: int) -> int:
    """As many as this process has cores, but for few images, where starting them takes longer."""
    return len(os.sched_getaffinity(0)) if num_samples >= _SMALL else 1


def _describe(
    samples: Samples, path: Path, ledger: npt.NDArray[Any], recipe: SplitRecipe, fields: dict[str, str]
) -> Sidecar:
    mean, std = moments(ledger, samples.channels)
    return Sidecar(
        source=recipe.source,
        split=recipe.split,
        origin=recipe.origin,
        storage=recipe.storage,
        image_size=recipe.image_size,
        channels=samples.channels,
        fields=fields,
        count=len(samples),
        class_counts=tuple(np.bincount(samples.labels, minlength=recipe.num_classes).tolist()),
        mean=tuple(mean),
        std=tuple(std),
        content=sha256(ledger["digest"].tobytes()).hexdigest(),
        size=path.stat().st_size,
        sha256=sha256_of(path),
        sampled=sampled_digest(path),
        indices=tuple(samples.indices.tolist()),
    )


def _write_npz(samples: Samples, path: Path, terminal: TextIO | None, deadline: float) -> None:
    """Arrays `images` and `labels`, an image at a time, so that memory stays constant."""
    assert samples.size is not None
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)),
        "fortran_order": False,
        "shape": (len(samples), samples.size, samples.size, samples.channels),
    }
    progress = tqdm(range(len(samples)), desc=path.stem, file=terminal, disable=terminal is None)
    # ZipInfo's fixed time stamp: the same images give the same file.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive, progress as indices:
        with archive.open(zipfile.ZipInfo("images.npy"), "w", force_zip64=True) as target:
            np.lib.format.write_array_header_1_0(target, header)
            for index in indices:
                if time.monotonic() > deadline:
                    raise DataError(TOO_SLOW)
                target.write(samples[index][0].data)
        with archive.open(zipfile.ZipInfo("labels.npy"), "w", force_zip64=True) as target:
            np.lib.format.write_array(target, samples.labels, allow_pickle=False)


def _reserve(path: Path) -> None:
    """Take the space of a mapped file: a page that finds none when it is written to ends the process by SIGBUS."""
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, path.stat().st_size))


def _verify(samples: Samples, path: Path, ledger: npt.NDArray[Any], sidecar: Sidecar, quality: int) -> None:
    """Read back count, labels and a sample of the pixels, and compare them with what the source gave."""
    reader = open_reader(path, sidecar, mapped=True)
    try:
        if reader.num_samples != len(samples) or not np.array_equal(reader.labels, samples.labels):
            raise DataError(f"{path.name}: the labels read back are not those written; the disk or FFCV is at fault")
        checked = np.unique(np.linspace(0, len(samples) - 1, _NUM_CHECKED[sidecar.storage]).astype(np.int64))
        for index in checked.tolist():
            if not _same(reader, index, samples, ledger, quality):
                raise DataError(f"{path.name}: image {index} read back is not the one written; check the disk")
    finally:
        reader.close()


def _same(reader: Reader, index: int, samples: Samples, ledger: npt.NDArray[Any], quality: int) -> bool:
    if reader.storage == "raw":
        read_back = record(reader.read(np.array([index]))[0], int(samples.labels[index]))
        return bool((read_back["digest"] == ledger[index]["digest"]).all())
    from pipeline.data import beton

    # JPEG loses pixels, but encoding is deterministic: the stored bytes must be those that the image gives.
    stored = cast(beton.BetonReader, reader).stored(index)
    return np.array_equal(stored, beton.jpeg_bytes(samples[index][0], quality))
