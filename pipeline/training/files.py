"""Tensors on disk, whole or absent: files, and directories with a record of their digests. Nothing is pickled."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.artifacts import sha256_of, whole, write_atomic

# The last two: something else lies where a file or a directory should.
_CONTENT_ERRORS = (
    ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError, IsADirectoryError,
    NotADirectoryError,
)  # fmt: skip


class DamagedFilesError(ValueError):
    """Files that are missing, incomplete or altered."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a .safetensors file, whole or not at all. Raises OSError when the disk refuses."""
    with whole(path) as temporary:
        try:
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, temporary)
        except SafetensorError as error:  # whatever the operating system said, in words
            raise OSError(f"{path} could not be written: {error}") from error


def write_directory(
    directory: Path, tensors: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any], *, record: str
) -> None:
    """Write {name}.safetensors for every group of tensors, and `record` with meta and digests, replacing `directory`.

    Raises OSError when the disk refuses.
    """
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        digests = {}
        for name, group in tensors.items():
            path = temporary / f"{name}.safetensors"
            save_tensors(path, group)
            digests[path.name] = sha256_of(path)
        write_atomic(temporary / record, json.dumps({**meta, "sha256": digests}, indent=1))
    except BaseException:  # what is left of it would fill the disk further
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _replace(temporary, directory)


def sweep(directory: Path, name: str = "") -> None:
    """Remove the directories that a killed `write_directory` left half-written in `directory`, of one name or of all.

    Only where nobody is writing: one process's leftovers look like another one's work.
    """
    for path in directory.glob(f".{name}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def read_directory(directory: Path, *, record: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read what `write_directory` wrote: groups of tensors on the CPU, and meta.

    Raises:
        DamagedFilesError: for a file that is missing, cut off or altered.
        OSError: when the disk does not answer, which says nothing about the files.
    """
    try:
        meta = json.loads((directory / record).read_text())
        digests: dict[str, str] = meta.pop("sha256")
        for name, expected in digests.items():
            if Path(name).name != name:
                raise DamagedFilesError(f"expected plain file names in {directory / record}, got {name!r}")
            if (found := sha256_of(directory / name)) != expected:
                raise DamagedFilesError(
                    f"expected sha256 {expected} of {directory / name}, got {found}; the file was altered"
                )
        return {Path(name).stem: load_file(directory / name) for name in digests}, meta
    except DamagedFilesError:
        raise
    except FileNotFoundError as error:
        raise DamagedFilesError(f"expected a complete directory at {directory}, got no {error.filename}") from error
    except _CONTENT_ERRORS as error:
        raise DamagedFilesError(f"expected a complete directory at {directory}, got {error!r}") from error


def _replace(temporary: Path, directory: Path) -> None:
    """Put `temporary` in the place of `directory`; a crash in between leaves one of the two, both complete."""
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.replace(old)
    temporary.replace(directory)
    shutil.rmtree(old, ignore_errors=True)
