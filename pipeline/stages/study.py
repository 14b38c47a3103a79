"""A study as nodes: every network of every seed, the main activation frozen and transferred, all judged, one page.

Branches are named CONTENDER-sSEED, TARGET-CONTENDER-sSEED on a transfer target, and standard-CONTENDER-sSEED where the
training has no attack. With an activation that was trained elsewhere there are transfer targets alone, and it is the
same for all seeds. On a target four networks compete: the frozen activation ("frozen"), the same activation learned
there from scratch ("learned") and left as it starts ("untrained"), and the control. Finalists are judged twice, the
second time as final-BRANCH.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pipeline.artifacts import MODEL
from pipeline.config.chain import ChainConfig, TransferTarget
from pipeline.config.evaluation import EvaluationConfig
from pipeline.config.model import ModelConfig
from pipeline.config.study import Contender, FinalConfig, RegimeConfig, StudyConfig
from pipeline.config.training import TrainingConfig
from pipeline.data import PreparedData
from pipeline.evaluation.records import AuditReport, Evaluation
from pipeline.report.study import FINALISTS, Entry, Role, Study
from pipeline.report.study_page import PAGE, write_study
from pipeline.stages.evaluate import EvaluateTask, evaluate_node
from pipeline.stages.freeze import FreezeTask, freeze_node, threat_in_words
from pipeline.stages.node import Node, StageContext, StageResult, one_by_one
from pipeline.stages.prepare import SOURCE_DATA
from pipeline.stages.train import TrainTask, target_task, train_node
from pipeline.training import TrainedModel, load_model

MAIN, CONTROL, FROZEN, UNTRAINED = "sparta", "control", "frozen", "untrained"
ADVERSARIAL, STANDARD = "adversarial training", "standard training"


@dataclass(frozen=True)
class Network:
    """One network of one seed, and how it is judged."""

    group: str
    contender: str
    branch: str
    trained: str
    """Key of the node that trains it."""
    reference: str
    """Key of the node whose adversarial examples are tried on it too."""
    task: TrainTask
    evaluation: EvaluationConfig
    matched: tuple[tuple[str, str], ...] = ()
    """Contenders that check 15 of its audit sets beside it: name, and key of the node that trains it."""

    @property
    def evaluated(self) -> str:
        """Key of the node that judges it."""
        return f"evaluate:{self.branch}"


@dataclass(frozen=True)
class StudyTask:
    """What the study's page is made of."""

    name: str
    networks: tuple[Network, ...]


def study_nodes(config: ChainConfig, study: StudyConfig) -> list[Node[Any]]:
    """All nodes after the data are prepared, in the order of the stages."""
    networks = tuple(_networks(config, study))
    trainers = {network.trained: train_node(network.trained, network.task) for network in networks}
    pretrain = [node for node in trainers.values() if node.stage == "pretrain"]
    freeze = [
        freeze_node(
            FreezeTask(f"pretrain:{MAIN}-s{seed}", SOURCE_DATA, threat_in_words(config.training)), branch=f"s{seed}"
        )
        for seed in (study.seeds if config.transfer and not config.bank else ())
    ]
    transfer = [node for node in trainers.values() if node.stage == "transfer"]
    judged = [
        evaluate_node(n.branch, EvaluateTask(n.trained, n.reference, n.task.data, n.evaluation, n.task.seed, n.matched))
        for n in networks
    ]
    page = StudyTask(config.report.title or config.name, networks)
    return [*pretrain, *freeze, *transfer, *judged, _page_node(page)]


def _networks(config: ChainConfig, study: StudyConfig) -> Iterator[Network]:
    adversarial = RegimeConfig(training=config.training, evaluation=config.evaluation)
    for seed in study.seeds:
        yield from _at_home(config, study, seed, adversarial, ADVERSARIAL)
        if study.standard is not None:
            yield from _at_home(config, study, seed, study.standard, STANDARD)
        for target in config.transfer:
            yield from _on_target(config, study, target, seed)
    if study.final is not None:
        yield from _finalists(config, study, study.final)


def _finalists(config: ChainConfig, study: StudyConfig, final: FinalConfig) -> Iterator[Network]:
    """Networks of the study once more, to be judged in another way."""
    names = {MAIN, CONTROL, FROZEN, *final.contenders}
    regime = RegimeConfig(training=config.training, evaluation=final.evaluation)
    for seed in study.seeds:
        networks = [*_at_home(config, study, seed, regime, ADVERSARIAL)]
        for target in config.transfer:
            if final.targets is None or target.name in final.targets:
                networks += _on_target(config, study, target, seed)
        for network in networks:
            if network.contender in names:
                yield replace(
                    network,
                    group=f"{network.group}{FINALISTS}",
                    branch=f"final-{network.branch}",
                    evaluation=final.evaluation,
                    matched=tuple((name, key) for name, key in network.matched if name in names),
                )


def _at_home(config: ChainConfig, study: StudyConfig, seed: int, regime: RegimeConfig, group: str) -> Iterator[Network]:
    """The source, its control and the contenders, trained on the source's data; none where the activation was trained
    elsewhere."""
    if config.bank is not None:
        return
    rows = [
        Contender.model_construct(name=MAIN, activation=config.model.activation),
        Contender.model_construct(name=CONTROL, activation=config.control),
        *study.contenders,
    ]
    prefix = "standard-" if group == STANDARD else ""
    audited = regime.evaluation.audit.budget != "off"
    contenders = tuple((c.name, f"pretrain:{prefix}{c.name}-s{seed}") for c in study.contenders if audited)
    for row in rows:
        twin = MAIN if row.name == CONTROL else CONTROL
        options = {**config.model.options, **row.options}
        model = ModelConfig(name=config.model.name, options=options, activation=row.activation)
        yield Network(
            group=group,
            contender=row.name,
            branch=f"{prefix}{row.name}-s{seed}",
            trained=f"pretrain:{prefix}{row.name}-s{seed}",
            reference=f"pretrain:{prefix}{twin}-s{seed}",
            task=TrainTask(model, config.augment, row.own(regime.training), seed, SOURCE_DATA),
            evaluation=regime.evaluation,
            matched=contenders if row.name == MAIN else (),
        )


def _on_target(config: ChainConfig, study: StudyConfig, target: TransferTarget, seed: int) -> Iterator[Network]:
    """The frozen activation, what is asked for beside it, and the control, with the target's budget. An activation that
    stays as it starts says what of the frozen one's gain comes of its having been trained."""
    bank = "freeze:bank" if config.bank else f"freeze:s{seed}"
    for name in (FROZEN, *study.on_targets, CONTROL):
        activation = config.control if name == CONTROL else config.model.activation
        task = target_task(config, target, activation, seed=seed, bank=bank if name == FROZEN else None)
        if name == UNTRAINED:
            task = replace(task, training=task.training.varied(activation_lr_factor=0.0))
        twin = FROZEN if name == CONTROL else CONTROL
        yield Network(
            group=target.name,
            contender=name,
            branch=f"{target.name}-{name}-s{seed}",
            trained=f"transfer:{target.name}-{name}-s{seed}",
            reference=f"transfer:{target.name}-{twin}-s{seed}",
            task=task,
            evaluation=config.evaluation,
        )


# --- the page ---------------------------------------------------------------------------------------------------------


def _page_node(task: StudyTask) -> Node[StudyTask]:
    needs = [key for n in task.networks for key in (n.task.data, n.trained, n.evaluated)]
    sections = {"name": task.name, "groups": [[n.group, n.contender, n.branch] for n in task.networks]}
    return Node("report", "study", task, sections, run_study, tuple(dict.fromkeys(needs)), version=2)


def _page(context: StageContext[StudyTask]) -> StageResult:
    task = context.task
    entries = tuple(_entry(context, network) for network in task.networks)
    study = Study(name=task.name, entries=entries)
    files = write_study(study, context.directory)
    for path in files:
        context.run.artifact(path)
    context.services.chain_run.artifact(context.directory / PAGE)
    return StageResult({"page": PAGE}, sorted(path.name for path in files))


def _entry(context: StageContext[StudyTask], network: Network) -> Entry:
    trained, evaluated = context.upstream[network.trained], context.upstream[network.evaluated]
    record = TrainedModel.model_validate(trained.record.payload)
    evaluation = Evaluation.load(evaluated.directory)
    arrays = evaluation.arrays(evaluated.directory)
    prepared = PreparedData.load(context.upstream[network.task.data].directory)
    steps = -(-prepared.splits["train"].count // network.task.training.batch_size)
    model, audit = network.task.model, evaluation.audit
    return Entry(
        group=network.group,
        contender=network.contender,
        role=_role(network.contender),
        activation=model.activation.name,
        seed=network.task.seed,
        architecture=model.label,
        dataset=prepared.name,
        num_parameters=sum(p.numel() for p in load_model(trained.directory / MODEL).parameters()),
        training_flops=record.flops_per_step * steps * record.epochs,
        epochs=record.epochs,
        precision=record.precision,
        val_clean=record.val_clean,
        val_robust=record.val_robust,
        split_size=evaluation.split_size,
        clean=evaluation.clean,
        robust=evaluation.union,
        trained_by=_trained_by(network.task.training),
        judged_under=evaluation.config.threat.label,
        attacks={attack.name: attack.accuracy.value for attack in evaluation.attacks},
        audit="off" if audit is None else ", ".join(audit.failed) or "passed",
        audited="" if audit is None else audited(audit),
        trained=trained.record.fingerprint,
        evaluated=evaluated.record.fingerprint,
        weights_sha256=record.weights_sha256,
        frozen_digest=record.bank_digest,
        correct_clean=arrays["correct/clean"].astype(bool),
        correct_robust=arrays["correct/union"].astype(bool),
    )


def audited(audit: AuditReport) -> str:
    """Effort and verdicts: a check that does not apply, as those of a gate to ReLU, is no check that passed."""
    verdicts = Counter(check.verdict for check in audit.checks)
    counts = ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in ("pass", "warn", "fail", "skip"))
    return f"{audit.budget}, {audit.n} images: {counts}"


def _trained_by(training: TrainingConfig) -> str:
    threat, kind = training.threat, training.method.kind
    return kind if kind == "standard" else f"{kind} at {threat.norm} {threat.eps:.4g}"


def _role(contender: str) -> Role:
    return "main" if contender in (MAIN, FROZEN) else "control" if contender == CONTROL else "other"


run_study = one_by_one(_page)
