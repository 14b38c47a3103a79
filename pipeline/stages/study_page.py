"""report, of a study: what every network came to, on one page."""

from collections import Counter
from dataclasses import dataclass

from pipeline.artifacts import MODEL
from pipeline.config.evaluation import EvaluationConfig
from pipeline.config.training import TrainingConfig
from pipeline.data import PreparedData
from pipeline.evaluation.records import AuditReport, Evaluation
from pipeline.report.study import Entry, Role, Study
from pipeline.report.study_page import PAGE, write_study
from pipeline.stages.node import Node, StageContext, StageResult, one_by_one
from pipeline.stages.train import TrainTask
from pipeline.training import TrainedModel, load_model
from pipeline.training.methods import step_cost

MAIN, CONTROL, FROZEN = "sparta", "control", "frozen"


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


def page_node(task: StudyTask) -> Node[StudyTask]:
    """The node that writes the page."""
    needs = [key for n in task.networks for key in (n.task.data, n.trained, n.evaluated)]
    sections = {"name": task.name, "groups": [[n.group, n.contender, n.branch] for n in task.networks]}
    return Node(
        "report", "study", task, sections, run_study, tuple(dict.fromkeys(needs)), version=3, reads_records=True
    )


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
        training_flops=record.flops_per_step * steps * epochs_like_the_last(network.task.training, record.epochs),
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


def epochs_like_the_last(training: TrainingConfig, epochs: int) -> float:
    """All epochs in units of the last one, whose steps were counted: before AWP sets in they cost less."""
    passes = [step_cost(training, epoch=epoch).forward_equivalents for epoch in range(epochs)]
    return sum(passes) / passes[-1]


def _trained_by(training: TrainingConfig) -> str:
    threat, kind = training.threat, training.method.kind
    return kind if kind == "standard" else f"{kind} at {threat.label}"


def _role(contender: str) -> Role:
    return "main" if contender in (MAIN, FROZEN) else "control" if contender == CONTROL else "other"


run_study = one_by_one(_page)
