"""report: every number and picture of the chain on one page."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.artifacts import MODEL
from pipeline.config.report import ReportConfig
from pipeline.data import PreparedData
from pipeline.evaluation.records import Evaluation
from pipeline.report import PAGE, ModelCard, ReportInputs, Trial, build_report
from pipeline.report.inputs import Learned, Role
from pipeline.stages.freeze import FrozenBank, frozen_bank
from pipeline.stages.node import Node, StageContext, StageResult, one_by_one
from pipeline.stages.search import TunedConfig
from pipeline.stages.train import TrainTask
from pipeline.tracking import ChainRun, bank_digest
from pipeline.training import TrainedModel, load_model
from sparta_models import ActivationBank


@dataclass(frozen=True)
class ReportedModel:
    """One row of the report, by the keys of the nodes that made it."""

    branch: str
    target: str
    role: Role
    trained: str
    twin: str
    """Key of the network with the other activation, trained on the same data with the same budget."""
    data: str
    evaluation: str
    activation: str
    """Name of the activation at its sites."""
    task: TrainTask


@dataclass(frozen=True)
class ReportTask:
    """What the page shows."""

    chain: str
    report: ReportConfig
    models: tuple[ReportedModel, ...]
    bank: str
    search: str | None
    seed: int
    trained_here: bool = True
    """Whether the bank is the first model's activation; False: it was trained elsewhere."""


def report_node(task: ReportTask) -> Node[ReportTask]:
    """The node that writes the report."""
    needs = [key for model in task.models for key in (model.data, model.trained, model.evaluation)]
    needs += [task.bank] + ([task.search] if task.search else [])
    sections = {"report": task.report.model_dump(mode="json"), "chain": task.chain}
    return Node(
        "report", "page", task, sections, run_report, tuple(dict.fromkeys(needs)), version=2, reads_records=True
    )


def _report(context: StageContext[ReportTask]) -> StageResult:
    task = context.task
    taken = context.upstream[task.bank]
    frozen = FrozenBank.model_validate(taken.record.payload)
    inputs = ReportInputs(
        title=task.report.title or task.chain,
        models=tuple(_card(context, model) for model in task.models),
        learned=None if task.trained_here else _learned(frozen_bank(taken)),
        trials=_trials(context, task.search),
        sweep_pictures=_sweep_pictures(context, task.search),
        reference=frozen.reference,
        lineage=context.services.lineage(frozen.reference, bank_digest(taken.directory / frozen.directory)),
        facts={"seed": str(task.seed), "activation digest": frozen.digest},
    )
    report = build_report(inputs, context.directory, task.report)
    for path in report.files:
        context.run.artifact(path)
    _tell_chain(context.services.chain_run, inputs, context.directory)
    return StageResult({"page": PAGE}, sorted(str(path.relative_to(context.directory)) for path in report.files))


def _learned(bank: ActivationBank) -> Learned:
    return Learned(
        dataset=bank.source.get("dataset", "data that the bank does not name"),
        architecture=bank.architecture,
        activation=bank.spec.name,
    )


def _tell_chain(run: ChainRun, inputs: ReportInputs, directory: Path) -> None:
    """The page and the headline figures also belong to the chain's own run, where people look first."""
    run.artifact(directory / PAGE)
    figures = {}
    for card in inputs.models:
        figures[f"{card.label}/clean"] = card.evaluation.clean.value
        figures[f"{card.label}/robust"] = card.evaluation.union.value
    run.metrics(figures)


def _card(context: StageContext[ReportTask], model: ReportedModel) -> ModelCard:
    prepared = PreparedData.load(context.upstream[model.data].directory)
    trained, evaluated = context.upstream[model.trained], context.upstream[model.evaluation]
    network = load_model(trained.directory / MODEL)
    return ModelCard(
        label=model.branch,
        target=model.target,
        role=model.role,
        activation=model.activation,
        architecture=model.task.model.label,
        dataset=prepared.name,
        class_names=prepared.class_names,
        num_parameters=sum(parameter.numel() for parameter in network.parameters()),
        num_validation=model.task.training.selection.num_judged(prepared.splits["val"].count),
        trained=TrainedModel.model_validate(trained.record.payload),
        evaluation=Evaluation.load(evaluated.directory),
        evaluation_directory=evaluated.directory,
        model_directory=trained.directory / MODEL,
    )


def _trials(context: StageContext[ReportTask], search: str | None) -> tuple[Trial, ...]:
    if search is None:
        return ()
    return TunedConfig.model_validate(context.upstream[search].record.payload).trials


def _sweep_pictures(context: StageContext[ReportTask], search: str | None) -> tuple[Path, ...]:
    """All but the trade-off, which the page draws in its own way."""
    if search is None:
        return ()
    names = ("search_coordinates.png", "search_importance.png", "search_curves.png")
    directory, outputs = context.upstream[search].directory, context.upstream[search].record.outputs
    return tuple(directory / name for name in names if name in outputs)


run_report = one_by_one(_report)
