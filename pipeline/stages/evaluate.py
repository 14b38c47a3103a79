"""evaluate: every trained network under the attack suite and the gradient-masking audit, in Ray tasks.

First the shards of the test images, then per network what needs them all: the merged record, and the audit.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.artifacts import MODEL
from pipeline.cluster import num_task_slots, reserved_device, run_tasks
from pipeline.config.base import one_line
from pipeline.config.evaluation import EvaluationConfig
from pipeline.data import PreparedData
from pipeline.evaluation.records import Evaluation
from pipeline.evaluation.suite import evaluate, evaluate_shard
from pipeline.stages.node import Node, StageContext, StageResult, attempt
from pipeline.stages.prepare import workers_data
from pipeline.training import load_model

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluateTask:
    """One network to judge."""

    model: str
    """Key of the node that trained it."""
    reference: str
    """Key of the node that trained its twin, whose adversarial examples are tried on it too."""
    data: str
    """Key of the node that prepared the test images."""
    evaluation: EvaluationConfig
    seed: int
    matched: tuple[tuple[str, str], ...] = ()
    """Networks of equal cost for check 15 of the audit: name, and key of the node that trained it."""


@dataclass(frozen=True)
class Judgement:
    """A piece of work for one Ray task: a shard of the test images or, with shard None, the rest of an evaluation."""

    model: Path
    reference: Path
    data: Path
    evaluation: EvaluationConfig
    output: Path
    seed: int
    num_examples: int
    """Test images that are judged."""
    shard: int | None = None
    num_shards: int = 1
    matched: tuple[tuple[str, Path], ...] = ()


def evaluate_node(branch: str, task: EvaluateTask) -> Node[EvaluateTask]:
    """The node that evaluates one network."""
    sections: dict[str, Any] = {
        "evaluation": task.evaluation.model_dump(mode="json"),
        "seed": task.seed,
        "reference": task.reference,
    }
    if task.matched:
        sections["matched"] = [list(pair) for pair in task.matched]
    needs = tuple(dict.fromkeys((task.model, task.reference, task.data, *(key for _, key in task.matched))))
    # 3: the audit has a check more, and one of its own of what a network remembers.
    version = 2 if task.evaluation.audit.budget == "off" else 3
    return Node("evaluate", branch, task, sections, run_evaluations, needs, version=version, together=True)


def run_evaluations(contexts: Sequence[StageContext[EvaluateTask]]) -> Sequence[StageResult | Exception]:
    """Judge all networks, as many shards at a time as the cluster has room for."""
    services = contexts[0].services
    services.ray()
    scaling = services.config.scaling
    made = {context.key: attempt(_judgement, context) for context in contexts}
    works = {key: work for key, work in made.items() if isinstance(work, Judgement)}
    slots = num_task_slots(scaling)
    shards = [
        replace(work, shard=shard, num_shards=n)
        for work in works.values()
        for n in [_num_shards(work, slots)]
        for shard in range(n)
    ]
    for shard, failure in zip(shards, run_tasks(judge_shard, shards, scaling), strict=True):
        if failure is not None:  # it is judged again, and an error that stays is raised, by the rest
            _LOG.warning("a shard of %s failed, it is tried again: %s", shard.output, one_line(failure))
    keys = list(works)
    judged = run_tasks(
        judge_rest, list(works.values()), scaling, on_done=lambda index: print(f"{keys[index]:<34} judged")
    )
    failed = {key: error for key, error in made.items() if isinstance(error, Exception)}
    failed |= {key: error for key, error in zip(keys, judged, strict=True) if isinstance(error, Exception)}
    return [failed[c.key] if c.key in failed else attempt(_result, c) for c in contexts]


def judge_shard(work: Judgement) -> None:
    """Judge one shard; its blocks are files in the output directory."""
    assert work.shard is not None
    model, prepared, options = _opened(work)
    evaluate_shard(
        model, prepared, work.evaluation, work.output, shard=work.shard, num_shards=work.num_shards, **options
    )


def judge_rest(work: Judgement) -> None:
    """Whatever no shard has done: usually the merged record and the audit."""
    model, prepared, options = _opened(work)
    device = next(model.parameters()).device
    matched = {name: load_model(directory, device) for name, directory in work.matched}
    evaluate(model, prepared, work.evaluation, work.output, matched=matched, **options)


def _opened(work: Judgement) -> tuple[torch.nn.Module, PreparedData, dict[str, Any]]:
    device = reserved_device()
    model, reference = load_model(work.model, device), load_model(work.reference, device)
    return model, PreparedData.load(work.data), {"seed": work.seed, "reference": reference}


def _num_shards(work: Judgement, slots: int) -> int:
    return min(slots, -(-work.num_examples // work.evaluation.block_size))


def _judgement(context: StageContext[EvaluateTask]) -> Judgement:
    task, upstream = context.task, context.upstream
    prepared, data = workers_data(context, task.data)
    context.run.dataset(prepared.name, prepared.digest, context="test")
    return Judgement(
        model=upstream[task.model].directory / MODEL,
        reference=upstream[task.reference].directory / MODEL,
        data=data,
        evaluation=task.evaluation,
        output=context.directory,
        seed=task.seed,
        num_examples=task.evaluation.num_examples or prepared.splits["test"].count,
        matched=tuple((name, upstream[key].directory / MODEL) for name, key in task.matched),
    )


def _result(context: StageContext[EvaluateTask]) -> StageResult:
    result = Evaluation.load(context.directory)
    figures = {"test/clean": result.clean.value, "test/robust": result.union.value}
    figures |= {f"test/{attack.name}": attack.accuracy.value for attack in result.attacks}
    context.run.metrics(figures)
    context.run.artifact(context.directory / "evaluation.json")
    payload = {"clean": result.clean.value, "robust": result.union.value, "n": result.n}
    return StageResult(payload, ["evaluation.json", "evaluation.npz"])
