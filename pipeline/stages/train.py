"""pretrain and transfer: networks trained in Ray Train workers, with a learnable activation or with a frozen one."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.artifacts import JOURNAL, MODEL
from pipeline.cluster import launch_many
from pipeline.config.chain import ChainConfig, TransferTarget
from pipeline.config.data import AugmentConfig
from pipeline.config.model import ActivationConfig, ModelConfig
from pipeline.config.training import TrainingConfig
from pipeline.stages.freeze import FrozenBank
from pipeline.stages.node import Node, StageContext, StageResult, attempt
from pipeline.stages.prepare import data_key, workers_data
from pipeline.tracking import DIGEST_PREFIX, Entry, bank_digest
from pipeline.training import TrainedModel, TrainJob

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainTask:
    """One network to train."""

    model: ModelConfig
    augment: AugmentConfig
    training: TrainingConfig
    seed: int
    data: str
    """Key of the node that prepared the data."""
    bank: str | None = None
    """Key of the node that froze the activation; None: the network's own activation is trained."""
    adapt: str | None = None
    """How the bank is fitted to other channel widths."""


def target_task(
    config: ChainConfig, target: TransferTarget, activation: ActivationConfig, *, seed: int, bank: str | None = None
) -> TrainTask:
    """The training of one of a target's networks: what the target leaves open is as at the source.

    Args:
        activation: what stands at its sites.
        bank: key of the node that froze it; None: it is trained.
    """
    architecture = target.model or config.model
    return TrainTask(
        model=ModelConfig(name=architecture.name, options=architecture.options, activation=activation),
        augment=target.augment or config.augment,
        training=target.training or config.training,
        seed=seed,
        data=data_key(target),
        bank=bank,
        adapt=None if bank is None else target.adapt,
    )


def train_node(key: str, task: TrainTask) -> Node[TrainTask]:
    """The node `key` that trains one network. How often it writes checkpoints is not its identity."""
    stage, _, branch = key.partition(":")
    sections = {
        "model": task.model.model_dump(mode="json") | {"activation": task.model.activation.spec()},
        "augment": task.augment.model_dump(mode="json"),
        "training": task.training.model_dump(mode="json", exclude={"checkpoint"}),
        "seed": task.seed,
        "adapt": task.adapt,
    }
    needs = (task.data,) if task.bank is None else (task.data, task.bank)
    version = training_version(task.training)
    return Node(stage, branch, task, sections, run_training, needs, version=version, together=True, trains=True)


def training_version(training: TrainingConfig) -> int:
    """Of what the same settings come to."""
    # 2: AWP's own forward pass no longer moves running statistics; FGSM-RS notices a collapse from any accuracy.
    # 3: validation on some images takes them from all classes.
    return 2 if training.selection.max_samples is None else 3


def run_training(contexts: Sequence[StageContext[TrainTask]]) -> Sequence[StageResult | Exception]:
    """Train all networks that are ready together, as many side by side as the cluster has room for."""
    made = {context.key: attempt(_job, context) for context in contexts}
    jobs = {key: job for key, job in made.items() if isinstance(job, TrainJob)}
    outcomes: dict[str, StageResult | Exception] = {k: e for k, e in made.items() if isinstance(e, Exception)}
    names = {job.output: key for key, job in jobs.items()}

    def on_progress(job: TrainJob, entry: Entry) -> None:
        if line := progress_line(names[job.output], entry, job.training.epochs):
            print(line, flush=True)

    results = launch_many(list(jobs.values()), contexts[0].services.config.scaling, on_progress=on_progress)
    by_key = {context.key: context for context in contexts}
    for key, result in zip(jobs, results, strict=True):
        outcomes[key] = result if isinstance(result, Exception) else attempt(partial(_result, result), by_key[key])
    return [outcomes[context.key] for context in contexts]


def progress_line(key: str, entry: Entry, epochs: int) -> str | None:
    """One line for a validated epoch of a training; None for an entry without a validation."""
    figures = entry.metrics
    if "val_robust" not in figures:
        return None
    speed = figures.get("images_per_second")  # none where a resumed epoch had no step left to do
    return (
        f"{key:<34} epoch {figures['epoch']:>3.0f}/{epochs}  loss {figures['train_loss']:.3f}  validation: "
        f"clean {100 * figures['val_clean']:.1f} %, robust {100 * figures['val_robust']:.1f} %"
    ) + ("" if speed is None else f"  {speed:.0f} img/s")


def _job(context: StageContext[TrainTask]) -> TrainJob:
    task = context.task
    prepared, data = workers_data(context, task.data)
    context.run.dataset(prepared.name, prepared.digest, context="training")
    context.run.mirror(context.directory / JOURNAL)
    bank = None if task.bank is None else _bank(context, task.bank)
    return TrainJob(
        model=task.model,
        data=data,
        augment=task.augment,
        training=task.training,
        seed=task.seed,
        bank=None if bank is None else bank[0],
        bank_digest=None if bank is None else bank[1].digest,
        adapt=task.adapt,
        output=context.directory,
    )


def _bank(context: StageContext[TrainTask], key: str) -> tuple[Path, FrozenBank]:
    """Pull the activation from the registry, by the version that the freeze stage pinned; the freeze stage's own files,
    which are the same, where the registry is away or is another one by now."""
    finished = context.upstream[key]
    frozen = FrozenBank.model_validate(finished.record.payload)
    local = finished.directory / frozen.directory
    context.run.tag({"activation_digest": frozen.digest})
    digest = bank_digest(local)
    by_digest = f"{DIGEST_PREFIX}{digest}"  # whoever registers it later finds the version by it
    if frozen.reference is None:
        _log.warning("MLflow was away, the activation not yet registered; %s uses the local files", context.key)
        context.run.activation(by_digest)
        return local, frozen
    directory, registry = context.directory / "bank", context.services.registry
    try:
        registry.resolve(frozen.reference, digest=digest)
        registry.pull(frozen.reference, directory)
    except (ConnectionError, ValueError) as error:
        _log.warning("%s; %s uses the local files", error, context.key)
        context.run.activation(by_digest)
        return local, frozen
    context.run.activation(frozen.reference)
    return directory, frozen


def _result(trained: TrainedModel, context: StageContext[TrainTask]) -> StageResult:
    payload: dict[str, Any] = json.loads(trained.model_dump_json())
    files = sorted(str(path.relative_to(context.directory)) for path in (context.directory / MODEL).iterdir())
    return StageResult(payload, files)
