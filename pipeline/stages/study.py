"""A study as nodes: every network of every seed, the main activation frozen and transferred, all judged, one page.

Branches are named CONTENDER-sSEED, TARGET-CONTENDER-sSEED on a transfer target, and standard-CONTENDER-sSEED where the
training has no attack. With an activation that was trained elsewhere there are transfer targets alone, and it is the
same for all seeds. On a target four networks compete: the frozen activation ("frozen"), the same activation learned
there from scratch ("learned") and left as it starts ("untrained"), and the control. Finalists are judged twice, the
second time as final-BRANCH.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pipeline.config.chain import ChainConfig, TransferTarget
from pipeline.config.model import ModelConfig
from pipeline.config.study import Contender, FinalConfig, RegimeConfig, StudyConfig
from pipeline.report.study import FINALISTS
from pipeline.stages.evaluate import EvaluateTask, evaluate_node
from pipeline.stages.freeze import FreezeTask, freeze_node, threat_in_words
from pipeline.stages.node import Node
from pipeline.stages.prepare import SOURCE_DATA
from pipeline.stages.study_page import CONTROL, FROZEN, MAIN, Network, StudyTask, page_node
from pipeline.stages.train import TrainTask, target_task, train_node

UNTRAINED = "untrained"
ADVERSARIAL, STANDARD = "adversarial training", "standard training"


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
    return [*pretrain, *freeze, *transfer, *judged, page_node(page)]


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
