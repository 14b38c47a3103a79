"""prepare: a data set becomes verified files that every worker can read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.chain import TransferTarget
from pipeline.config.data import DataConfig
from pipeline.data import BAD_IMAGES, PreparedData, identity, prepare, publish
from pipeline.stages.node import Node, StageContext, StageResult, one_by_one

SOURCE_DATA = "prepare:source"
"""Key of the node that prepares what the source is trained on."""


@dataclass(frozen=True)
class PrepareTask:
    """One data set."""

    data: DataConfig
    seed: int


def data_key(target: TransferTarget) -> str:
    """Key of the node that prepares a target's images: its own, or those of the source."""
    return f"prepare:{target.name}" if target.data is not None else SOURCE_DATA


def prepare_node(branch: str, task: PrepareTask, *, planning: bool = False) -> Node[PrepareTask]:
    """The node that prepares one data set. Its identity is its settings and a stamp of what the user's files hold, not
    where they lie.

    When `planning`, the user's files need not be there yet.
    """
    sections = {"data": identity(task.data, planning=planning), "seed": task.seed}
    return Node("prepare", branch, task, sections, run_prepare)


def _prepare(context: StageContext[PrepareTask]) -> StageResult:
    prepared = prepare(context.task.data, context.directory, seed=context.task.seed)
    context.run.dataset(prepared.name, prepared.digest, context="prepare")
    splits = [name for split in prepared.splits.values() for name in (split.file, f"{split.file}.json")]
    counts = ", ".join(f"{prepared.splits[name].count:,} {name}" for name in ("train", "val", "test"))
    said = f"{counts} images of {prepared.num_classes} classes"
    ledger = context.directory / BAD_IMAGES
    if ledger.is_file() and (left_out := ledger.read_text(encoding="utf-8").splitlines()):
        said += f"; {len(left_out)} files left out ({ledger})"
    return StageResult({"name": prepared.name}, [*splits, "prepared.json"], prepared.digest, said)


run_prepare = one_by_one(_prepare)


def workers_data(context: StageContext[Any], key: str) -> tuple[PreparedData, Path]:
    """The data of the prepare node `key`, and where workers on any node find them.

    That is the node's folder or, with `data.mirror`, their place in the mirror. The mirror is no part of the data's
    identity, so it may be set after they were prepared: what it lacks is sent now.
    """
    directory, config = context.upstream[key].directory, context.services.config
    prepared = PreparedData.load(directory)
    own = {data_key(target): target.data for target in config.transfer if target.data is not None}
    mirror = own.get(key, config.data).mirror
    return prepared, directory if mirror is None else Path(publish(directory, mirror))
