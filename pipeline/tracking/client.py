"""A client of MLflow that fails fast, and a database that is migrated once.

MLflow's own defaults retry a dead server for minutes and let several processes migrate a fresh SQLite file together.
"""

import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from filelock import FileLock

from pipeline.artifacts import DISK_FULL
from pipeline.config.tracking import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SQLITE = "sqlite:///"
# What a server says when it is there and does not want this: to be reported, not to be waited for.
ANSWERS = (
    "INVALID_PARAMETER_VALUE",
    "RESOURCE_DOES_NOT_EXIST",
    "INVALID_STATE",
    "RESOURCE_ALREADY_EXISTS",
    "BAD_REQUEST",
    "PERMISSION_DENIED",
)


def open_client(uri: str, *, request_timeout: int = 5) -> "MlflowClient":
    """Connect to a tracking server or database; a SQLite file is created and migrated under a lock.

    Raises mlflow.exceptions.MlflowException, or OSError, when it cannot be reached.
    """
    _configure(request_timeout)
    from mlflow import MlflowClient

    path = sqlite_path(uri)
    if path is None:
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)  # the first query migrates
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
        connection.close()
    return client


@contextmanager
def reaching(uri: str) -> Iterator[None]:
    """Turn whatever a missing server or database raises into a ConnectionError with one readable line."""
    try:
        yield
    except (ConnectionError, ValueError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise  # this machine's disk, whoever wrote to it
        code = getattr(error, "error_code", None)
        if code in ANSWERS or not (code or isinstance(error, OSError) or _is_database_error(error)):
            raise
        raise ConnectionError(f"MLflow at {redact(uri)} cannot be reached: {first_line(error)}") from error


@contextmanager
def fetching(what: str) -> Iterator[None]:
    """The store of files answers by a library of its own: with an error of that one it is as good as away."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError | ValueError) or hasattr(error, "error_code"):
            raise
        raise ConnectionError(f"{what} cannot be fetched: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What an exception says, without the pages and the credentials that may come with it."""
    return redact(next(iter(str(error).splitlines()), type(error).__name__))[:300]


def _is_database_error(error: Exception) -> bool:
    from sqlalchemy.exc import DBAPIError

    return isinstance(error, DBAPIError)


def experiment_id(client: "MlflowClient", uri: str, name: str) -> str:
    """The id of an experiment, made when it is new; with SQLite its artifacts lie beside the database."""
    from mlflow.exceptions import MlflowException

    path = sqlite_path(uri)
    location = (path.parent / "mlartifacts").as_uri() if path else None
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)  # another process was first
    if experiment is None or experiment.lifecycle_stage != "active":
        raise ValueError(
            f"expected an active MLflow experiment {name!r}, got a deleted one; restore it or set tracking.experiment"
        )
    return str(experiment.experiment_id)


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite uri, else None."""
    return Path(unquote(uri[len(_SQLITE) :].split("?", maxsplit=1)[0])).absolute() if uri.startswith(_SQLITE) else None


def _configure(request_timeout: int) -> None:
    settings = {
        # A slow server would do twice what is asked twice, and make two runs; the spool replays what was missed.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(request_timeout),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_RECORD_ENV_VARS_IN_MODEL_LOGGING": "false",
        # Files go through the server: its S3-type store need not be reachable from here.
        "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
        "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def default_store(uri: str) -> Iterator[None]:
    """Make a database MLflow's default for the moment: it looks up models:/ sources there, whatever client asks."""
    import mlflow

    if uri.startswith("http"):
        yield
        return
    environment = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # forgets it, and the environment variable with it
        if environment is not None:
            os.environ["MLFLOW_TRACKING_URI"] = environment
