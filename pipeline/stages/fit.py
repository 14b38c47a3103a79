"""Whether every network can be built, every image that is to be judged is there, and the activation fits the network of
every transfer target: found out before anything is trained."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pipeline.config.base import one_line
from pipeline.config.chain import ChainConfig
from pipeline.config.load import ConfigError
from pipeline.config.model import ArchitectureConfig
from pipeline.data import PreparedData
from pipeline.stages.evaluate import EvaluateTask
from pipeline.stages.node import Finished, Node
from pipeline.stages.train import TrainTask
from sparta_models import ActivationBank, build_model


def check_networks(nodes: Sequence[Node[Any]]) -> None:
    """Build every network that is to be trained, on torch's meta device: nothing is computed or held in memory.

    Raises:
        ConfigError: for one that cannot be built; it names the node.
    """
    known: set[str] = set()
    for node in nodes:
        if isinstance(node.task, TrainTask) and (spec := node.task.model.model_dump_json()) not in known:
            known.add(spec)
            with torch.device("meta"):
                built(node.key, node.task.model, node.task.model.activation.spec())


def check_images(nodes: Sequence[Node[Any]], done: Mapping[str, Finished]) -> None:
    """Compare what evaluations ask for with the test splits that are prepared.

    Raises:
        ConfigError: for an evaluation of more images than there are.
    """
    most: dict[str, int] = {}
    for task in (node.task for node in nodes if isinstance(node.task, EvaluateTask)):
        most[task.data] = max(most.get(task.data, 0), task.evaluation.num_examples or 0)
    for data, asked in most.items():
        if data not in done or not asked:
            continue
        prepared = PreparedData.load(done[data].directory)
        if asked > (available := prepared.splits["test"].count):
            raise ConfigError(
                f"expected num_examples <= {available}, the test images of {prepared.name}, got {asked}; lower "
                "it in the evaluation, or leave it unset for all"
            )


def check_fit(config: ChainConfig, bank: ActivationBank | None = None) -> None:
    """Try the activation on every target, untrained.

    Args:
        config: a chain with its final settings.
        bank: what is taken to the targets; None: what `config.model` will have trained.

    Raises:
        ConfigError: for a network that cannot be built, or one that the activation does not fit.
    """
    if not config.transfer:
        return
    spec = config.model.activation.spec()
    with torch.random.fork_rng(devices=[]):  # weights that are drawn here must not move those of later draws
        if bank is None:
            bank = ActivationBank.from_model(built("model", config.model, spec))
        for index, target in enumerate(config.transfer):
            name = f"transfer target {target.name}"
            network = built(name, target.model or config.model, "relu")
            try:
                bank.apply_to(network, adapt=target.adapt)
            except ValueError as error:
                where = f"; in the configuration, transfer.{index}.adapt" if "adapt=" in str(error) else ""
                raise ConfigError(f"{name}: {one_line(error)}{where}") from error


def built(
    name: str, architecture: ArchitectureConfig, activation: str | dict[str, Any], **given: Any
) -> torch.nn.Module:
    """The network, with `given` where its own options say nothing else.

    Raises:
        ConfigError: where it cannot be built; `name` says whose it is.
    """
    options = {**given, **architecture.options}
    try:
        return build_model(architecture.name, activation=activation, **options)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(
            f"{name}: {architecture.name} with {dict(architecture.options)} cannot be built: {one_line(error)}"
        ) from error
