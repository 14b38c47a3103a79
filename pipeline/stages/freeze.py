"""freeze: the activation, trained here or brought from elsewhere, becomes a version in the registry."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts import MODEL
from pipeline.config.bank import BankConfig
from pipeline.config.base import Section, one_line
from pipeline.config.load import ConfigError
from pipeline.config.training import SelectionConfig, TrainingConfig
from pipeline.data import PreparedData
from pipeline.data.paths import resolve_path
from pipeline.evaluation.stats import Accuracy
from pipeline.stages.node import Finished, Node, StageContext, StageResult, one_by_one
from pipeline.tracking import bank_digest
from pipeline.tracking.origin import git_commit
from pipeline.training import TrainedModel, load_model
from sparta_models import ActivationBank, Sparta
from sparta_models.files import META, SCHEMA, TENSORS

BANK = "bank"
ALIAS = "candidate"


class FrozenBank(Section):
    """Where the frozen activation is, by digest and by its pinned version in the registry."""

    directory: str
    """Folder below the stage's directory."""
    digest: str
    """Digest of the activation's tensors and specification."""
    reference: str | None
    """NAME/VERSION in the registry; None while MLflow is away."""
    alias: str | None
    """Alias given at registration; None: it was trained elsewhere, and no alias moved."""


@dataclass(frozen=True)
class FreezeTask:
    """Which trained network gives its activation."""

    model: str
    """Key of the node that trained it."""
    data: str
    """Key of the node that prepared what it was trained on."""
    threat: str
    """The threat model it was trained against, in words."""


def threat_in_words(training: TrainingConfig) -> str:
    """What a training was made against, as `FreezeTask.threat`."""
    threat, kind = training.threat, training.method.kind
    return "no attack" if kind == "standard" else f"{threat.norm} eps={threat.eps:.4g}, {kind}"


def freeze_node(task: FreezeTask, branch: str = "bank") -> Node[FreezeTask]:
    """The node that freezes and registers the source's activation."""
    needs = (task.model, task.data)
    return Node("freeze", branch, task, {"threat": task.threat}, run_freeze, needs, reads_records=True)


@dataclass(frozen=True)
class BankTask:
    """An activation that was trained elsewhere."""

    config: BankConfig
    content: Mapping[str, Any]
    """What identifies it."""


def bank_node(config: BankConfig) -> Node[BankTask]:
    """The node that takes in an activation that was trained elsewhere. Its identity is what the bank holds and says of
    itself; that of a registered one is its version, which the node looks up.

    Raises:
        ConfigError: where there is no such bank, or a damaged one.
    """
    content = {"registered": config.registered} if config.registered is not None else _content(_local(config))
    return Node("freeze", "bank", BankTask(config, content), {"bank": content}, run_bank)


def _local(config: BankConfig) -> ActivationBank:
    try:
        if config.pretrained is not None:
            return ActivationBank.pretrained(config.pretrained)
        assert config.path is not None
        return ActivationBank.load(resolve_path(config.path, "bank.path"))
    except (ValueError, OSError, RuntimeError) as error:
        raise ConfigError(f"bank: {one_line(error)}") from error


def _content(bank: ActivationBank) -> dict[str, Any]:
    return {"digest": bank.digest, "architecture": bank.architecture, "source": dict(bank.source)}


def _take_in(context: StageContext[BankTask]) -> StageResult:
    config, directory = context.task.config, _empty(context)
    if config.registered is not None:
        try:
            context.services.registry.pull(config.registered, directory)
        except ValueError as error:
            raise ConfigError(f"bank.registered: {one_line(error)}") from error
        context.run.activation(config.registered)
        return _result(context, ActivationBank.load(directory), config.registered, alias=None)
    bank = _local(config)
    if _content(bank) != context.task.content:
        raise ValueError(
            f"expected the bank ({config.label}) as it was when the chain began, got another one; start again"
        )
    bank.save(directory)
    return _result(context, bank, _version(context, bank), alias=None)


def _empty(context: StageContext[Any]) -> Path:
    """The bank's directory, without what an earlier attempt left: a damaged file, or half of one."""
    directory = context.directory / BANK
    shutil.rmtree(directory, ignore_errors=True)
    return directory


def bank_tags(bank: ActivationBank) -> dict[str, str]:
    """What every version in the registry says of its activation."""
    return {"architecture": bank.architecture, "activation": bank.spec.name, "digest": bank.digest}


def _version(context: StageContext[BankTask], bank: ActivationBank) -> str | None:
    """The version of the registry that holds the bank, a new one where there is none; None while MLflow is away."""
    directory, label = context.directory / BANK, context.task.config.label
    try:
        known = context.services.registry.holding(bank_digest(directory)).reference
    except (ValueError, ConnectionError):
        said = {f"source.{key}": text for key, text in bank.source.items()}  # by whoever made it: no tags of ours
        tags = {**said, **bank_tags(bank), "schema": str(SCHEMA), "taken_from": label}
        description = f"{bank.spec.name} activation of {bank.architecture}, trained elsewhere ({label})."
        return context.run.register(directory, tags=tags, description=description, alias=None)
    context.run.activation(known)
    return known


def _result(
    context: StageContext[Any], bank: ActivationBank, reference: str | None, *, alias: str | None
) -> StageResult:
    frozen = FrozenBank(directory=BANK, digest=bank.digest, reference=reference, alias=alias)
    files = [f"{BANK}/{META}", f"{BANK}/{TENSORS}"]
    return StageResult(frozen.model_dump(mode="json"), files)


def frozen_bank(finished: Finished) -> ActivationBank:
    """The activation that a freeze node left."""
    return ActivationBank.load(finished.directory / FrozenBank.model_validate(finished.record.payload).directory)


def _freeze(context: StageContext[FreezeTask]) -> StageResult:
    task = context.task
    source = context.upstream[task.model]
    trained = TrainedModel.model_validate(source.record.payload)
    prepared = PreparedData.load(context.upstream[task.data].directory)
    model = load_model(source.directory / MODEL)
    facts = {
        "dataset": prepared.name,
        "data_sha256": prepared.digest,
        "threat_model": task.threat,
        "fingerprint": source.record.fingerprint,
        "seed": str(source.record.inputs["sections"]["seed"]),
    }
    bank = ActivationBank.from_model(model, source=facts)
    directory = bank.save(_empty(context))
    ActivationBank.load(directory)  # what was written is what will be read
    tags = {
        **facts,
        **bank_tags(bank),
        "schema": str(SCHEMA),
        "variant": ", ".join(sorted({site.variant for site in model.modules() if isinstance(site, Sparta)})),
        **_accuracies(trained, source, prepared),
        **({"git_commit": commit} if (commit := git_commit()) else {}),
    }
    description = (
        f"{bank.spec.name} activation of {bank.architecture}, trained on {prepared.name} against "
        f"{task.threat}; frozen, {len(bank.entries)} functions."
    )
    reference = context.run.register(directory, tags=tags, description=description, alias=ALIAS)
    return _result(context, bank, reference, alias=ALIAS)


def _accuracies(trained: TrainedModel, source: Finished, prepared: PreparedData) -> dict[str, str]:
    """Validation accuracies with their Wilson intervals. Those on test images come with the promotion."""
    selection = SelectionConfig.model_validate(source.record.inputs["sections"]["training"]["selection"])
    n = selection.num_judged(prepared.splits["val"].count)
    return {
        f"val_{name}": str(Accuracy.of(round(value * n), n))
        for name, value in (("clean", trained.val_clean), ("robust", trained.val_robust))
    }


run_freeze = one_by_one(_freeze)
run_bank = one_by_one(_take_in)
