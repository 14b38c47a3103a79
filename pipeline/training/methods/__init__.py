"""Training methods: how the examples of a step are made, and what is minimised on them."""

from dataclasses import replace

from pipeline.config.training import AttackConfig, FGSMRSConfig, TrainingConfig
from pipeline.training.methods.base import Attack, Cost, Method, Terms
from pipeline.training.methods.regularised import Mart, Trades
from pipeline.training.methods.standard import Adversarial, Standard


def build_method(config: TrainingConfig, *, collapsed: bool = False) -> Method:
    """The method of a training section; `collapsed`: the fallback of FGSM-RS after catastrophic overfitting."""
    method, smoothing = config.method, config.label_smoothing
    match method.kind:
        case "standard":
            return Standard(smoothing)
        case "pgd_at":
            return Adversarial(Attack(config.threat, method.attack), smoothing)
        case "trades":
            return Trades(Attack(config.threat, method.attack), method.beta, smoothing)
        case "mart":
            return Mart(Attack(config.threat, method.attack), method.beta)
        case "fgsm_rs":
            attack = method.fallback if collapsed else _one_step(config, method)
            return Adversarial(Attack(config.threat, attack), smoothing)


def step_cost(config: TrainingConfig, *, epoch: int, collapsed: bool = False) -> Cost:
    """Cost of a training step in an epoch (from 0): its method's, and the pass by which AWP finds its weights."""
    cost, awp = build_method(config, collapsed=collapsed).cost, config.awp
    return cost if awp is None or epoch < awp.warmup_epochs else replace(cost, batches=2 * cost.batches)


def _one_step(config: TrainingConfig, method: FGSMRSConfig) -> AttackConfig:
    return AttackConfig(steps=1, step_size=method.step_factor * config.threat.eps, start="uniform", bn=method.bn)


__all__ = [
    "Adversarial",
    "Attack",
    "Cost",
    "Mart",
    "Method",
    "Standard",
    "Terms",
    "Trades",
    "build_method",
    "step_cost",
]
