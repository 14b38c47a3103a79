"""freeze: the activation, trained here or brought from elsewhere, becomes a version in the registry."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from pipeline.config.bank import BankConfig
from pipeline.config.base import one_line
from pipeline.config.load import ConfigError
from pipeline.data import PreparedData
from pipeline.evaluation.stats import Accuracy
from pipeline.stages.node import Finished, Node, StageContext, StageResult, one_by_one
from pipeline.tracking.origin import git_commit
from pipeline.training import TrainedModel, load_model
from sparta_models import ActivationBank, Sparta
from sparta_models.files import SCHEMA

BANK = "bank"


class FrozenBank(BaseModel):
    """Where the frozen activation is, by digest and by its pinned version in the registry."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    directory: str
    """Folder below the stage's directory."""
    digest: str
    """Digest of the activation's tensors and specification."""
    reference: str | None
    """NAME/VERSION in the registry; None while MLflow is away."""
    alias: str
    """Alias given at registration."""


@dataclass(frozen=True)
class FreezeTask:
    """Which trained network gives its activation."""

    model: str
    """Key of the node that trained it."""
    data: str
    """Key of the node that prepared what it was trained on."""
    threat: str
    """The threat model it was trained against, in words."""


def freeze_node(task: FreezeTask, branch: str = "bank") -> Node[FreezeTask]:
    """The node that freezes and registers the source's activation."""
    return Node("freeze", branch, task, {"threat": task.threat}, run_freeze, (task.model, task.data))


@dataclass(frozen=True)
class BankTask:
    """An activation that was trained elsewhere."""

    bank: BankConfig


def bank_node(task: BankTask) -> Node[BankTask]:
    """The node that takes in an activation that was trained elsewhere. Its identity is what the files hold.

    Raises:
        ConfigError: where there is no such bank, or a damaged one. A version of the registry is first asked for by
            the node itself.
    """
    bank = task.bank
    content = bank.registered if bank.registered is not None else _local(bank).digest
    return Node("freeze", "bank", task, {"bank": content}, run_bank)


def _local(config: BankConfig) -> ActivationBank:
    try:
        if config.pretrained is not None:
            return ActivationBank.pretrained(config.pretrained)
        return ActivationBank.load(Path(config.path or "").expanduser())
    except (ValueError, OSError) as error:
        raise ConfigError(f"bank: {one_line(error)}") from error


def _take_in(context: StageContext[BankTask]) -> StageResult:
    config, directory = context.task.bank, context.directory / BANK
    if config.registered is not None:
        reference: str | None = context.services.registry.pull(config.registered, directory).reference
        bank = ActivationBank.load(directory)
        context.run.activation(config.registered)
    else:
        bank = _local(config)
        bank.save(directory)
        tags = {
            **bank.source,
            "architecture": bank.architecture,
            "activation": bank.spec.name,
            "digest": bank.digest,
            "schema": str(SCHEMA),
            "taken_from": config.label,
        }
        description = f"{bank.spec.name} activation of {bank.architecture}, trained elsewhere ({config.label})."
        reference = context.run.register(directory, tags=tags, description=description, alias="candidate")
    return _result(context, bank, reference)


def _result(context: StageContext[Any], bank: ActivationBank, reference: str | None) -> StageResult:
    frozen = FrozenBank(directory=BANK, digest=bank.digest, reference=reference, alias="candidate")
    files = sorted(f"{BANK}/{path.name}" for path in (context.directory / BANK).iterdir())
    return StageResult(frozen.model_dump(mode="json"), files)


def frozen_bank(finished: Finished) -> ActivationBank:
    """The activation that a freeze node left."""
    return ActivationBank.load(finished.directory / FrozenBank.model_validate(finished.record.payload).directory)


def _freeze(context: StageContext[FreezeTask]) -> StageResult:
    task = context.task
    source = context.upstream[task.model]
    trained = TrainedModel.model_validate(source.record.payload)
    prepared = PreparedData.load(context.upstream[task.data].directory)
    model = load_model(source.directory / "model")
    facts = {
        "dataset": prepared.name,
        "data_sha256": prepared.digest,
        "threat_model": task.threat,
        "fingerprint": source.record.fingerprint,
        "seed": str(source.record.inputs["sections"]["seed"]),
    }
    bank = ActivationBank.from_model(model, source=facts)
    directory = bank.save(context.directory / BANK)
    ActivationBank.load(directory)  # what was written is what will be read
    tags = {
        **facts,
        "architecture": bank.architecture,
        "activation": bank.spec.name,
        "digest": bank.digest,
        "schema": str(SCHEMA),
        "variant": ", ".join(sorted({site.variant for site in model.modules() if isinstance(site, Sparta)})),
        **_accuracies(trained, source, prepared),
        **({"git_commit": commit} if (commit := git_commit()) else {}),
    }
    description = (
        f"{bank.spec.name} activation of {bank.architecture}, adversarially trained on {prepared.name} "
        f"({task.threat}); frozen, {len(bank.entries)} functions."
    )
    reference = context.run.register(directory, tags=tags, description=description, alias="candidate")
    return _result(context, bank, reference)


def _accuracies(trained: TrainedModel, source: Finished, prepared: PreparedData) -> dict[str, str]:
    """Validation accuracies with their Wilson intervals. Those on test images come with the promotion."""
    judged = source.record.inputs["sections"]["training"]["selection"]["max_samples"]
    n = min(prepared.splits["val"].count, judged or sys.maxsize)
    return {
        f"val_{name}": str(Accuracy.of(round(value * n), n))
        for name, value in (("clean", trained.val_clean), ("robust", trained.val_robust))
    }


run_freeze = one_by_one(_freeze)
run_bank = one_by_one(_take_in)
