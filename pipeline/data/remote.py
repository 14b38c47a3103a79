"""Files that are not on this node's disk: fsspec URLs, and copies made once per node."""

import json
import shutil
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipeline.data.errors import DataError
from pipeline.data.sidecar import RECORD_NAME, cache_root, check_file, file_sha256, read_sidecar, sidecar_path


def fetch_file(url: str) -> Path:
    """A local copy of a remote file, made once per machine and content.

    Raises:
        DataError: it cannot be read.
    """
    system, remote = _open_url(url)
    try:
        stamp = system.ukey(remote)
    except (OSError, ValueError) as error:
        raise DataError(f"{url}: cannot be read ({error}); check the address and your credentials") from error
    place = cache_root() / "fetched" / sha256(f"{url} {stamp}".encode()).hexdigest()[:16] / Path(remote).name
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.parent / ".lock"):
        if not place.exists():
            _download(system, remote, place, url)
    return place


def fetch_prepared(url: str) -> Path:
    """A local copy of prepared data behind a URL: each file verified against its sidecar, once per node.

    Raises:
        DataError: it cannot be read, or a file did not arrive whole.
    """
    from pipeline.data.prepared import PreparedData

    system, remote = _open_url(url)
    record = fetch_file(f"{url.rstrip('/')}/{RECORD_NAME}")
    content = record.read_bytes()
    folder = cache_root() / "prepared" / sha256(content).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if not (folder / RECORD_NAME).exists():
            for name in PreparedData.load(record.parent).files:
                target = folder / name
                for place in (sidecar_path(target), target):
                    _download(system, f"{remote.rstrip('/')}/{place.name}", place, url)
                check_file(target, read_sidecar(target))
            shutil.copyfile(record, folder / RECORD_NAME)
    return folder


def publish(directory: Path, url: str) -> str:
    """Copy prepared data to a folder below a URL, the record last, leaving out files that are there already.

    The folder is named by the data's digest, so other data, or changed ones, never write over what somebody reads.
    Returns its URL, for `PreparedData.load`.

    Raises:
        DataError: it cannot be written.
    """
    record = json.loads((directory / RECORD_NAME).read_text())
    place = f"{url.rstrip('/')}/{record['digest'][:16]}"
    system, remote = _open_url(place)
    names = [split["file"] for split in record["splits"].values()]
    try:
        system.makedirs(remote, exist_ok=True)
        for name in [part for file in names for part in (file, f"{file}.json")] + [RECORD_NAME]:
            if not _is_there(system, f"{remote.rstrip('/')}/{name}", directory / name):
                system.put_file(str(directory / name), f"{remote.rstrip('/')}/{name}")
    except (OSError, ValueError) as error:
        raise DataError(f"data.mirror={url}: cannot be written ({error}); check the address and credentials") from error
    return place


def copy_to_node(path: Path, cache: Path) -> Path:
    """A verified copy of a split file and its sidecar on this node's own disk, made once per node and content.

    Raises:
        DataError: the copy is not the file that its sidecar describes.
    """
    sidecar = read_sidecar(path)
    folder = cache / sidecar.sha256[:16]
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / path.name
    with FileLock(folder / ".lock"):
        try:
            check_file(copy, read_sidecar(copy))
        except DataError:
            _replace_by_copy(path, copy)
            _replace_by_copy(sidecar_path(path), sidecar_path(copy))
            check_file(copy, sidecar)
    return copy


def _replace_by_copy(source: Path, target: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as temporary:
        pass
    shutil.copyfile(source, temporary.name)
    Path(temporary.name).replace(target)


def _open_url(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        system, remote = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: {error}") from error
    return system, str(remote)


def _download(system: Any, remote: str, place: Path, url: str) -> None:
    temporary = place.with_name(f".{place.name}.part")
    try:
        system.get_file(remote, str(temporary))
    except (OSError, ValueError) as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{url}: {Path(remote).name} cannot be fetched ({error})") from error
    temporary.replace(place)


def _is_there(system: Any, remote: str, local: Path) -> bool:
    """Whether the remote file has this content; a sidecar vouches for its file."""
    if not system.exists(remote) or system.size(remote) != local.stat().st_size:
        return False
    if local.suffix == ".json":
        return bool(sha256(system.cat_file(remote)).hexdigest() == file_sha256(local))
    sidecar = f"{remote}.json"
    return bool(system.exists(sidecar) and system.cat_file(sidecar) == sidecar_path(local).read_bytes())
