"""Where a run comes from: the tags that MLflow shows as user, source and commit."""

import os
import subprocess
from functools import cache
from pathlib import Path


def origin_tags() -> dict[str, str]:
    """MLflow's own tags for where a run came from."""
    tags = {"mlflow.source.type": "JOB", "mlflow.source.name": "pipeline.run"}
    if user := os.environ.get("USER"):
        tags["mlflow.user"] = user
    if commit := git_commit():
        tags["mlflow.source.git.commit"] = commit
    return tags


def git_commit() -> str | None:
    """The commit of the source that runs, with "-dirty" when files were changed; None outside a repository.

    Ray gives a job a copy of the working directory without its .git: there SPARTA_GIT_COMMIT says it.
    """
    return os.environ.get("SPARTA_GIT_COMMIT") or _commit_of_checkout()


@cache
def _commit_of_checkout() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
