"""Operations, bytes and hours of every node of a chain, before it runs.

Operations are floating-point operations of convolutions and linear layers, as torch counts them in one forward pass of
the network without its activations; a backward pass to the input counts as one more, a full one as two more. So it is
a floor: activations, batch norms, optimizer and waiting come on top, and are in the measured images per second.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config.chain import ChainConfig
from pipeline.config.data import DataConfig
from pipeline.config.evaluation import (
    AnyAttack,
    AutoAttack,
    EvaluationConfig,
    NoiseAttack,
    PGDAttack,
    SquareAttack,
    TargetedAttack,
)
from pipeline.config.model import ModelConfig
from pipeline.config.training import TrainingConfig
from pipeline.data import DataError, PreparedData
from pipeline.data.paths import as_url, resolve_path
from pipeline.evaluation.blocks import OTHER_ATTACKS
from pipeline.plan.sizes import DataSize, expected_size, prepared_size
from pipeline.stages.evaluate import EvaluateTask
from pipeline.stages.fit import built
from pipeline.stages.node import Finished, Node
from pipeline.stages.prepare import PrepareTask
from pipeline.stages.search import SearchTask
from pipeline.stages.train import TrainTask
from pipeline.training.methods import step_cost

# AutoAttack of one image that withstands it all: APGD-CE 100 steps, APGD-T and FAB-T 9 targets x 100, Square 5,000.
_AUTOATTACK = 2 * 100 + 2 * 900 + 2 * 900 + 5000
_CHECKPOINTS = 2
_KEPT_NETWORKS = 2


@dataclass(frozen=True)
class Estimate:
    """What one node costs."""

    key: str
    flops: float | None = None
    """Floating-point operations; None where there are hardly any, or nobody can know."""
    checkpoint_bytes: float | None = None
    """Largest size of its checkpoints on disk."""
    data_bytes: float | None = None
    """Size of what it prepares."""
    note: str = ""


@dataclass(frozen=True)
class Network:
    """A network's forward pass over one image, and its size."""

    flops: float
    parameters: int
    state_bytes: int


def estimate(
    nodes: Sequence[Node[Any]], config: ChainConfig, done: Mapping[str, Finished]
) -> tuple[list[Estimate], float | None]:
    """The estimate of every node, and operations per second and worker, where they are given or were measured.

    Raises ConfigError for a network that cannot be built.
    """
    sizes = {node.key: _size(node, config, done) for node in nodes if isinstance(node.task, PrepareTask)}
    trained = {node.key: node.task for node in nodes if isinstance(node.task, TrainTask)}
    estimates = [_of_node(node, sizes, trained) for node in nodes]
    return estimates, _speed(config, nodes, sizes, done)


def table(estimates: Sequence[Estimate], speed: float | None) -> list[str]:
    """Aligned lines for people, with a total; hours of one worker where its speed is known."""
    heads: tuple[str, ...] = ("estimate", "TFLOP", "checkpoints", "data", "hours" if speed else "")
    rows: list[tuple[str, ...]] = [heads]
    for e in estimates:
        if e.flops is None and e.data_bytes is None:
            continue
        rows.append((e.key, _tera(e.flops), _size_text(e.checkpoint_bytes), _size_text(e.data_bytes), _hours(e, speed)))
    total = sum(e.flops or 0.0 for e in estimates)
    kept = sum(e.checkpoint_bytes or 0.0 for e in estimates)
    data = sum(e.data_bytes or 0.0 for e in estimates)
    rows.append(("total", _tera(total), _size_text(kept), _size_text(data), _hours(Estimate("", total), speed)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = [
        f"{row[0]:<{max(widths[0], 34)}} " + " ".join(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    notes = dict.fromkeys(e.note for e in estimates if e.note)
    if not speed:
        notes["hours: set plan.images_per_second to what one worker manages on the source network"] = None
    return ["", *(line.rstrip() for line in lines), *notes]


def step_passes(training: TrainingConfig) -> float:
    """Forward passes of a training step per image, the mean over the epochs: AWP may set in later than the first."""
    costs = (step_cost(training, epoch=epoch) for epoch in range(training.epochs))
    return sum(cost.forward_equivalents for cost in costs) / training.epochs


def training_flops(network: Network, training: TrainingConfig, data: DataSize) -> float:
    """Of a whole training: its steps, and the validations that select the epoch."""
    attack = training.selection.attack
    validations = -(-training.epochs // training.selection.every)
    judged = validations * (data.val + training.selection.num_judged(data.val) * 2 * attack.steps * attack.restarts)
    return network.flops * (training.epochs * data.train * step_passes(training) + judged)


def evaluation_flops(network: Network, config: EvaluationConfig, data: DataSize) -> float:
    """Of a whole evaluation without its audit, if no attack succeeded: attacks stop at what they have fooled."""
    n = min(data.test, config.num_examples or data.test)
    passes = 1 + sum(_attack_passes(attack, data.num_classes) for attack in config.attacks)
    passes += len(config.other_threats) * sum(_attack_passes(attack, data.num_classes) for attack in OTHER_ATTACKS)
    curve = 2 * config.curve.steps * len(config.curve.multiples) * min(n, config.curve.num_examples or n)
    return network.flops * (n * passes + curve)


def _attack_passes(attack: AnyAttack, num_classes: int) -> float:
    """Forward passes that one image costs; a backward to the input is one more."""
    match attack:
        case NoiseAttack(num_draws=n) | SquareAttack(num_queries=n):
            return n
        case PGDAttack(steps=steps, restarts=restarts):
            return 2 * steps * restarts
        case TargetedAttack(steps=steps, num_targets=targets):
            return 2 * steps * min(targets, num_classes - 1)
        case AutoAttack():
            return _AUTOATTACK
    return 2.0 * getattr(attack, "steps", 1)  # transfer; FGSM has one step


@lru_cache(maxsize=256)
def _measured(spec: str, side: int, channels: int, num_classes: int) -> Network:
    model = ModelConfig.model_validate_json(spec)
    given = {"num_classes": num_classes, "in_channels": channels}
    with torch.device("meta"):
        real = built("model", model, model.activation.spec(), **given)
        plain = built("model", model, "relu", **given).eval()
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            plain(torch.empty(1, channels, side, side))
    tensors = real.state_dict().values()
    parameters = sum(p.numel() for p in real.parameters())
    return Network(float(counter.get_total_flops()), parameters, sum(t.numel() * t.element_size() for t in tensors))


def network_of(model: ModelConfig, data: DataSize) -> Network:
    """A network's operations and size, found out on torch's meta device: nothing is computed or held in memory.

    Raises ConfigError for one that cannot be built.
    """
    return _measured(model.model_dump_json(), data.side, data.channels, data.num_classes)


def _size(node: Node[Any], config: ChainConfig, done: Mapping[str, Finished]) -> DataSize | None:
    if node.key in done:
        return prepared_size(PreparedData.load(done[node.key].directory))
    data: DataConfig = node.task.data
    return expected_size(data, config.plan)


def _of_node(node: Node[Any], sizes: Mapping[str, DataSize | None], trained: Mapping[str, TrainTask]) -> Estimate:
    match node.task:
        case PrepareTask():
            data = sizes[node.key]
            note = _about(node.task.data, data)
            return Estimate(node.key, data_bytes=data.num_bytes if data else None, note=note)
        case TrainTask() as task if (data := sizes.get(task.data)) is not None:
            return _of_training(node.key, task, data)
        case EvaluateTask(model=key, data=of, evaluation=settings) if (data := sizes.get(of)) and key in trained:
            network = network_of(trained[key].model, data)
            note = "evaluations: at most, if no attack succeeded; without their audits"
            return Estimate(node.key, evaluation_flops(network, settings, data), note=note)
        case SearchTask(config=whole) if (data := sizes.get(node.task.data)) is not None:
            judged = whole.training.selection.model_copy(update={"every": 1})
            epochs = whole.search.epochs or whole.training.epochs
            trial = whole.training.model_copy(update={"epochs": epochs, "selection": judged})
            flops = whole.search.num_trials * training_flops(network_of(whole.model, data), trial, data)
            return Estimate(node.key, flops, note="search: of trials like the training, if none is stopped early")
    return Estimate(node.key)


def _about(config: DataConfig, data: DataSize | None) -> str:
    if config.path and not as_url(config.path):
        try:
            resolve_path(config.path, "data.path")
        except DataError as error:
            return f"not there yet: {error}"
    return "" if data else "data of unknown size: set plan.num_images and plan.num_classes"


def _of_training(key: str, task: TrainTask, data: DataSize) -> Estimate:
    network = network_of(task.model, data)
    state = network.state_bytes * (2 if task.training.ema else 1) + 4 * network.parameters
    stored = _CHECKPOINTS * state + _KEPT_NETWORKS * network.state_bytes
    return Estimate(key, training_flops(network, task.training, data), checkpoint_bytes=stored)


def _speed(
    config: ChainConfig,
    nodes: Sequence[Node[Any]],
    sizes: Mapping[str, DataSize | None],
    done: Mapping[str, Finished],
) -> float | None:
    """Operations per second of one worker, from its training images per second on the source network."""
    source = next((n for n in nodes if isinstance(n.task, TrainTask)), None)
    data = sizes.get(source.task.data) if source else None
    if source is None or data is None:
        return None
    images = config.plan.images_per_second
    if images is None and source.key in done:
        payload = done[source.key].record.payload
        images = payload["images_per_second"] / payload["world_size"]
    if images is None:
        return None
    return float(images * step_passes(source.task.training) * network_of(source.task.model, data).flops)


def _hours(e: Estimate, speed: float | None) -> str:
    return "" if speed is None or e.flops is None else three_digits(e.flops / speed / 3600)


def _tera(flops: float | None) -> str:
    return "" if flops is None else three_digits(flops / 1e12)


def three_digits(value: float) -> str:
    """With the digits that are known; never in powers of ten."""
    return f"{value:.3g}" if value < 99.95 else f"{value:,.0f}"


def _size_text(num_bytes: float | None) -> str:
    if not num_bytes:
        return ""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{three_digits(num_bytes)} {unit}"
        num_bytes /= 1000
    return f"{three_digits(num_bytes)} TB"
