"""Where the user's files are: a path as it is, else inside SPARTA_DATA, else fetched from an fsspec URL."""

import os
from pathlib import Path

from pipeline.data.errors import DataError


def as_url(location: str | Path) -> str | None:
    """The fsspec URL that a location is, or None; a `Path` has lost slashes of its URL, which come back."""
    scheme, separator, rest = str(location).partition(":/")
    if not separator or len(scheme) < 2 or "/" in scheme:
        return None
    return f"{scheme}:///{rest.lstrip('/')}" if scheme == "file" else f"{scheme}://{rest.lstrip('/')}"


def resolve_path(location: str, key: str) -> Path:
    """The local path of a file or folder the user named in the setting `key`.

    Raises:
        DataError: nothing is there; names the places that were looked at.
    """
    if url := as_url(location):
        from pipeline.data.remote import fetch_file

        return fetch_file(url)
    path = Path(location).expanduser()
    tried = [path.absolute()]
    base = os.environ.get("SPARTA_DATA")
    if not path.is_absolute() and base:
        tried.append(Path(base).expanduser() / path)
    for candidate in tried:
        if candidate.exists():
            return candidate
    places = " and ".join(str(p) for p in tried)
    raise DataError(
        f"{key}={location!r}: no such file or folder; looked at {places}. Correct {key}, or set SPARTA_DATA"
    )
