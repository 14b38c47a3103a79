"""evaluate: every trained network under the attack suite and the gradient-masking audit."""

from dataclasses import dataclass

from pipeline.config.evaluation import EvaluationConfig
from pipeline.data import PreparedData
from pipeline.evaluation.suite import evaluate
from pipeline.stages.node import Node, StageContext, StageResult, one_by_one
from pipeline.training import load_model


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


def evaluate_node(branch: str, task: EvaluateTask) -> Node[EvaluateTask]:
    """The node that evaluates one network."""
    sections = {"evaluation": task.evaluation.model_dump(mode="json"), "seed": task.seed, "reference": task.reference}
    return Node("evaluate", branch, task, sections, run_evaluate, (task.model, task.reference, task.data))


def _evaluate(context: StageContext[EvaluateTask]) -> StageResult:
    task = context.task
    prepared = PreparedData.load(context.upstream[task.data].directory)
    context.run.dataset(prepared.name, prepared.digest, context="test")
    model, reference = (load_model(context.upstream[key].directory / "model") for key in (task.model, task.reference))
    result = evaluate(model, prepared, task.evaluation, context.directory, seed=task.seed, reference=reference)
    figures = {"test/clean": result.clean.value, "test/robust": result.union.value}
    figures |= {f"test/{attack.name}": attack.accuracy.value for attack in result.attacks}
    context.run.metrics(figures)
    context.run.artifact(context.directory / "evaluation.json")
    payload = {"clean": result.clean.value, "robust": result.union.value, "n": result.n}
    return StageResult(payload, ["evaluation.json", "evaluation.npz"])


run_evaluate = one_by_one(_evaluate)
