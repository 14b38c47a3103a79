"""Where a registered activation comes from: version -> run -> runs of the stages before it -> data and source."""

import json
from collections.abc import Iterator
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
    run = client.get_run(activation.run_id)
    lines += [f"  {line}" for line in _tell(client, run, "made by", set())]
    parent = run.data.tags.get("mlflow.parentRunId")
    if parent is not None:
        chain = client.get_run(parent)
        lines.append(f"  in chain {chain.info.run_name}, run {parent}, {redact(uri)}")
    return "\n".join(lines)


def _tell(client: "MlflowClient", run: "Run", relation: str, told: set[str]) -> Iterator[str]:
    name, run_id = run.info.run_name, run.info.run_id
    if run_id in told:
        yield f"{relation} {name}, run {run_id} (above)"
        return
    told.add(run_id)
    yield f"{relation} {name}, run {run_id}, {run.info.status}"
    for tag in _SHOWN_TAGS:
        if tag in run.data.tags:
            yield f"  {tag.removeprefix('mlflow.source.')}: {run.data.tags[tag]}"
    for tag, value in sorted(run.data.tags.items()):
        if tag.startswith(DATA_TAG):
            yield f"  {tag.removeprefix(DATA_TAG)} data: {value}"
    for upstream in json.loads(run.data.tags.get(UPSTREAM_TAG, "{}")).values():
        if upstream is not None:
            yield from (f"  {line}" for line in _tell(client, client.get_run(upstream), "from", told))
