"""The registry of frozen activations: versions with an alias, checked by digest on the way in and on the way out.

A version is a small MLflow model of our own flavour: the files of `ActivationBank.save` beside an MLmodel that lists
their sha256. The digest is also a tag of the version, so that a store that swaps file and manifest together is noticed.
"""

import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from filelock import FileLock

from pipeline.artifacts import DISK_FULL
from pipeline.config.tracking import TrackingConfig, redact
from pipeline.tracking import bank_files
from pipeline.tracking.client import (
    ANSWERS,
    default_store,
    experiment_id,
    fetching,
    first_line,
    open_client,
    reaching,
    sqlite_path,
)
from pipeline.tracking.lineage import DIGEST_TAG, Activation, describe_lineage

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

_ALIAS = re.compile(r"^(?!latest$|v\d+$)[A-Za-z][\w-]{0,99}$")
_REFERENCE = re.compile(r"^(?P<name>[^/:@\s]+)(?:@(?P<alias>[A-Za-z][\w-]*)|/(?P<version>[1-9]\d*))$")
_SOURCE = re.compile(r"^models:/(m-[0-9a-f]{32})$")
_PAUSES = (0.1, 0.2, 0.4, 0.8, 1.6)  # seconds at most
_CONTENTION = ("Giving up after", "IntegrityError", "UniqueViolation")


P = ParamSpec("P")
R = TypeVar("R")


def _reaching(method: Callable[Concatenate["Registry", P], R]) -> Callable[Concatenate["Registry", P], R]:
    """A method that raises ConnectionError when MLflow is away, and ValueError when it refuses."""

    @wraps(method)
    def guarded(self: "Registry", /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with reaching(self.uri):
                return method(self, *args, **kwargs)
        except Exception as error:
            if getattr(error, "error_code", None) not in ANSWERS:
                raise
            raise ValueError(f"MLflow at {redact(self.uri)} refuses: {first_line(error)}") from error

    return guarded


class Registry:
    """Versions of frozen activations in the MLflow registry; `root` is where the default database lies.

    Its methods raise ConnectionError when MLflow cannot be reached, and ValueError when it refuses: something was
    deleted there, or there is no right to it.
    """

    def __init__(self, config: TrackingConfig, root: Path) -> None:
        self.config = config
        self.uri = config.resolved_uri(Path(root))
        self._client: MlflowClient | None = None

    @property
    def client(self) -> "MlflowClient":
        """The MLflow client, connected on first use."""
        if self._client is None:
            self._client = open_client(self.uri, request_timeout=self.config.request_timeout)
        return self._client

    @_reaching
    def register(
        self,
        directory: Path,
        run_id: str | None = None,
        *,
        tags: Mapping[str, str] | None = None,
        description: str = "",
        alias: str | None = "candidate",
    ) -> Activation:
        """Make a bank directory a new version; the same bank of the same run is registered once.

        Raises ValueError for a directory that is no bank, or a reserved alias.
        """
        _check_alias(alias)
        files = bank_files.manifest(directory)
        digest = bank_files.combined_digest(files)
        with self._write_lock():
            version = self._registered(digest, run_id)
            known = version is not None
            if version is None:
                model_id = self._log_model(Path(directory), files, digest, run_id)
                version = self._create_version(model_id, run_id, {**(tags or {}), DIGEST_TAG: digest}, description)
            # What is registered again, by a late or a second delivery, takes no alias from a newer version.
            if alias and not (known and any(v.version > version and alias in v.aliases for v in self.versions())):
                name = self.config.registry_model
                _contended(lambda: self.client.set_registered_model_alias(name, alias, str(version)))
        return self.resolve(f"{self.config.registry_model}/{version}")

    @_reaching
    def resolve(self, reference: str, *, digest: str | None = None) -> Activation:
        """Look up NAME@ALIAS or NAME/VERSION. ValueError when it is malformed, unknown, not one of ours, or when its
        files have another digest than the one given."""
        from mlflow.exceptions import MlflowException

        match = _REFERENCE.match(reference)
        if match is None:
            raise ValueError(
                f"expected NAME@ALIAS or NAME/VERSION, got {reference!r}, e.g. {self.config.registry_model}@candidate"
            )
        try:
            if match["alias"]:
                found = self.client.get_model_version_by_alias(match["name"], match["alias"])
            else:
                found = self.client.get_model_version(match["name"], match["version"])
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise ValueError(
                f"{reference!r} is not in the registry; known: {', '.join(self._known()) or 'nothing yet'}"
            ) from error
        pinned = self._pinned(found)
        if digest is not None and pinned.digest != digest:
            raise ValueError(
                f"expected {reference} with files {digest[:12]}, got {pinned.digest[:12]}: not the registry "
                "that the activation was registered in"
            )
        return pinned

    @_reaching
    def versions(self) -> list[Activation]:
        """All versions of the configured model that this pipeline registered, newest first."""
        found = self.client.search_model_versions(f"name = '{self.config.registry_model}'")
        aliases = self._aliases()
        ours = [version for version in found if DIGEST_TAG in version.tags]
        pinned = [self._pinned(version, aliases.get(int(version.version), ())) for version in ours]
        return sorted(pinned, key=lambda activation: -activation.version)

    @_reaching
    def holding(self, digest: str) -> Activation:
        """The newest version whose files have this digest. ValueError when there is none."""
        for found in self.versions():
            if found.digest == digest:
                return found
        raise ValueError(f"expected a version of {self.config.registry_model} with digest {digest}, got none so far")

    @_reaching
    def set_alias(self, reference: str, alias: str) -> None:
        """Point an alias at a version."""
        _check_alias(alias)
        found = self.resolve(reference)
        self.client.set_registered_model_alias(found.name, alias, str(found.version))

    @_reaching
    def set_tags(self, reference: str, tags: Mapping[str, str]) -> None:
        """Set tags of a version; the digest tag cannot be changed."""
        if DIGEST_TAG in tags:
            raise ValueError(f"expected tags other than {DIGEST_TAG}, which pins the content of a version")
        found = self.resolve(reference)
        for key, value in tags.items():
            self.client.set_model_version_tag(found.name, str(found.version), key, value)

    @_reaching
    def remove_tags(self, reference: str, keys: Iterable[str]) -> None:
        """Remove tags of a version, where it has them; the digest tag cannot be removed."""
        if DIGEST_TAG in (wanted := set(keys)):
            raise ValueError(f"expected tags other than {DIGEST_TAG}, which pins the content of a version")
        found = self.resolve(reference)
        for key in sorted(wanted & found.tags.keys()):
            self.client.delete_model_version_tag(found.name, str(found.version), key)

    @_reaching
    def pull(self, reference: str, directory: Path) -> Activation:
        """Put the files of a version into `directory`, all or nothing, and return the version, pinned.

        A directory that already holds this version is left as it is. Raises ValueError when the files do not match the
        digest of the version, when the version is not one of ours, or when `directory` holds something else or cannot
        be written to.
        """
        found = self.resolve(reference)
        directory = Path(directory).resolve()  # "." cannot be replaced
        if _has_content(directory):
            bank_files.verify(directory, found.digest, found.reference)
            return found
        with _writing_to(directory):
            directory.parent.mkdir(parents=True, exist_ok=True)
            scratch = tempfile.TemporaryDirectory(dir=directory.parent, prefix=".pull-")
        with scratch as place:
            files = self._download(found, Path(place))
            (files / bank_files.MLMODEL).unlink(missing_ok=True)
            bank_files.verify(files, found.digest, found.reference)
            with _writing_to(directory):
                files.replace(directory)
        return found

    @_reaching
    def lineage(self, reference: str, *, digest: str | None = None) -> str:
        """The way from a version to the runs, data and source it comes from, as indented text.

        Raises ValueError as `resolve` does.
        """
        return describe_lineage(self.client, self.resolve(reference, digest=digest), self.uri)

    @_reaching
    def model_id(self, activation: Activation) -> str:
        """MLflow's id of the logged model behind a version."""
        version = self.client.get_model_version(activation.name, str(activation.version))
        match = _SOURCE.match(version.source or "")
        if match is None:
            raise ValueError(
                f"expected {activation.reference} to come from a logged model, got source {version.source!r}; "
                "register it again"
            )
        return match[1]

    def _download(self, activation: Activation, scratch: Path) -> Path:
        from mlflow.artifacts import download_artifacts

        model, directory = self.client.get_logged_model(self.model_id(activation)), scratch / "files"
        directory.mkdir()
        with fetching(f"the files of {activation.reference}"):
            for entry in self.client.list_logged_model_artifacts(model.model_id):
                if entry.is_dir or Path(entry.path).name != entry.path:
                    raise ValueError(
                        f"expected plain file names in {activation.reference}, got {entry.path!r}; "
                        "do not use this version"
                    )
            place = model.artifact_location
            return Path(download_artifacts(artifact_uri=place, dst_path=str(directory), tracking_uri=self.uri))

    def _log_model(self, directory: Path, files: dict[str, str], digest: str, run_id: str | None) -> str:
        from mlflow.entities import LoggedModelOutput

        experiment = (
            self.client.get_run(run_id).info.experiment_id
            if run_id
            else experiment_id(self.client, self.uri, self.config.experiment)
        )
        model = self.client.create_logged_model(
            experiment,
            name="activation-bank",
            source_run_id=run_id,
            tags={DIGEST_TAG: digest},
            model_type="activation-bank",
        )
        try:
            self._upload(model, directory, files, digest, run_id)
        except Exception:
            with suppress(Exception):  # every attempt would leave one without files
                self.client.delete_logged_model(model.model_id)
            raise
        self.client.finalize_logged_model(model.model_id, "READY")
        if run_id:
            self.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        return str(model.model_id)

    def _upload(
        self, model: "LoggedModel", directory: Path, files: dict[str, str], digest: str, run_id: str | None
    ) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            for name in files:
                shutil.copyfile(directory / name, Path(scratch) / name)
            bank_files.verify(Path(scratch), digest, str(directory))
            bank_files.mlmodel(model, files, digest, run_id).save(str(Path(scratch) / bank_files.MLMODEL))
            self.client.log_model_artifacts(model.model_id, scratch)

    def _create_version(self, model_id: str, run_id: str | None, tags: dict[str, str], description: str) -> int:
        from mlflow.exceptions import MlflowException

        name = self.config.registry_model
        try:
            self.client.create_registered_model(name, description="Frozen, transferable activations")
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"models:/{model_id}"
        with default_store(self.uri):
            version = _contended(
                lambda: self.client.create_model_version(
                    name, source=source, run_id=run_id, tags=tags, description=description, model_id=model_id
                )
            )
        return int(version.version)

    def _registered(self, digest: str, run_id: str | None) -> int | None:
        if run_id is None:
            return None
        found = self.client.search_model_versions(f"name = '{self.config.registry_model}' and run_id = '{run_id}'")
        return next((int(version.version) for version in found if version.tags.get(DIGEST_TAG) == digest), None)

    def _pinned(self, version: "ModelVersion", aliases: tuple[str, ...] | None = None) -> Activation:
        digest = version.tags.get(DIGEST_TAG)
        if digest is None:
            raise ValueError(
                f"expected {version.name}/{version.version} to carry the tag {DIGEST_TAG}; "
                "it was not registered by this pipeline"
            )
        return Activation(
            name=version.name,
            version=int(version.version),
            digest=digest,
            run_id=version.run_id or None,
            description=version.description or "",
            tags=dict(version.tags),
            aliases=tuple(version.aliases) if aliases is None else aliases,
        )

    def _aliases(self) -> dict[int, tuple[str, ...]]:
        from mlflow.exceptions import MlflowException

        try:
            model = self.client.get_registered_model(self.config.registry_model)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return {}
        grouped: dict[int, tuple[str, ...]] = {}
        for alias, version in sorted(model.aliases.items()):
            grouped[int(version)] = (*grouped.get(int(version), ()), alias)
        return grouped

    def _known(self) -> list[str]:
        name = self.config.registry_model
        return [f"{name}@{alias}" for aliases in self._aliases().values() for alias in aliases] + [
            a.reference for a in self.versions()
        ]

    @contextmanager
    def _write_lock(self) -> Iterator[None]:
        # On a server `_contended` has to do. On one SQLite file the processes would wait for each other all the time.
        path = sqlite_path(self.uri)
        self.client  # noqa: B018  connects, and migrates, before the lock is taken
        with FileLock(f"{path}.registry.lock") if path else nullcontext():
            yield


def _has_content(directory: Path) -> bool:
    return directory.exists() and not (directory.is_dir() and not any(directory.iterdir()))


@contextmanager
def _writing_to(directory: Path) -> Iterator[None]:
    """A place that cannot be written to is no server that is away."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise ValueError(f"expected a folder that can be written, got {directory} ({error.strerror})") from error


def _contended(call: Callable[[], R]) -> R:
    """Call MLflow again, after a random while, as long as it says that another process was quicker.

    A version is "highest + 1" there, tried three times; an alias is looked up and then inserted.
    """
    from mlflow.exceptions import MlflowException

    for pause in _PAUSES:
        try:
            return call()
        except MlflowException as error:
            if not any(mark in str(error) for mark in _CONTENTION):
                raise
        time.sleep(random.uniform(0, pause))  # noqa: S311 - only to part the processes
    return call()


def _check_alias(alias: str | None) -> None:
    if alias is not None and not _ALIAS.match(alias):
        raise ValueError(
            f"expected an alias of letters, digits, - and _ that is neither latest nor v<number>, got {alias!r}"
        )
