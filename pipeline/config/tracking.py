"""Where runs are mirrored to and under which names. It changes no result, so it is in no fingerprint."""

import os
import re
from pathlib import Path

from pydantic import Field, field_validator

from pipeline.config.base import Section

_USER = re.compile(r"(?<=://)[^/\s]*@")  # up to the last @ before the path: a password may hold one, too
# A database's URL as SQLAlchemy reads it: a password may hold "/", "?", quotes and blanks, up to an @ of the same line.
_LOGIN = re.compile(
    r"(\b(?:postgres\w*|mysql|mariadb|mssql|oracle)(?:\+\w+)?://)([^:/\s]*(?::[^@\n]*)?@(?:[^\s\"'@]*@)*)",
    re.IGNORECASE,
)
_SECRETS = "password|passwd|pwd|token|secret|signature|credential|api_?key|access_?key"
_QUERY = re.compile(rf"([?&](?:sig|[^=&\s]{{0,80}}(?:{_SECRETS})[^=&\s]{{0,80}})=)[^&\s]*", re.IGNORECASE)

DATABASE = "mlflow.db"


class TrackingConfig(Section):
    """The MLflow mirror of the local files, and the registry of the activations."""

    enabled: bool = True
    """Deliver to MLflow in the background. When false all is kept locally, for `python -m pipeline.tracking sync`."""
    uri: str | None = None
    """Server or database, e.g. "http://127.0.0.1:5000". None: MLFLOW_TRACKING_URI, else SQLite in the run root."""
    experiment: str = Field(default="sparta", min_length=1, max_length=200)
    """MLflow experiment that the runs belong to."""
    registry_model: str = Field(default="sparta-activation", pattern=r"^[^/:@\s]{1,200}$")
    """Registered model whose versions are the frozen activations."""
    flush_seconds: float = Field(default=2.0, gt=0, le=600)
    """Pause between two deliveries in the background."""
    close_seconds: float = Field(default=60.0, ge=0, le=600)
    """How long the end of a chain, or a registration, waits for the delivery before leaving it to `sync`.

    A first use makes the database, half a minute on a slow machine; a server that refuses is not waited for."""
    request_timeout: int = Field(default=5, ge=1, le=600)
    """Seconds one HTTP request may take; it is not repeated at once, because the journal replays what was missed."""

    @field_validator("uri")
    @classmethod
    def _no_password(cls, uri: str | None) -> str | None:
        if uri is None:
            return None
        if not re.match(r"^(sqlite|https?|postgresql(\+\w+)?|mysql(\+\w+)?)://", uri):
            raise ValueError(
                "expected a tracking uri that starts with sqlite:///, http(s)://, postgresql:// or mysql://, "
                f"got {redact(uri)!r}"
            )
        if has_password(uri):
            raise ValueError(
                f"expected a uri without a password, got {redact(uri)!r}; set MLFLOW_TRACKING_URI instead, "
                "or for a server MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return uri

    def resolved_uri(self, root: Path) -> str:
        """The uri in use: this section's, else MLFLOW_TRACKING_URI, else `root`/mlflow.db."""
        return self.uri or os.environ.get("MLFLOW_TRACKING_URI") or database_uri(root)


def database_uri(root: Path) -> str:
    """Of the database that lies in a root where nothing else is named."""
    path = str(root.absolute()).replace("%", "%25").replace("?", "%3F")  # else taken for parts of a URL
    return f"sqlite:///{path}/{DATABASE}"


def has_password(url: str) -> bool:
    """Whether a URL holds a password in front of its host, or a password, token or signature in its query."""
    login, user = _LOGIN.search(url), _USER.search(url)
    before_host = (login[2] if login else "") + (user[0] if user else "")
    return ":" in before_host or _QUERY.search(url) is not None


def redact(text: str) -> str:
    """Replace the user and password of every URL in `text`, and the secrets of its query, by "***".

    Of a database's URL rather too much than too little: where its password ends, only the rest of the line can tell.
    """
    shown = _QUERY.sub(r"\1***", _USER.sub("***@", text))
    return _LOGIN.sub(r"\1***@", shown)  # last: a secret of the query may hold an @
