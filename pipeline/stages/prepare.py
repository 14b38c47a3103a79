"""prepare: a data set becomes verified files that every worker can read."""

from dataclasses import dataclass

from pipeline.config.data import DataConfig
from pipeline.data import identity, prepare
from pipeline.stages.node import Node, StageContext, StageResult, one_by_one


@dataclass(frozen=True)
class PrepareTask:
    """One data set."""

    data: DataConfig
    seed: int


def prepare_node(branch: str, task: PrepareTask) -> Node[PrepareTask]:
    """The node that prepares one data set. Its identity is its settings and the content read, not where that lies."""
    sections = {"data": identity(task.data), "seed": task.seed}
    return Node("prepare", branch, task, sections, run_prepare)


def _prepare(context: StageContext[PrepareTask]) -> StageResult:
    prepared = prepare(context.task.data, context.directory, seed=context.task.seed)
    context.run.dataset(prepared.name, prepared.digest, context="prepare")
    splits = [name for split in prepared.splits.values() for name in (split.file, f"{split.file}.json")]
    return StageResult({"name": prepared.name}, [*splits, "prepared.json"], prepared.digest)


run_prepare = one_by_one(_prepare)
