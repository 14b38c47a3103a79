"""The optimizer's groups and the learning rate over time.

Groups are formed by what a parameter is part of, never by its name:
  activation  parameters of an activation that is not frozen; lr * activation_lr_factor, activation_weight_decay
  norm        biases, and parameters of normalisation layers; norm_weight_decay
  weight      all others (convolutions, linear layers); weight_decay
Frozen parameters are in no group.
"""

import math

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from pipeline.config.training import OptimizerConfig, ScheduleConfig
from sparta_models import Activation

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters in training, by group; each is in exactly one, shared ones once."""
    groups: dict[str, list[nn.Parameter]] = {"activation": [], "norm": [], "weight": []}
    activation = {id(p) for m in model.modules() if isinstance(m, Activation) for p in m.parameters()}
    norm = {id(p) for m in model.modules() if isinstance(m, _NORMS) for p in m.parameters(recurse=False)}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in activation:
            groups["activation"].append(parameter)
        elif id(parameter) in norm or parameter.dim() <= 1:
            groups["norm"].append(parameter)
        else:
            groups["weight"].append(parameter)
    return groups


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.SGD:
    """SGD over the groups; `lr_factor` of a group scales the scheduled learning rate."""
    decay = {
        "activation": config.activation_weight_decay,
        "norm": config.weight_decay if config.norm_weight_decay is None else config.norm_weight_decay,
        "weight": config.weight_decay,
    }
    factor = {"activation": config.activation_lr_factor}
    groups = [
        {"name": name, "params": params, "weight_decay": decay[name], "lr_factor": factor.get(name, 1.0)}
        for name, params in parameter_groups(model).items()
        if params
    ]
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the scheduled learning rate, scaled by every group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def schedule_factor(config: ScheduleConfig, epoch: float, epochs: int) -> float:
    """Learning rate relative to its peak at a time `epoch` in [0, epochs], counted in epochs with fractions."""
    share = epoch / epochs
    if config.kind == "one_cycle":
        if share < config.peak:
            return share / config.peak
        return 1 + (config.final_factor - 1) * (share - config.peak) / (1 - config.peak)
    if epoch < config.warmup_epochs:
        return epoch / config.warmup_epochs
    match config.kind:
        case "constant":
            return 1.0
        case "piecewise":
            return float(config.factor ** sum(share >= milestone for milestone in config.milestones))
        case "cosine":
            done = (epoch - config.warmup_epochs) / max(epochs - config.warmup_epochs, 1e-12)
            return config.final_factor + (1 - config.final_factor) * 0.5 * (1 + math.cos(math.pi * done))
