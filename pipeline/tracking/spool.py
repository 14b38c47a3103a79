"""What is to be mirrored, kept on disk before anything is sent, so that an outage or a kill loses nothing.

`<root>/tracking/runs/<key>.json` describes a run: the intention, written by the chain.
`<root>/tracking/delivered/<target>/<key>.json` says how much of it a tracking server has: written after each delivery.
A run is pending while the two differ. Replaying is harmless, so a crash between sending and writing costs nothing.
"""

import hashlib
import json
import logging
import posixpath
import re
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from pipeline.artifacts import Below, write_atomic
from pipeline.config.base import Section, one_line
from pipeline.config.tracking import TrackingConfig, redact
from pipeline.tracking.journal import read_journal

_log = logging.getLogger(__name__)

_KEY_CHARS, _KEY_LENGTH = "_-. :/", 250
Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


class ArtifactFile(Section):
    """A local file or directory, and the folder of the run that it goes to."""

    path: Below
    folder: str = ""


class DatasetUse(Section):
    """A data set that a run read: its name, full digest, and what it was used for."""

    name: str
    digest: str
    context: str
    source: str = ""
    profile: dict[str, str | int | float] = Field(default_factory=dict)


class Registration(Section):
    """A bank directory that is to become a version of the registered model."""

    directory: Below
    digest: str
    tags: dict[str, str] = Field(default_factory=dict)
    description: str = ""
    alias: str | None = None


class RunRecord(Section):
    """One run, as it shall stand in MLflow."""

    key: str
    name: str
    parent: str | None = None
    upstream: dict[str, str] = Field(default_factory=dict)  # name of the stage -> key of its run
    started: int
    ended: int | None = None
    status: Status = "RUNNING"
    params: dict[str, str] = Field(default_factory=dict)
    tags: dict[str, str] = Field(default_factory=dict)
    journals: tuple[Below, ...] = ()
    artifacts: tuple[ArtifactFile, ...] = ()
    datasets: tuple[DatasetUse, ...] = ()
    activations: tuple[str, ...] = ()  # registered versions that the run used; until they are known, their digests
    registrations: tuple[Registration, ...] = ()

    @property
    def revision(self) -> str:
        """Digest of the record, to see whether it changed since it was delivered."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class Delivered(Section):
    """How much of a run one target has."""

    run_id: str | None = None
    revision: str = ""
    params: tuple[str, ...] = ()
    offsets: dict[str, int] = Field(default_factory=dict)  # journal -> bytes sent
    stamps: dict[str, str] = Field(default_factory=dict)  # artifact -> stamp of what was sent
    datasets: tuple[str, ...] = ()
    activations: tuple[str, ...] = ()
    versions: dict[str, int] = Field(default_factory=dict)  # digest of a bank -> version in the registry


class Spool:
    """The runs of one chain directory and what was delivered of them. Safe for several threads of one process."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root).absolute()
        self.directory = self.root / "tracking"
        self._lock = threading.RLock()
        self._told: set[str] = set()

    def records(self) -> list[RunRecord]:
        """All runs, parents before children, what a run uses before it, and otherwise older before newer.

        A record that cannot be read is passed over with a warning: the other runs are not to suffer from it.
        """
        read, unreadable = self._read()
        for line in unreadable:
            if line not in self._told:
                self._told.add(line)
                _log.warning("the record of a run is passed over: %s", line)
        found = sorted(read, key=lambda record: (record.started, record.key))
        by_key = {record.key: record for record in found}
        needs = {r.key: [key for key in (r.parent, *r.upstream.values()) if key in by_key] for r in found}
        # A clock that was set back makes what a run uses the newer one.
        return [by_key[key] for key in TopologicalSorter(needs).static_order()]

    def unreadable(self) -> list[str]:
        """The records that cannot be read, each with the reason."""
        return self._read()[1]

    def _read(self) -> tuple[list[RunRecord], list[str]]:
        found, unreadable = [], []
        for path in (self.directory / "runs").glob("[!.]*.json"):
            try:
                found.append(RunRecord.model_validate_json(path.read_bytes()))
            except ValidationError as error:
                unreadable.append(f"{path}: {one_line(error)}")
        return found, unreadable

    def save(self, record: RunRecord) -> RunRecord:
        """Write a run's record."""
        with self._lock:
            write_atomic(self.directory / "runs" / f"{record.key}.json", record.model_dump_json(indent=1))
        return record

    def update(self, key: str, **changes: Any) -> RunRecord:
        """Replace fields of a record; a callable value is applied to the old one."""
        with self._lock:
            old = self.load(key)
            new = {name: value(getattr(old, name)) if callable(value) else value for name, value in changes.items()}
            return self.save(old.model_copy(update=new))

    def load(self, key: str) -> RunRecord:
        """The record of a run; KeyError where there is none."""
        path = self.directory / "runs" / f"{key}.json"
        if not path.is_file():
            raise KeyError(key)
        return RunRecord.model_validate_json(path.read_bytes())

    def delivered(self, target: str, key: str) -> Delivered:
        """What `target` (a tracking uri) has of a run."""
        path = self._delivered_path(target, key)
        try:
            return Delivered.model_validate_json(path.read_bytes())
        except (FileNotFoundError, ValidationError):
            return Delivered()

    def save_delivered(self, target: str, key: str, delivered: Delivered) -> None:
        """Note what `target` has of a run."""
        write_atomic(self._delivered_path(target, key), delivered.model_dump_json(indent=1))

    def forget(self, target: str) -> None:
        """Take everything as not yet delivered to a target."""
        for record in self.records():
            self._delivered_path(target, record.key).unlink(missing_ok=True)

    def pending(self, target: str) -> list[RunRecord]:
        """The runs of which `target` lacks something, found without asking it."""
        return [r for r in self.records() if is_pending(r, self.delivered(target, r.key), self.root)]

    def aim(self, config: TrackingConfig, uri: str) -> None:
        """Note where the runs are to go, for `sync`; a uri with credentials stays in the environment: null."""
        public = uri if redact(uri) == uri else None
        kept = config.model_copy(update={"uri": public}).model_dump_json()
        path = self.directory / "target.json"
        if not path.is_file() or path.read_text(encoding="utf-8") != kept:
            write_atomic(path, kept)

    def target(self) -> TrackingConfig | None:
        """Where the runs are to go, without a uri when it holds credentials; None when that was never noted."""
        path = self.directory / "target.json"
        return TrackingConfig.model_validate_json(path.read_text(encoding="utf-8")) if path.is_file() else None

    def _delivered_path(self, target: str, key: str) -> Path:
        return self.directory / "delivered" / target_name(target) / f"{key}.json"


def new_key() -> str:
    """The identity of a run, known before any server is asked."""
    return uuid.uuid4().hex


def target_name(uri: str) -> str:
    """A directory name for a tracking uri, without its credentials."""
    public = redact(uri)
    label = re.sub(r"[^A-Za-z0-9.]+", "-", public.split("://")[-1])[-40:].strip("-")
    return f"{label}-{hashlib.sha256(public.encode()).hexdigest()[:8]}"


def outside(path: Path, root: Path) -> str | None:
    """Why a file, or a directory with its files, is not to be sent: a link leads out of `root`."""
    for file in (path, *path.rglob("*")):
        if not file.resolve().is_relative_to(root.resolve()):
            return f"expected files of the chain's own directory, got {file}, a link to {file.resolve()}"
    return None


def _holds_more(journal: Path, sent: int) -> bool:
    """Whether whole lines follow what was sent: one that a kill tore never becomes whole. The size says no at once."""
    return journal.is_file() and journal.stat().st_size > sent and read_journal(journal, sent)[1] > sent


def is_pending(record: RunRecord, delivered: Delivered, root: Path) -> bool:
    """Whether a record, a journal or an artifact holds something that was not delivered."""
    return (
        delivered.revision != record.revision
        or any(wanted.digest not in delivered.versions for wanted in record.registrations)
        or not set(record.activations) <= set(delivered.activations)
        or any(_holds_more(root / path, delivered.offsets.get(path, 0)) for path in record.journals)
        or any(
            stamp != delivered.stamps.get(a.path) for a in record.artifacts if (stamp := artifact_stamp(root / a.path))
        )
    )


def artifact_stamp(path: Path) -> str:
    """Size and modification time of a file, or of all files of a directory; empty when it does not exist."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.is_file() else []
    marks = [f"{file.relative_to(path.parent)}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join(marks).encode()).hexdigest() if marks else ""


def flatten(values: Mapping[str, Any]) -> dict[str, str]:
    """Nested settings as dotted names and text, credentials in URLs removed: {"a": {"b": 1}} -> {"a.b": "1"}."""
    return {
        plain_key(name): redact(value if isinstance(value, str) else json.dumps(value, default=str))
        for name, value in _leaves(values, "")
    }


def latest(runs: Iterable[RunRecord], name: str, *, parents: bool, fingerprint: str | None = None) -> RunRecord | None:
    """The newest chain run (`parents`) or stage run called `name`, and where one is given with this fingerprint."""
    named = [r for r in runs if r.name == name and (r.parent is None) == parents]
    named = [r for r in named if fingerprint in (None, r.tags.get("fingerprint"))]
    return max(named, key=lambda record: record.started, default=None)


def plain_key(key: str) -> str:
    """MLflow takes letters, digits and _-. :/ in the name of a metric, a parameter or a tag."""
    plain = "".join(c if c.isalnum() or c in _KEY_CHARS else "_" for c in key)[:_KEY_LENGTH]
    if posixpath.normpath(plain) != plain or plain.startswith(("/", "..")) or plain == ".":  # no name, but a path
        plain = f"_{plain.replace('/', '_')}"[:_KEY_LENGTH]
    return plain


def _leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
