"""Prepared data: the record of a folder with verified splits, and how a split of it is opened."""

import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import Field, PrivateAttr, ValidationError

from pipeline.artifacts import sha256_of
from pipeline.config.base import Section, one_line
from pipeline.config.data import AugmentConfig, LoaderName
from pipeline.data.errors import DataError
from pipeline.data.loader import Loader
from pipeline.data.order import Order
from pipeline.data.paths import as_url
from pipeline.data.readers import Chosen, Integers, open_reader
from pipeline.data.sidecar import RECORD_NAME, Sidecar, check_file, read_sidecar


class SplitInfo(Section):
    """One split of prepared data."""

    file: str = Field(pattern=r"^\w[\w.-]*$")
    """File name in the folder of the record."""
    count: int
    """Number of images."""
    class_counts: tuple[int, ...]
    """Images per class."""
    content: str
    """Digest of labels and pixels in order."""
    sha256: str
    """Of the file."""


class PreparedData(Section):
    """What `prepare` made. The folder may be moved or copied: nothing in the record depends on where it is."""

    format_version: Literal[1] = 1
    """Version of this record."""
    name: str
    """The data set's name."""
    num_classes: int
    """Number of classes."""
    class_names: tuple[str, ...]
    """Names of the classes, by label."""
    channels: Literal[1, 3]
    """1 grey, 3 RGB."""
    image_size: int
    """Side of the square images."""
    mean: tuple[float, ...]
    """Per channel over the training split, of pixels in [0, 1]."""
    std: tuple[float, ...]
    """Per channel over the training split, of pixels in [0, 1]."""
    storage: Literal["raw", "jpeg"]
    """How the images are stored."""
    splits: dict[str, SplitInfo]
    """train, val and test."""
    digest: str
    """Of names, labels and pixels of all splits: equal data give an equal digest, wherever and however it is stored. Of
    JPEG images also of the size that the loader makes of them."""
    loader: LoaderName = "auto"
    """Which loader to open it with, unless told otherwise."""
    node_cache: Path | None = None
    """A folder on each node to which files are copied before they are read."""
    request: str
    """Digest of the settings, seed and source it was made from: tells whether it is still what is asked for."""

    _directory: Path = PrivateAttr()

    @classmethod
    def load(cls, directory: Path | str) -> Self:
        """The record in `directory`, a folder or an fsspec URL (which is copied to this node first).

        Raises:
            DataError: there is none, or it is not readable.
        """
        if url := as_url(directory):
            from pipeline.data.remote import fetch_prepared

            directory = fetch_prepared(url)
        directory = Path(directory)
        try:
            prepared = cls.model_validate(json.loads((directory / RECORD_NAME).read_text()))
        except FileNotFoundError:
            raise DataError(
                f"expected prepared data ({RECORD_NAME}) in {directory} on {os.uname().nodename}, found none; "
                "run the prepare stage; for several nodes use a shared folder, or set data.mirror to a URL"
            ) from None
        except ValidationError as error:
            raise DataError(f"{directory / RECORD_NAME}: {one_line(error)}; run the prepare stage again") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{directory / RECORD_NAME} is not JSON ({error}); run the prepare stage again") from error
        prepared._directory = directory
        return prepared

    @property
    def directory(self) -> Path:
        """The folder it was loaded from."""
        return self._directory

    @property
    def files(self) -> list[str]:
        """Names of the split files."""
        return [split.file for split in self.splits.values()]

    def path(self, split: str) -> Path:
        """The file of a split.

        Raises:
            DataError: no such split.
        """
        if split not in self.splits:
            raise DataError(f"unknown split {split!r}; known: {', '.join(sorted(self.splits))}")
        return self._directory / self.splits[split].file

    def verify(self) -> None:
        """Read every file in full and compare it with its sidecar and this record.

        Raises:
            DataError: a file is missing, truncated, altered, or from another preparation.
        """
        for split in self.splits:
            path = self.check(split)
            if sha256_of(path) != self.splits[split].sha256:
                raise DataError(f"{path}: its sha256 is not the recorded one (altered); run the prepare stage again")

    def check(self, split: str) -> Path:
        """The file of a split, after the checks that `check_file` makes."""
        path = self.path(split)
        check_file(path, self.sidecar(split))
        return path

    def sidecar(self, split: str) -> Sidecar:
        """The sidecar of a split, which must be from the same preparation as this record."""
        path = self.path(split)
        sidecar = read_sidecar(path)
        if (sidecar.content, sidecar.sha256) != (self.splits[split].content, self.splits[split].sha256):
            raise DataError(f"{path}: is from another preparation than {RECORD_NAME}; run the prepare stage again")
        return sidecar


def data_digest(
    *, class_names: tuple[str, ...], storage: str, quality: int, image_size: int, contents: dict[str, str]
) -> str:
    """`PreparedData.digest`: contents cover labels, sizes and channels, but of JPEG those of the stored images only."""
    loaded = [quality, image_size] if storage == "jpeg" else None
    parts = [list(class_names), storage, loaded, sorted(contents.items())]
    return sha256(json.dumps(parts).encode()).hexdigest()


def open_split(
    prepared: PreparedData,
    split: str,
    *,
    batch_size: int,
    seed: int = 0,
    shuffle: bool = False,
    augment: AugmentConfig | None = None,
    rank: int = 0,
    world_size: int = 1,
    device: str | torch.device = "cpu",
    loader: LoaderName = "auto",
    workers: int | None = None,
    positions: Integers | None = None,
    joint: bool = False,
) -> Loader:
    """Open a split of prepared data.

    Args:
        batch_size: images per batch and rank; with `joint`, per batch of all ranks together.
        augment: how training images are changed; None leaves them as they are.
        loader: "auto" takes what the data was prepared for.
        workers: threads that read, decode and, on the CPU, augment; by default one for raw pixels, and this process's
            share of the cores for JPEG.
        positions: which samples of the split, in their order; None means all.

    Raises:
        DataError: the file does not pass its checks, or the order cannot be made (see `Order`).
    """
    sidecar = prepared.sidecar(split)
    if prepared.node_cache is None:
        path = prepared.check(split)
    else:
        from pipeline.data.remote import copy_to_node

        path = copy_to_node(prepared.path(split), prepared.node_cache)
    count = prepared.splits[split].count if positions is None else len(positions)
    order = Order(count, batch_size, seed, shuffle, rank, world_size, joint)
    reader = open_reader(path, sidecar, prepared.loader if loader == "auto" else loader)
    if positions is not None:
        reader = Chosen(reader, positions)
    if workers is None:
        workers = _num_decoders(world_size) if prepared.storage == "jpeg" else 1
    return Loader(reader, order, augment=augment, device=torch.device(device), workers=workers)


_MOST_DECODERS = 16
"""Every one holds batches in memory, pinned for a GPU: a hundred of 512 photographs are 8 GB. These decode some
thousand a second, more than a GPU attacks."""


def _num_decoders(world_size: int) -> int:
    """This process's share of the node's cores. Ray and torchrun say how many ranks are on the node."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or world_size)
    return max(1, min(_MOST_DECODERS, len(os.sched_getaffinity(0)) // ranks_here))
