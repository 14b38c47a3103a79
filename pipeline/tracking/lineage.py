"""Where a registered activation comes from: version -> run -> runs of the stages before it -> data and source."""

import json
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import TYPE_CHECKING, NamedTuple

from pipeline.config.tracking import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

DIGEST_TAG = "sparta.digest"
UPSTREAM_TAG = "sparta.upstream"
DATA_TAG = "sparta.data."
ACTIVATION_TAG = "activation"
DIGEST_PREFIX = "sha256:"
_GONE = " (no longer in MLflow)"
_SHOWN_TAGS = ("fingerprint", "mlflow.source.git.commit")


class Activation(NamedTuple):
    """A version of the registered model, pinned by number and digest."""

    name: str
    version: int
    digest: str
    run_id: str | None
    description: str
    tags: dict[str, str]
    aliases: tuple[str, ...]

    @property
    def reference(self) -> str:
        """The immutable reference: NAME/VERSION."""
        return f"{self.name}/{self.version}"


def describe_lineage(client: "MlflowClient", activation: Activation, uri: str) -> str:
    """Indented text, one line per fact; every run is told once."""
    aliases = f" ({', '.join(activation.aliases)})" if activation.aliases else ""
    lines = [f"{activation.reference}{aliases}", f"  files sha256:{activation.digest}"]
    lines += [f"  {key}: {value}" for key, value in sorted(activation.tags.items()) if key != DIGEST_TAG]
    if activation.run_id is None:
        return "\n".join([*lines, "  pushed by hand, without a run"])
    find = cache(partial(_find, client))
    run = find(activation.run_id)
    if run is None:
        return "\n".join([*lines, f"  made by run {activation.run_id}{_GONE}"])
    lines += [f"  {line}" for line in _tell(find, activation.run_id, f"made by {run.info.run_name}", set())]
    parent = run.data.tags.get("mlflow.parentRunId")
    if parent is not None:
        chain = find(parent)
        lines.append(
            f"  in chain {chain.info.run_name}, run {parent}, {redact(uri)}" if chain else f"  in run {parent}{_GONE}"
        )
    return "\n".join(lines)


def _tell(find: Callable[[str], "Run | None"], run_id: str, relation: str, told: set[str]) -> Iterator[str]:
    if run_id in told:
        yield f"{relation}, run {run_id} (above)"
        return
    told.add(run_id)
    run = find(run_id)
    if run is None:
        yield f"{relation}, run {run_id}{_GONE}"
        return
    yield f"{relation}, run {run_id}, {run.info.status}"
    for tag in _SHOWN_TAGS:
        if tag in run.data.tags:
            yield f"  {tag.removeprefix('mlflow.source.')}: {run.data.tags[tag]}"
    for tag, value in sorted(run.data.tags.items()):
        if tag.startswith(DATA_TAG):
            yield f"  {tag.removeprefix(DATA_TAG)} data: {value}"
    for stage, upstream in json.loads(run.data.tags.get(UPSTREAM_TAG, "{}")).items():
        if upstream is not None:
            yield from (f"  {line}" for line in _tell(find, upstream, f"from {stage}", told))


def _find(client: "MlflowClient", run_id: str) -> "Run | None":
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None  # `mlflow gc`, or another database
