"""What the chain is made of: a node is one stage applied to one branch (one data set, one model)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from pipeline.artifacts import StageRecord
from pipeline.stages.services import Services
from pipeline.tracking import StageRun

Task = TypeVar("Task")
Made = TypeVar("Made")


class StageResult(NamedTuple):
    """What a stage makes of one task: facts for the stages after it, and its output files, below its directory."""

    payload: dict[str, Any]
    outputs: list[str]
    digest: str | None = None
    """Identity of the output where files that differ can mean the same; None: the digests of the files."""
    said: str = ""
    """What came out, in a few words for the terminal."""


class Finished(NamedTuple):
    """A finished upstream node: where its files are and what it recorded."""

    directory: Path
    record: StageRecord


@dataclass(frozen=True)
class StageContext(Generic[Task]):
    """What a stage gets for one node."""

    key: str
    """The node's name in the chain."""
    task: Task
    """Its configuration."""
    directory: Path
    """Its own directory; what an interrupted run left there is still there."""
    upstream: Mapping[str, Finished]
    """The nodes named in `Node.needs`, finished."""
    run: StageRun
    """The MLflow run of this node."""
    services: Services
    """Ray and the registry, started when first asked for."""


Runner = Callable[[Sequence[StageContext[Task]]], Sequence[StageResult | Exception]]
"""Runs a stage for several nodes at once, and returns for each its result or why it failed."""


@dataclass(frozen=True)
class Node(Generic[Task]):
    """One unit of the chain: done once, skipped while its inputs and outputs are unchanged."""

    stage: str
    branch: str
    task: Task
    sections: Mapping[str, Any]
    """JSON values of exactly the settings that the result depends on."""
    runner: Runner[Task]
    """Runs the stage."""
    needs: tuple[str, ...] = ()
    version: int = 1
    """Raised when the stage's code makes something else of the same inputs."""
    together: bool = False
    """Whether neighbours of the same runner that are ready at the same time are handed to it in one call."""
    reads_records: bool = False
    """Whether it passes on what the records of its upstream say, as accuracies, and not their files alone."""
    trains: bool = False
    """Whether it asks the cluster for the workers of `scaling`."""

    @property
    def key(self) -> str:
        """Name in the chain, e.g. "transfer:digits-5-9"."""
        return f"{self.stage}:{self.branch}"


def attempt(part: Callable[[StageContext[Task]], Made], context: StageContext[Task]) -> Made | Exception:
    """What `part` makes of one node, or its exception: a branch that fails takes no other along; the chain says it."""
    try:
        return part(context)
    except Exception as error:
        return error


def one_by_one(stage: Callable[[StageContext[Task]], StageResult]) -> Runner[Task]:
    """A runner that calls `stage` for each node in turn."""
    return lambda contexts: [attempt(stage, context) for context in contexts]
