"""Attacks on a classifier of images in [0, 1]: projected gradient ascent and its parts."""

from pipeline.training.attacks.geometry import NORMS
from pipeline.training.attacks.losses import LOSSES, TARGETED_LOSSES, objective
from pipeline.training.attacks.pgd import STEP_RULES, attack_mode, default_step_size, fgsm, pgd

__all__ = [
    "LOSSES",
    "NORMS",
    "STEP_RULES",
    "TARGETED_LOSSES",
    "attack_mode",
    "default_step_size",
    "fgsm",
    "objective",
    "pgd",
]
