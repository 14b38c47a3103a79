"""The files of a bank: bank.safetensors and bank.json, each written whole or not at all, and refused when anything is
amiss.

Both are on the disk and verified under temporary names before the first takes its place. A crash between the two
renames leaves files that don't belong together, which the sha256 in bank.json tells.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

SCHEMA = 1
TENSORS, META = "bank.safetensors", "bank.json"
_KEYS = {"schema", "activation", "architecture", "source", "sites", "digest", "sha256", "seal"}


def write_bank(directory: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
    """Write the tensors, then the description that names their sha256 and is sealed by its own.

    Raises:
        ValueError: for values that aren't finite.
    """
    from safetensors.torch import save

    _check_finite(directory / TENSORS, tensors)
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    sealed = {"schema": SCHEMA, **meta, "sha256": hashlib.sha256(data).hexdigest()}
    sealed["seal"] = _seal(sealed)
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(sealed, indent=1, sort_keys=True).encode()
    _write({directory / TENSORS: data, directory / META: text})
    return directory


def _write(contents: Mapping[Path, bytes]) -> None:
    # Opened by name, not by mkstemp, whose mode 0600 would hide the bank from other users of a shared filesystem.
    temporaries = {path: path.with_name(f".{path.name}.{uuid.uuid4().hex}") for path in contents}
    try:
        for path, temporary in temporaries.items():
            with temporary.open("xb") as file:
                file.write(contents[path])
                file.flush()
                os.fsync(file.fileno())
            if temporary.read_bytes() != contents[path]:
                raise OSError(f"{path} was not written as given")
        for path, temporary in temporaries.items():
            temporary.replace(path)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def read_bank(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read and check both files; returns the tensors and the description.

    Raises:
        ValueError: naming the file, what was expected and what came.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    meta = _read_meta(directory / META)
    data = _read(directory / TENSORS)
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != meta["sha256"]:
        raise ValueError(
            f"{directory / TENSORS}: expected sha256 {meta['sha256']}, got {sha256}; the file is damaged or altered"
        )
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ValueError(f"{directory / TENSORS}: expected a safetensors file, got: {error}") from error
    _check_finite(directory / TENSORS, tensors)
    return tensors, meta


def _check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.double().isfinite().all():
            raise ValueError(f"{path}: expected finite values, got NaN or infinity in {name!r}")


def _seal(meta: Mapping[str, Any]) -> str:
    """sha256 over everything else in the description."""
    rest = {key: value for key, value in meta.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"expected a bank with {TENSORS} and {META}, got no readable {path}: {error.strerror}"
        ) from error


def _read_meta(path: Path) -> dict[str, Any]:
    data = _read(path)
    try:
        meta = json.loads(data)
        seal = _seal(meta) if isinstance(meta, dict) else None
    # Besides what isn't JSON: numbers too long for Python (a ValueError), and lists in lists without end.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got: {error}") from error
    if not isinstance(meta, dict) or meta.get("schema") != SCHEMA:
        got = meta.get("schema") if isinstance(meta, dict) else type(meta).__name__
        raise ValueError(f"{path}: expected schema {SCHEMA}, got {got}; write the bank again with this version")
    if set(meta) != _KEYS:
        raise ValueError(f"{path}: expected keys {sorted(_KEYS)}, got {sorted(meta)}")
    if meta["seal"] != seal:
        raise ValueError(f"{path}: expected seal {seal}, got {meta['seal']}; the file is altered")
    return meta
