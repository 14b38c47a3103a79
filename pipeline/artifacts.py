"""What a stage leaves behind: a record with its fingerprint and the digests of its files, and how both are checked.

    fingerprint = sha256(stage, version, its config sections, output digests of its upstream,
                         and their fingerprints where it passes on what they recorded)           known before it runs
    output digest = sha256 over (name, sha256) of its output files                               known after

Paths, hosts and times enter neither, so the same work has the same names everywhere; it lies below `runs_root`.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ValidationError

from pipeline.config.base import Section

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of the errors of a disk or a quota that has no room left."""
RECORD = "artifact.json"
STARTED = "started.json"
"""Marks a node that began, with its inputs."""
FAILED = "failed.txt"
"""Says why a node failed when it last ran."""
JOURNAL = "metrics.jsonl"
"""What a training tells while it runs, in its directory."""
MODEL = "model"
"""Where `load_model` finds the network that a training kept, in its directory."""
_CHUNK = 1 << 20
# Above this a file is verified by size and by blocks spread over it: hashing an ImageNet on every start is too slow.
_FULL_HASH_LIMIT = 1 << 28
_SAMPLED_BLOCKS = 64


def runs_root() -> Path:
    """Where chains and the MLflow database live: SPARTA_RUNS, else ./runs; in a Ray job ~/sparta-runs.

    A job's working directory is a copy that Ray deletes, so nothing that should last may be written there.
    """
    if explicit := os.environ.get("SPARTA_RUNS"):
        return Path(explicit).expanduser().absolute()
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return Path.home() / "sparta-runs"
    return Path("runs").absolute()


def _below(name: str) -> str:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"expected names below the record's directory, got {name}")
    return name


Below = Annotated[str, AfterValidator(_below)]
"""A name in a record that may come from elsewhere: what it names is sent or, damaged, deleted, and must lie below the
record's own directory."""


class FileDigest(Section):
    """Size in bytes and digest of one output file."""

    size: int
    sha256: str


class StageRecord(Section):
    """The artifact of a finished stage, stored as `artifact.json` in its directory."""

    stage: str
    branch: str
    fingerprint: str
    inputs: dict[str, Any]
    payload: dict[str, Any]
    outputs: dict[Below, FileDigest]
    """By name, below the stage's directory."""
    output_digest: str


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """Hex sha256 of everything that a stage's result depends on."""
    return hashlib.sha256(canonical(inputs).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Digest of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_file(path: Path) -> FileDigest:
    """Digest of a file; of a file above 256 MiB, of its size and 64 blocks spread evenly over it."""
    size = path.stat().st_size
    if size <= _FULL_HASH_LIMIT:
        return FileDigest(size=size, sha256=sha256_of(path))
    state = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for block in range(_SAMPLED_BLOCKS):
            file.seek(block * (size - _CHUNK) // (_SAMPLED_BLOCKS - 1))
            state.update(file.read(_CHUNK))
    return FileDigest(size=size, sha256=state.hexdigest())


def digest_outputs(directory: Path, names: Iterable[str]) -> dict[str, FileDigest]:
    """Digests of the named files under `directory`; the file must be there."""
    return {name: digest_file(directory / name) for name in sorted(names)}


def output_digest(outputs: Mapping[str, FileDigest]) -> str:
    """One digest for all output files."""
    return fingerprint({name: digest.sha256 for name, digest in outputs.items()})


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path`: the file written there is forced to disk and renamed, so readers see all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name alone, no file of mkstemp's, whose mode 0600 would hide it from other users of a shared filesystem.
    temporary = temporary_name(path)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:  # what is left of it would fill a full disk further
        temporary.unlink(missing_ok=True)
        raise


def remove_unfinished(directory: Path) -> None:
    """Remove, at any depth, what a kill left half-written under a `temporary_name`; only where nobody writes."""
    for path in list(directory.rglob(".*")):
        if re.fullmatch(r"\..+\.[0-9a-f]{32}", path.name):
            remove(path)


def temporary_name(path: Path) -> Path:
    """A name beside `path` for what is being written."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def write_atomic(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_record(directory: Path, record: StageRecord) -> None:
    """Store `record`; from this rename on the stage counts as done."""
    write_atomic(directory / RECORD, record.model_dump_json(indent=1))


def load_record(directory: Path) -> StageRecord | None:
    """The record of a finished stage, or None where there is none or it cannot be read."""
    try:
        return StageRecord.model_validate_json((directory / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError):
        return None


def damaged_outputs(directory: Path, record: StageRecord) -> Iterator[tuple[str, str]]:
    """The outputs of `record` that are not as they were written: name, and what is wrong with it in words."""
    for name, expected in record.outputs.items():
        path = directory / name
        if not path.is_file():
            yield name, f"output {name} is missing"
        elif path.stat().st_size != expected.size:
            yield name, f"output {name} has {path.stat().st_size} bytes, expected {expected.size}"
        elif digest_file(path) != expected:
            yield name, f"output {name} was altered"


def remove(path: Path) -> None:
    """Remove what is there, be it a file or somebody's folder in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


_USERS_FILES = "the files that data.path names"


def changed_inputs(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted names of what differs between two sets of inputs, each with both values: "training.epochs 8 -> 10"."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = sorted(set(old) | set(new))
        nested = (
            changed_inputs(old.get(name), new.get(name), f"{prefix}.{name}" if prefix else name) for name in names
        )
        return [change for changes in nested for change in changes]
    if old == new:
        return []
    # A stamp of what the user's files hold says nothing to a reader.
    return [_USERS_FILES] if prefix.endswith("data.source") else [f"{prefix} {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else canonical(value)
    return text if len(text) <= 24 else text[:10] + "..."
