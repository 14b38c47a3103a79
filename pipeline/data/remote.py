"""Files that are not on this node's disk: fsspec URLs, and copies made once per node."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from pipeline.artifacts import DISK_FULL
from pipeline.config.base import one_line
from pipeline.data.errors import DataError, DataUnreachableError
from pipeline.data.sidecar import (
    RECORD_NAME,
    Sidecar,
    check_file,
    json_text,
    read_sidecar,
    sidecar_path,
)
from sparta_models.kernels import cache_root

if TYPE_CHECKING:
    from pipeline.data.prepared import PreparedData, SplitInfo

_LASTING = (
    FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError, ImportError, ValueError
)  # fmt: skip
_ADVICE = "check the address and your credentials, and the space where SPARTA_CACHE is"


def fetch_file(url: str) -> Path:
    """A local copy of a remote file, made once per machine and content.

    Raises:
        DataError: it cannot be read, or did not arrive whole.
    """
    with _one_error(f"{url}: cannot be read", _ADVICE):
        system, remote = _open_url(url)
        info, stamp = system.info(remote), system.ukey(remote)
        if info.get("type") == "directory":
            raise DataError(f"{url}: expected a file, got a folder")
        place = cache_root() / "fetched" / sha256(f"{url} {stamp}".encode()).hexdigest()[:16] / Path(remote).name
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.parent / ".lock"):
            # A stamp may be that of the address alone (http), and a copy may have been cut: the size tells.
            if not place.exists() or info.get("size") not in (None, place.stat().st_size):
                _download(system, remote, place, info.get("size"))
    return place


def fetch_prepared(url: str) -> Path:
    """A local copy of prepared data behind a URL, made once per node; a file that is damaged there is fetched again.

    Raises:
        DataError: it cannot be read, or a file did not arrive whole.
    """
    from pipeline.data.prepared import PreparedData

    with _one_error(f"{url}: cannot be read", _ADVICE):
        system, remote = _open_url(url)
        record = system.cat_file(f"{remote}/{RECORD_NAME}")
        folder = cache_root() / "prepared" / sha256(record).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            (folder / f".{RECORD_NAME}.part").write_bytes(record)
            (folder / f".{RECORD_NAME}.part").replace(folder / RECORD_NAME)
            prepared = PreparedData.load(folder)
            for split in prepared.splits:
                try:
                    prepared.check(split)
                except DataError:
                    for place in (sidecar_path(prepared.path(split)), prepared.path(split)):
                        _download(system, f"{remote}/{place.name}", place, None)
                    prepared.check(split)
    return folder


def publish(directory: Path, url: str) -> str:
    """Copy prepared data to a folder below a URL, the record last, leaving out files that are there already.

    The folder is named by the data's digest, and data that lie there whole are left as they are, even where another
    preparation of them wrote other bytes: nothing that somebody reads is written over but the record.
    Returns its URL, for `PreparedData.load`.

    Raises:
        DataError: it cannot be written.
    """
    from pipeline.data.prepared import PreparedData

    prepared = PreparedData.load(directory)
    place = f"{url.rstrip('/')}/{prepared.digest[:16]}"
    with _one_error(f"data.mirror={url}: cannot be written", "check the address and your credentials"):
        system, remote = _open_url(place)
        system.makedirs(remote, exist_ok=True)
        there = _splits_there(system, remote, prepared)
        if there is None:
            for name in (part for file in prepared.files for part in (file, f"{file}.json")):
                if not _is_there(system, f"{remote}/{name}", directory / name):
                    system.put_file(str(directory / name), f"{remote}/{name}")
        record = prepared.model_copy(update={"splits": there or prepared.splits}).model_dump(mode="json")
        content = json_text(record).encode()
        if not _holds(system, f"{remote}/{RECORD_NAME}", content):
            system.pipe_file(f"{remote}/{RECORD_NAME}", content)
    return place


def _splits_there(system: Any, remote: str, prepared: "PreparedData") -> "dict[str, SplitInfo] | None":
    """What the record there says of the splits, if they are there whole, in files of the same names."""
    from pipeline.data.prepared import PreparedData

    try:
        there = PreparedData.model_validate_json(system.cat_file(f"{remote}/{RECORD_NAME}"))
        for split in there.splits.values():
            sidecar = Sidecar.model_validate_json(system.cat_file(f"{remote}/{split.file}.json"))
            if (sidecar.sha256, sidecar.size) != (split.sha256, system.size(f"{remote}/{split.file}")):
                return None
    except (FileNotFoundError, ValueError):
        return None
    return there.splits if there.files == prepared.files else None


def copy_to_node(path: Path, cache: Path) -> Path:
    """A verified copy of a split file and its sidecar on this node's own disk, made once per node and content.

    Raises:
        DataError: the folder cannot be written to, or the copy is not the file that its sidecar describes.
    """
    sidecar = read_sidecar(path)
    folder = cache / sidecar.sha256[:16]
    copy = folder / path.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            try:
                check_file(copy, read_sidecar(copy))
            except DataError:
                _replace_by_copy(path, copy)
                _replace_by_copy(sidecar_path(path), sidecar_path(copy))
                check_file(copy, sidecar)
    except OSError as error:
        raise _kind(error)(
            f"data.node_cache={str(cache)!r}: {path} cannot be copied there ({error}); make room there"
        ) from error
    return copy


def _replace_by_copy(source: Path, target: Path) -> None:
    """Under a name of its own first, always the same: the caller holds the folder's lock."""
    temporary = target.with_name(f".{target.name}.part")
    try:
        shutil.copyfile(source, temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _one_error(what: str, advice: str) -> Iterator[None]:
    """Whatever goes wrong as a DataError: the errors of botocore, google and aiohttp share no base but Exception."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise _kind(error)(f"{what} ({type(error).__name__}: {one_line(error)}); {advice}") from error


def _kind(error: Exception) -> type[DataError]:
    """What an error is for the data: one that another try will not change is known by the types that fsspec asks its
    backends for, and those of the local disk."""
    lasting = isinstance(error, _LASTING) or (isinstance(error, OSError) and error.errno in (*DISK_FULL, errno.EROFS))
    return DataError if lasting else DataUnreachableError


def _open_url(url: str) -> tuple[Any, str]:
    import fsspec

    system, remote = fsspec.core.url_to_fs(url.rstrip("/"))
    return system, str(remote)


def _download(system: Any, remote: str, place: Path, size: int | None) -> None:
    """Fetch a file of so many bytes, where that is known; the caller holds the folder's lock."""
    temporary = place.with_name(f".{place.name}.part")
    try:
        system.get_file(remote, str(temporary))
        got = temporary.stat().st_size
        if size not in (None, got):
            raise DataUnreachableError(f"{remote}: expected {size:,} bytes, got {got:,}; try again")
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)


def _is_there(system: Any, remote: str, local: Path) -> bool:
    """Whether the remote file has this content; a sidecar vouches for its file."""
    if local.suffix == ".json":
        return _holds(system, remote, local.read_bytes())
    if not system.exists(remote) or system.size(remote) != local.stat().st_size:
        return False
    return _holds(system, f"{remote}.json", sidecar_path(local).read_bytes())


def _holds(system: Any, remote: str, content: bytes) -> bool:
    return bool(system.exists(remote) and system.cat_file(remote) == content)
