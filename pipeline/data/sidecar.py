"""The sidecar: what a split file holds, and the checks that a file must pass before it is opened."""

import json
import os
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from pipeline.artifacts import sha256_of, write_atomic
from pipeline.config.base import Section, one_line
from pipeline.data.errors import DataError
from sparta_models.kernels import cache_root

FORMAT_VERSION = 1
RECORD_NAME = "prepared.json"
"""File name of the record of prepared data, beside the splits."""
Storage = Literal["raw", "jpeg"]
_BLOCK, _NUM_BLOCKS = 4096, 64
_REBUILD = "rebuild it: delete the folder and run the prepare stage again (python -m pipeline.run --until prepare)"


class Sidecar(Section):
    """Lies beside a split file as NAME.json; the file is only opened when it is what the sidecar says."""

    format_version: Literal[1] = 1
    """Version of this record and of the layout of the file."""
    source: str
    """The data set the images come from."""
    split: str
    """train, val or test."""
    storage: Storage
    """raw: pixels; jpeg: compressed images of different sizes."""
    fields: dict[str, str]
    """Name and type of each field of the file."""
    count: int
    """Number of images."""
    class_counts: tuple[int, ...]
    """Images per class."""
    image_size: int
    """Side of the square images that the loader yields."""
    channels: Literal[1, 3]
    """1 grey, 3 RGB."""
    mean: tuple[float, ...]
    """Per channel, of pixels in [0, 1]."""
    std: tuple[float, ...]
    """Per channel, of pixels in [0, 1]."""
    content: str
    """Digest of labels and pixels in order: the same wherever and however the file was written."""
    size: int
    """Bytes."""
    sha256: str
    """Of the whole file."""
    sampled: str
    """Digest of 64 blocks spread over the file: a quick check of a file already verified on this machine."""
    origin: str
    """The source's split that `indices` count in."""
    indices: tuple[int, ...]
    """Positions of the images in that split."""


def sidecar_path(path: Path) -> Path:
    """NAME.beton -> NAME.beton.json."""
    return path.with_name(path.name + ".json")


def read_sidecar(path: Path) -> Sidecar:
    """The sidecar of a split file.

    Raises:
        DataError: it is missing, not readable, or of another version.
    """
    place = sidecar_path(path)
    try:
        raw = json.loads(place.read_text())
    except (FileNotFoundError, NotADirectoryError):
        if not path.is_file():
            raise DataError(f"{path}: expected a split file of prepared data, got no file") from None
        if not (path.parent / RECORD_NAME).is_file():  # a file of the user's own, not to be deleted
            raise DataError(
                f"{path}: expected a file that the prepare stage wrote, got one without {place.name}"
            ) from None
        raise DataError(f"{path}: its sidecar {place.name} is missing, so it cannot be checked; {_REBUILD}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: expected a JSON sidecar, got something else ({error}); {_REBUILD}") from error
    if isinstance(raw, dict) and raw.get("format_version") != FORMAT_VERSION:
        got = raw.get("format_version")
        raise DataError(f"{place}: expected sidecar format {FORMAT_VERSION}, got {got}; {_REBUILD}")
    try:
        return Sidecar.model_validate(raw)
    except ValidationError as error:
        raise DataError(f"{place}: {one_line(error)}; {_REBUILD}") from error


def check_file(path: Path, sidecar: Sidecar) -> None:
    """Pass if the file is the one the sidecar describes; the whole sha256 is read once per machine and file.

    Raises:
        DataError: missing, truncated, or altered.
    """
    try:
        stat = path.stat()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file, though its sidecar is here; {_REBUILD}") from None
    if stat.st_size != sidecar.size:
        raise DataError(
            f"{path}: expected {sidecar.size:,} bytes, got {stat.st_size:,} (truncated or half-written); {_REBUILD}"
        )
    if sampled_digest(path) != sidecar.sampled:
        raise DataError(f"{path}: its content is not what its sidecar says (altered); {_REBUILD}")
    if _known(path, stat, sidecar.sha256):
        return
    if sha256_of(path) != sidecar.sha256:
        raise DataError(f"{path}: its sha256 is not the one in its sidecar (altered); {_REBUILD}")
    _remember(path, stat, sidecar.sha256)


def sampled_digest(path: Path, num_blocks: int = _NUM_BLOCKS) -> str:
    """Sha256 of blocks of 4 KiB spread from the first to the last byte (all of a small file)."""
    digest = sha256()
    size = path.stat().st_size
    with path.open("rb") as file:
        for offset in _offsets(size, num_blocks):
            file.seek(offset)
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def _offsets(size: int, num_blocks: int) -> Iterator[int]:
    last = max(0, size - _BLOCK)
    return (last * n // (num_blocks - 1) for n in range(num_blocks))


def write_json(path: Path, value: Any) -> None:
    """Write JSON, all of it or none."""
    write_atomic(path, json_text(value))


def json_text(value: Any) -> str:
    """JSON as this package writes it: equal values give equal text."""
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def _receipt(path: Path) -> Path:
    # With the machine's name: a home that several machines share vouches for none of the others' disks.
    place = f"{os.uname().nodename} {path.resolve()}"
    return cache_root() / "verified" / (sha256(place.encode()).hexdigest() + ".json")


def _known(path: Path, stat: os.stat_result, digest: str) -> bool:
    try:
        seen = json.loads(_receipt(path).read_text())
    except (OSError, ValueError):
        return False
    return bool(seen == [stat.st_size, stat.st_mtime_ns, digest])


def _remember(path: Path, stat: os.stat_result, digest: str) -> None:
    receipt = _receipt(path)
    try:
        receipt.parent.mkdir(parents=True, exist_ok=True)
        write_json(receipt, [stat.st_size, stat.st_mtime_ns, digest])
    except OSError:
        # A home that cannot be written to only costs the full check at the next opening.
        return
