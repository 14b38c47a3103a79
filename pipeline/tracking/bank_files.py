"""The files of an activation bank on their way into the registry and out of it: data only, and named by their digests.

A bank directory holds safetensors and JSON. Nothing that can carry code is let in or out: no pickle, no link, no
sub-directory, no name that leads out of the directory.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.artifacts import sha256_of

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.models import Model

SUFFIXES = (".safetensors", ".json")
MLMODEL = "MLmodel"
FLAVOUR = "sparta_models"
_MAX_FILES = 64


def manifest(directory: Path) -> dict[str, str]:
    """Name -> sha256 of every file of a bank directory.

    Raises ValueError when it is no directory, holds no safetensors file, or holds anything besides plain
    .safetensors and .json files.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(
            f"expected a bank directory, got {str(directory)!r}; write one with ActivationBank.save(directory)"
        )
    files = sorted(path for path in directory.iterdir() if path.name != MLMODEL)
    for path in files:
        if path.is_symlink() or not path.is_file() or path.suffix not in SUFFIXES:
            raise ValueError(
                f"expected only plain {' and '.join(SUFFIXES)} files in a bank directory, got {path.name!r} in "
                f"{str(directory)!r}; a bank needs a folder of its own, with bank.json and bank.safetensors alone"
            )
    if not any(path.suffix == ".safetensors" for path in files) or len(files) > _MAX_FILES:
        expected = f"1 to {_MAX_FILES} files with a .safetensors among them"
        raise ValueError(f"expected {expected} in {str(directory)!r}, got {len(files)} files")
    return {path.name: sha256_of(path) for path in files}


def combined_digest(files: dict[str, str]) -> str:
    """One sha256 for a manifest: what a version is pinned by."""
    # Not by artifacts.fingerprint: it escapes no names, and of those outside ASCII versions would change their digests.
    return hashlib.sha256(json.dumps(files, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def bank_digest(directory: Path) -> str:
    """Digest of a bank directory; see `manifest` for the errors."""
    return combined_digest(manifest(directory))


def verify(directory: Path, expected: str, origin: str) -> None:
    """Raise ValueError unless `directory` holds exactly the bank with the digest `expected`."""
    found = bank_digest(directory)
    if found != expected:
        raise ValueError(
            f"expected the files of {origin} to have digest {expected}, got {found}; they were altered, do not use them"
        )


def mlmodel(model: "LoggedModel", files: dict[str, str], digest: str, run_id: str | None) -> "Model":
    """The MLmodel beside the files of a bank: our flavour, their digests, float32 (B, C, H, W) in and out."""
    import numpy as np
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    tensor = TensorSpec(np.dtype(np.float32), (-1, -1, -1, -1))
    signature = ModelSignature(inputs=Schema([tensor]), outputs=Schema([tensor]))
    record = Model(
        artifact_path=model.artifact_location,
        run_id=run_id,
        model_uuid=model.model_id,
        model_id=model.model_id,
        signature=signature,
    )
    return record.add_flavor(FLAVOUR, format=1, digest=digest, files=files)
