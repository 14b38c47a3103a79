"""What a chain says about itself: one run for the chain, one child run per stage, all written to disk first.

    tracker = Tracker(config, root)
    with tracker.chain("demo", params=config.model_dump()) as chain:
        with chain.stage("pretrain", params=..., tags={"fingerprint": ...}, upstream={"prepare": ...}) as stage:
            stage.mirror(output / "metrics.jsonl")

Nothing in here waits for MLflow, except the end of a chain and a registration, both for at most `close_seconds`. A
rerun in the same root goes on with the same runs, as long as their settings are the same and they had not ended well.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.config.tracking import TrackingConfig, redact
from pipeline.tracking.bank_files import bank_digest
from pipeline.tracking.client import sqlite_path
from pipeline.tracking.delivery import Delivery
from pipeline.tracking.flusher import Flusher
from pipeline.tracking.journal import Journal, read_history
from pipeline.tracking.origin import origin_tags
from pipeline.tracking.spool import (
    ArtifactFile,
    DatasetUse,
    Registration,
    RunRecord,
    Spool,
    Status,
    flatten,
    latest,
    new_key,
)

_log = logging.getLogger(__name__)

_KILL_SECONDS = 2.5  # a killed chain has three seconds until it must be gone


class Tracker:
    """Mirrors the runs below `root` (the output directory of a chain) to MLflow."""

    def __init__(self, config: TrackingConfig, root: Path) -> None:
        self.config = config
        self.spool = Spool(root)
        self.uri = config.resolved_uri(self.spool.root)
        self.delivery = Delivery(config, self.spool)
        self._flusher: Flusher | None = None
        self._lock = threading.Lock()

    def chain(
        self, name: str, *, params: Mapping[str, Any] | None = None, tags: Mapping[str, str] | None = None
    ) -> "ChainRun":
        """The run of a chain, to be entered with `with`; it begins with the first thing said about it."""
        return ChainRun(self, name, flatten(params or {}), {**origin_tags(), **(tags or {})})

    def start(self) -> None:
        """Begin to deliver in the background, once."""
        with self._lock:
            if self.config.enabled and self._flusher is None:
                self._flusher = Flusher(self.delivery, self.config.flush_seconds)

    def flush(self, timeout: float) -> bool:
        """Wait until all that was said so far is delivered; False after `timeout` seconds, or when MLflow is away."""
        return self._flusher.flush(timeout) if self._flusher else not self.pending()

    def pending(self) -> int:
        """How many runs hold something that MLflow does not have."""
        return len(self.spool.pending(self.uri))

    def close(self, *, killed: bool = False) -> None:
        """Deliver what is left and stop; say how to deliver later what could not be."""
        if self._flusher is not None:
            if killed:  # the ends of the runs must not queue behind an upload
                threading.Thread(target=self.delivery.end_runs, daemon=True).start()
            self._flusher.stop(_KILL_SECONDS if killed else self.config.close_seconds)
            self._flusher = None
        if self.config.enabled and (left := self.pending()):
            named = sqlite_path(self.uri) is None and redact(self.uri) == self.uri  # `sync` asks for it
            _log.warning(
                "%d runs are not in MLflow (%s) yet; deliver them with: python -m pipeline.tracking sync %s%s",
                left,
                redact(self.uri),
                f"--uri {self.uri} " if named else "",
                self.spool.root,
            )


class Run:
    """A run, ended by its `with` as FINISHED, FAILED (an exception) or KILLED (Ctrl-C, or SIGTERM as SystemExit)."""

    def __init__(self, tracker: Tracker, name: str, params: dict[str, str], tags: dict[str, str]) -> None:
        self.tracker = tracker
        self.name = name
        self._params = params
        self._tags = tags
        self._record: RunRecord | None = None
        self._journal: Journal | None = None
        self._failed = False
        self._lock = threading.RLock()

    @property
    def key(self) -> str:
        """The identity of the run in the spool; begins the run when it has not begun."""
        return self._begin().key

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None as long as it was not delivered."""
        if self._record is None:
            return None
        return self.tracker.spool.delivered(self.tracker.uri, self._record.key).run_id

    def mirror(self, journal: Path) -> None:
        """Deliver a journal's metrics while it grows; the file need not exist yet.

        An earlier run of the same journal keeps what it was sent: what is written from here on is this run's.
        """
        name, spool = self._relative(journal), self.tracker.spool
        for other in spool.records():
            if name in other.journals and other.key != self.key:
                spool.update(other.key, journals=lambda old: tuple(one for one in old if one != name))
        self._update(journals=lambda old: old if name in old else (*old, name))

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics of this run itself, into a journal of its own.

        Without a step they are figures that may be told again: those that have changed, at the next free step.
        """
        if self._journal is None:
            self._journal = Journal(self.tracker.spool.directory / "metrics" / f"{self.key}.jsonl")
            self.mirror(self._journal.path)
        if step is None:
            told = read_history(self._journal.path)
            values = {key: value for key, value in values.items() if key not in told or told[key][-1][1] != value}
            step = 1 + max((last for key in values for last, _ in told.get(key, ())), default=-1)
        self._journal.log(values, step)

    def artifact(self, path: Path, folder: str = "") -> None:
        """Upload a file or a directory into `folder` of the run, and again whenever it changes."""
        entry = ArtifactFile(path=self._relative(path), folder=folder)
        self._update(artifacts=lambda old: old if entry in old else (*old, entry))

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        self._update(tags=lambda old: {**old, **flatten(tags)})

    def dataset(
        self,
        name: str,
        digest: str,
        *,
        context: str = "training",
        source: str = "",
        profile: Mapping[str, str | int | float] | None = None,
    ) -> None:
        """Name a data set as an input of the run; `digest` is its full sha256."""
        use = DatasetUse(name=name, digest=digest, context=context, source=source, profile=dict(profile or {}))
        self._update(datasets=lambda old: old if use in old else (*old, use))

    def activation(self, reference: str) -> None:
        """Name a registered activation as an input of the run: the version's page then links here.

        reference: NAME/VERSION. Before MLflow has told the version, "sha256:" and the digest of the bank's files: the
        delivery then finds the version, and tags the run with it.
        """
        self._update(activations=lambda old: old if reference in old else (*old, reference))

    def register(
        self,
        directory: Path,
        *,
        tags: Mapping[str, str] | None = None,
        description: str = "",
        alias: str | None = "candidate",
    ) -> str | None:
        """Register a bank directory as made by this run: its reference NAME/VERSION, or None when MLflow is away.

        In the latter case `sync`, or a later delivery, registers it. Raises ValueError when the directory is no bank.
        """
        digest = bank_digest(directory)
        wanted = Registration(
            directory=self._relative(directory),
            digest=digest,
            tags=flatten(tags or {}),
            description=description,
            alias=alias,
        )
        self._update(registrations=lambda old: (*(r for r in old if r.digest != digest), wanted))
        self.tracker.flush(self.tracker.config.close_seconds)
        version = self.tracker.spool.delivered(self.tracker.uri, self.key).versions.get(digest)
        return None if version is None else f"{self.tracker.config.registry_model}/{version}"

    def fail(self) -> None:
        """End as FAILED also where no exception reaches the `with`, e.g. when one branch of several failed."""
        self._failed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._journal is not None:
            self._journal.close()
        if self._record is not None:
            self._update(status=self._outcome(kind), ended=_now())

    def _outcome(self, kind: type[BaseException] | None) -> Status:
        if kind is None:
            return "FAILED" if self._failed else "FINISHED"
        return "FAILED" if issubclass(kind, Exception) else "KILLED"

    def _begin(self) -> RunRecord:
        with self._lock:  # the stages of several threads may be the first to say something about their chain
            if self._record is None:
                self._record = self._continued_or_new()
                self.tracker.spool.aim(self.tracker.config, self.tracker.uri)
                self.tracker.start()
            return self._record

    def _continued_or_new(self) -> RunRecord:
        raise NotImplementedError

    def _continue(self, old: RunRecord | None, again: Callable[[RunRecord], bool], **place: Any) -> RunRecord:
        spool = self.tracker.spool
        if old is not None and old.params == self._params and again(old):
            return spool.update(old.key, status="RUNNING", ended=None, tags={**old.tags, **self._tags}, **place)
        started = max(_now(), old.started + 1 if old else 0)  # newer, also when the clock was set back
        return spool.save(
            RunRecord(key=new_key(), name=self.name, started=started, params=self._params, tags=self._tags, **place)
        )

    def _update(self, **changes: Any) -> None:
        self._record = self.tracker.spool.update(self.key, **changes)

    def _relative(self, path: Path) -> str:
        path, root = Path(path).absolute(), self.tracker.spool.root
        if not path.is_relative_to(root):
            raise ValueError(f"expected a path below {root}, got {path}")
        return str(path.relative_to(root))


class StageRun(Run):
    """The run of one stage, a child of its chain's run."""

    def __init__(
        self, chain: "ChainRun", name: str, params: dict[str, str], tags: dict[str, str], upstream: Mapping[str, str]
    ) -> None:
        super().__init__(chain.tracker, name, params, tags)
        self._chain = chain
        self._upstream = upstream

    def __enter__(self) -> Self:
        self._begin()
        return self

    def _continued_or_new(self) -> RunRecord:
        runs = self.tracker.spool.records()  # read once: a study's stages have hundreds of them upstream
        found = {
            name: run.key
            for name, fingerprint in self._upstream.items()
            if (run := latest(runs, name, parents=False, fingerprint=fingerprint)) is not None
        }
        old = latest(runs, self.name, parents=False)
        return self._continue(old, self._goes_on, parent=self._chain.key, upstream=found)

    def _goes_on(self, old: RunRecord) -> bool:
        """Whether `old` is this stage, interrupted, rather than an earlier one that ended or was cleared away."""
        same = old.tags.get("fingerprint") == self._tags.get("fingerprint")
        sent = self.tracker.spool.delivered(self.tracker.uri, old.key).offsets
        sizes = {
            name: path.stat().st_size if (path := self.tracker.spool.root / name).is_file() else 0
            for name in old.journals
        }
        return same and old.status != "FINISHED" and all(sizes[name] >= sent.get(name, 0) for name in old.journals)


class ChainRun(Run):
    """The run of a chain, the parent of its stages' runs."""

    def stage(
        self,
        name: str,
        *,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        upstream: Mapping[str, str] | None = None,
    ) -> StageRun:
        """A child run; `tags["fingerprint"]` says what it computes, `upstream` the stages whose outputs it uses, with
        their fingerprints: since they ran, others of the same name may have."""
        return StageRun(self, name, flatten(params or {}), {**origin_tags(), **(tags or {})}, upstream or {})

    def __enter__(self) -> Self:
        if self.tracker.config.enabled and self.tracker.pending():
            self.tracker.start()  # left over from an outage
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        killed = kind is not None and not issubclass(kind, Exception)
        self.tracker.close(killed=killed)

    def _continued_or_new(self) -> RunRecord:
        # A finished chain that has something to add is the same chain: a forced stage, or one whose output was lost.
        return self._continue(latest(self.tracker.spool.records(), self.name, parents=True), lambda old: True)


def _now() -> int:
    return time.time_ns() // 1_000_000
