"""The chain as a list of nodes, each after what it needs:

prepare:* -> [search] -> pretrain:source, pretrain:source-control -> freeze:bank
          -> transfer:<target>, transfer:<target>-control ... -> evaluate:* -> report

With an activation that was trained elsewhere (`bank`) freeze:bank takes it in, and nothing is searched or pretrained.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.config.chain import ChainConfig, TransferTarget
from pipeline.config.data import DataConfig
from pipeline.config.load import overlay
from pipeline.stages.evaluate import EvaluateTask, evaluate_node
from pipeline.stages.fit import check_fit, check_networks
from pipeline.stages.freeze import FreezeTask, bank_node, freeze_node, frozen_bank, threat_in_words
from pipeline.stages.node import Finished, Node
from pipeline.stages.prepare import SOURCE_DATA, PrepareTask, prepare_node
from pipeline.stages.report import ReportedModel, ReportTask, report_node
from pipeline.stages.search import SearchTask, TunedConfig, search_node
from pipeline.stages.study import study_nodes
from pipeline.stages.train import target_task, train_node

STAGES = ("prepare", "search", "pretrain", "freeze", "transfer", "evaluate", "report")
_SOURCE_NAME = "source"
_SOURCE = "pretrain:source"
_BANK = "freeze:bank"
_SEARCH = "search:best"


def head(config: ChainConfig, *, planning: bool = False) -> list[Node[Any]]:
    """The nodes that the configuration alone decides. When `planning`, the user's data need not be there yet."""
    nodes: list[Node[Any]] = [
        prepare_node(branch, PrepareTask(data, config.seed), planning=planning)
        for branch, data in _datasets(config).items()
    ]
    if config.search.enabled:
        nodes.append(search_node(SearchTask(config, SOURCE_DATA)))
    if config.bank is not None:
        nodes.insert(0, bank_node(config.bank))  # a version that is not there is known before any data is read
    return nodes


def settled(config: ChainConfig, done: Mapping[str, Finished]) -> bool:
    """Whether all that `tuned` lays over the configuration is known."""
    return (not config.search.enabled or _SEARCH in done) and (config.bank is None or _BANK in done)


def tuned(config: ChainConfig, done: Mapping[str, Finished]) -> ChainConfig:
    """The configuration of the other nodes: with the best trial's settings, or the activation of the bank taken in.

    Raises:
        ConfigError: where that activation does not fit a target.
    """
    if (found := done.get(_SEARCH)) is not None:
        return overlay(config, TunedConfig.model_validate(found.record.payload).overrides)
    if config.bank is not None and (taken := done.get(_BANK)) is not None:
        bank = frozen_bank(taken)
        check_fit(config, bank)
        spec = bank.spec
        activation = {"name": spec.name, "sharing": spec.sharing, "options": dict(spec.options)}
        return overlay(config, {"model.activation": activation})
    return config


def tail(config: ChainConfig) -> list[Node[Any]]:
    """The nodes after those of `head`; those of a study, where one is configured.

    Raises:
        ConfigError: for a network that cannot be built, or an activation trained here that does not fit a target.
    """
    nodes = _chain_nodes(config) if config.study is None else study_nodes(config, config.study)
    check_networks(nodes)
    if config.bank is None:
        check_fit(config)
    return nodes


def _chain_nodes(config: ChainConfig) -> list[Node[Any]]:
    models = reported_models(config)
    pretrain = [train_node(model.trained, model.task) for model in models if model.target == _SOURCE_NAME]
    transfer = [train_node(model.trained, model.task) for model in models if model.target != _SOURCE_NAME]
    freeze = [] if config.bank else [freeze_node(FreezeTask(_SOURCE, SOURCE_DATA, threat_in_words(config.training)))]
    evaluations = [_evaluation(config, model) for model in models]
    search = _SEARCH if config.search.enabled else None
    task = ReportTask(config.name, config.report, models, _BANK, search, config.seed, trained_here=config.bank is None)
    report = report_node(task)
    return [*pretrain, *freeze, *transfer, *evaluations, report]


def reported_models(config: ChainConfig) -> tuple[ReportedModel, ...]:
    """The networks of the chain: the source, where it is trained, and every target, each beside its control."""
    source = () if config.bank else (TransferTarget(name=_SOURCE_NAME),)
    targets = (*source, *config.transfer)
    return tuple(_reported(config, target, control=control) for target in targets for control in (False, True))


def _datasets(config: ChainConfig) -> dict[str, DataConfig]:
    own = {target.name: target.data for target in config.transfer if target.data is not None}
    if config.bank is not None and len(own) == len(config.transfer):
        return own
    return {"source": config.data, **own}


def _reported(config: ChainConfig, target: TransferTarget, *, control: bool) -> ReportedModel:
    is_source = target.name == _SOURCE_NAME
    stage = "pretrain" if is_source else "transfer"
    frozen = not is_source and not control
    own, twin = (f"{target.name}-control", target.name) if control else (target.name, f"{target.name}-control")
    activation = config.control if control else config.model.activation
    task = target_task(config, target, activation, seed=config.seed, bank=_BANK if frozen else None)
    return ReportedModel(
        branch=own,
        target=target.name,
        role="control" if control else "source" if is_source else "transfer",
        trained=f"{stage}:{own}",
        twin=f"{stage}:{twin}",
        data=task.data,
        evaluation=f"evaluate:{own}",
        activation=activation.name,
        task=task,
    )


def _evaluation(config: ChainConfig, model: ReportedModel) -> Node[EvaluateTask]:
    task = EvaluateTask(model.trained, model.twin, model.data, config.evaluation, config.seed)
    return evaluate_node(model.branch, task)
