"""Whether the activation fits the network of every transfer target, found out before anything is trained."""

from typing import Any

import torch

from pipeline.config.base import one_line
from pipeline.config.chain import ChainConfig
from pipeline.config.load import ConfigError
from pipeline.config.model import ArchitectureConfig
from sparta_models import ActivationBank, build_model


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
            bank = ActivationBank.from_model(_build("model", config.model, spec))
        for target in config.transfer:
            name = f"transfer target {target.name}"
            network = _build(name, target.model or config.model, "relu")
            try:
                bank.apply_to(network, adapt=target.adapt)
            except ValueError as error:
                raise ConfigError(f"{name}: {one_line(error)}") from error


def _build(name: str, architecture: ArchitectureConfig, activation: str | dict[str, Any]) -> torch.nn.Module:
    options: dict[str, Any] = dict(architecture.options)
    try:
        return build_model(architecture.name, activation=activation, **options)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"{name}: {architecture.name} cannot be built: {one_line(error)}") from error
