"""Bring MLflow up to what the spool holds. Every step may be repeated: a replay adds nothing.

Metrics carry the time of their first logging, so that MLflow recognises a point it already has; a run is found again by
its key; what was sent is noted after each step.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from filelock import FileLock

from pipeline.config.tracking import TrackingConfig, redact
from pipeline.tracking.client import ANSWERS, experiment_id, first_line, open_client, reaching
from pipeline.tracking.journal import read_journal
from pipeline.tracking.lineage import ACTIVATION_TAG, DATA_TAG, DIGEST_PREFIX, UPSTREAM_TAG
from pipeline.tracking.registry import Registry
from pipeline.tracking.spool import (
    DatasetUse,
    Delivered,
    RunRecord,
    Spool,
    artifact_stamp,
    outside,
    plain_key,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput

_log = logging.getLogger(__name__)

KEY_TAG = "sparta.key"
_METRICS_PER_CALL = 1000
_ENTRIES_PER_CALL = 100  # of params and of tags
_PARAM_CHARS = 6000
_TAG_CHARS = 8000
_DATASET_DIGEST_CHARS = 36
_PATIENCE_SECONDS = 60.0  # within which a server that was too slow to answer makes the run it was asked for

T = TypeVar("T")


class Delivery:
    """Delivers a spool to one target; the connection is kept from pass to pass."""

    def __init__(self, config: TrackingConfig, spool: Spool) -> None:
        self.config = config
        self.spool = spool
        self.uri = config.resolved_uri(spool.root)
        self.registry = Registry(config, spool.root)
        self.client: MlflowClient | None = None
        self._experiment = ""
        self._asked: dict[str, float] = {}  # key of a run that a server may still be making -> when

    def run(self) -> list[str]:
        """Deliver what is pending; return what the server refused, one line each.

        Raises ConnectionError when the server cannot be reached: whatever is left stays pending.
        """
        refused: list[str] = []
        with FileLock(self.spool.directory / "delivery.lock"), reaching(self.uri):
            for record in self.spool.pending(self.uri):
                refused += self._guarded(record)
        return refused

    def end_runs(self) -> None:
        """Tell MLflow at once which runs have ended; where that fails, the deliveries in their order say it again."""
        if self.client is None:
            return
        try:
            for record in self.spool.pending(self.uri):
                run_id = self.spool.delivered(self.uri, record.key).run_id
                if run_id is not None and record.status != "RUNNING":
                    self.client.set_terminated(run_id, status=record.status, end_time=record.ended)
        except Exception:
            _log.debug("the ends of the runs are left to the next delivery", exc_info=True)

    def _guarded(self, record: RunRecord) -> list[str]:
        self._connect()
        from mlflow.exceptions import MlflowException

        try:
            try:
                return self._deliver(record)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                # The database was emptied, or is another one by now: the local files fill it anew.
                self.spool.save_delivered(self.uri, record.key, Delivered())
                self.client = None
                self._connect()
                return self._deliver(record)
        except MlflowException as error:
            if error.error_code not in ANSWERS:
                raise
            return [f"{record.name}: {error.message}"]
        except ValueError as error:
            return [f"{record.name}: {error}"]

    def _connect(self) -> None:
        if self.client is None:
            client = open_client(self.uri, request_timeout=self.config.request_timeout)
            self._experiment = experiment_id(client, self.uri, self.config.experiment)
            self.client = client

    def _deliver(self, record: RunRecord) -> list[str]:
        done = self.spool.delivered(self.uri, record.key)
        refused: list[str] = []
        steps: Sequence[Callable[[RunRecord, Delivered], Delivered]] = (
            self._run,
            self._params_and_tags,
            partial(self._metrics, refused),
            self._datasets,
            self._status,
            # What depends on a store of files, or on other runs, is refused one by one and holds up nothing.
            partial(self._registrations, refused),
            partial(self._artifacts, refused),
            partial(self._activations, refused),
        )
        for step in steps:
            after = step(record, done)
            if after != done:
                self.spool.save_delivered(self.uri, record.key, after)
            done = after
        return [f"{record.name}: {line}" for line in refused]

    @contextmanager
    def _one_by_one(self, refused: list[str], done: Delivered, what: str) -> Iterator[None]:
        """Note why one thing cannot be delivered and go on: it stays pending."""
        try:
            yield
        except Exception as error:
            self._mlflow.get_run(_id(done))  # it raises where the reason is a server that is away, or a lost run
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            refused.append(f"{what}: {kind}{first_line(error)}")

    @property
    def _mlflow(self) -> "MlflowClient":
        assert self.client is not None
        return self.client

    def _run(self, record: RunRecord, done: Delivered) -> Delivered:
        if done.run_id is not None:
            return done
        found = self._mlflow.search_runs([self._experiment], f"tags.`{KEY_TAG}` = '{record.key}'", max_results=1)
        if found:  # created before a crash that kept it from being noted
            return done.model_copy(update={"run_id": found[0].info.run_id})
        if time.monotonic() < self._asked.get(record.key, -math.inf) + _PATIENCE_SECONDS:
            raise ConnectionError(
                f"MLflow at {redact(self.uri)} was asked for the run {record.name} and has not made it yet"
            )
        tags = {KEY_TAG: record.key}
        try:
            run = self._mlflow.create_run(self._experiment, start_time=record.started, tags=tags, run_name=record.name)
        except Exception as error:
            if self.uri.startswith("http") and getattr(error, "error_code", None) not in ANSWERS:
                self._asked[record.key] = time.monotonic()
            raise
        return done.model_copy(update={"run_id": run.info.run_id})

    def _params_and_tags(self, record: RunRecord, done: Delivered) -> Delivered:
        from mlflow.entities import Param, RunTag

        if done.revision == record.revision:
            return done
        params = [Param(k, _cut(v, _PARAM_CHARS)) for k, v in record.params.items() if k not in done.params]
        for params_chunk in _chunks(params, _ENTRIES_PER_CALL):
            self._mlflow.log_batch(_id(done), params=params_chunk)
        upstream = {name: self.spool.delivered(self.uri, key).run_id for name, key in record.upstream.items()}
        tags = {**record.tags, **({UPSTREAM_TAG: json.dumps(upstream)} if upstream else {})}
        parent = self.spool.delivered(self.uri, record.parent).run_id if record.parent else None
        if parent is not None:
            tags["mlflow.parentRunId"] = parent
        for tags_chunk in _chunks([RunTag(k, _cut(v, _TAG_CHARS)) for k, v in tags.items()], _ENTRIES_PER_CALL):
            self._mlflow.log_batch(_id(done), tags=tags_chunk)
        return done.model_copy(update={"params": tuple(record.params)})

    def _metrics(self, refused: list[str], record: RunRecord, done: Delivered) -> Delivered:
        from mlflow.entities import Metric

        offsets = dict(done.offsets)
        for name in record.journals:
            path = self.spool.root / name
            if (reason := outside(path, self.spool.root)) is not None:
                refused.append(f"{name}: {reason}")
                continue
            start = offsets.get(name, 0)
            if path.is_file() and path.stat().st_size < start:
                start = 0
            entries, offsets[name] = read_journal(path, start)
            points = [
                Metric(plain_key(k), v, entry.time, entry.step) for entry in entries for k, v in entry.metrics.items()
            ]
            for chunk in _chunks(points, _METRICS_PER_CALL):
                self._mlflow.log_batch(_id(done), metrics=chunk)
        return done.model_copy(update={"offsets": offsets})

    def _datasets(self, record: RunRecord, done: Delivered) -> Delivered:
        fresh = [use for use in record.datasets if f"{use.digest}:{use.context}" not in done.datasets]
        if fresh:
            self._mlflow.log_inputs(_id(done), datasets=[_dataset_input(use) for use in fresh])
            for use in fresh:
                self._mlflow.set_tag(_id(done), f"{DATA_TAG}{use.context}", f"{use.name} sha256:{use.digest}")
        return done.model_copy(update={"datasets": (*done.datasets, *(f"{use.digest}:{use.context}" for use in fresh))})

    def _registrations(self, refused: list[str], record: RunRecord, done: Delivered) -> Delivered:
        versions = dict(done.versions)
        for wanted in record.registrations:
            if wanted.digest in versions:
                continue
            with self._one_by_one(refused, done, wanted.directory):
                directory = self.spool.root / wanted.directory
                _require_inside(directory, self.spool.root)
                version = self.registry.register(
                    directory, _id(done), tags=wanted.tags, description=wanted.description, alias=wanted.alias
                )
                versions[wanted.digest] = version.version
        return done.model_copy(update={"versions": versions})

    def _artifacts(self, refused: list[str], record: RunRecord, done: Delivered) -> Delivered:
        stamps = dict(done.stamps)
        for artifact in record.artifacts:
            path = self.spool.root / artifact.path
            stamp = artifact_stamp(path)
            if not stamp or stamp == stamps.get(artifact.path):
                continue
            with self._one_by_one(refused, done, artifact.path):
                _require_inside(path, self.spool.root)
                if path.is_dir():
                    folder = "/".join(filter(None, (artifact.folder, path.name)))
                    self._mlflow.log_artifacts(_id(done), str(path), folder)
                else:
                    self._mlflow.log_artifact(_id(done), str(path), artifact.folder or None)
                stamps[artifact.path] = stamp
        return done.model_copy(update={"stamps": stamps})

    def _activations(self, refused: list[str], record: RunRecord, done: Delivered) -> Delivered:
        from mlflow.entities import LoggedModelInput

        activations = list(done.activations)
        for reference in record.activations:
            if reference in activations:
                continue
            with self._one_by_one(refused, done, reference):
                _, _, digest = reference.partition(DIGEST_PREFIX)
                found = self.registry.holding(digest) if digest else self.registry.resolve(reference)
                self._mlflow.log_inputs(_id(done), models=[LoggedModelInput(self.registry.model_id(found))])
                self._mlflow.set_tag(_id(done), ACTIVATION_TAG, found.reference)
                activations.append(reference)
        return done.model_copy(update={"activations": tuple(activations)})

    def _status(self, record: RunRecord, done: Delivered) -> Delivered:
        if done.revision == record.revision:
            return done
        if record.status == "RUNNING":
            self._mlflow.update_run(_id(done), status="RUNNING")
        else:
            self._mlflow.set_terminated(_id(done), status=record.status, end_time=record.ended)
        return done.model_copy(update={"revision": record.revision})


def _id(done: Delivered) -> str:
    assert done.run_id is not None
    return done.run_id


def _dataset_input(use: DatasetUse) -> "DatasetInput":
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=use.name,
        digest=use.digest[:_DATASET_DIGEST_CHARS],
        source_type="local",
        source=json.dumps({"uri": use.source}),
        profile=json.dumps(use.profile) if use.profile else None,
    )
    return DatasetInput(dataset, tags=[InputTag("mlflow.data.context", use.context)])


def _require_inside(path: Path, root: Path) -> None:
    if (reason := outside(path, root)) is not None:
        raise ValueError(reason)


def _cut(value: str, limit: int) -> str:
    """MLflow cuts in silence; ours is seen to be cut."""
    return value if len(value) <= limit else value[: limit - 4] + " ..."


def _chunks(values: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(values)
    while chunk := list(islice(iterator, size)):
        yield chunk
