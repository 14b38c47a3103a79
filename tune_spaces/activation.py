"""The form of Sparta's gate, who shares it, and how fast it learns."""

from tune_spaces.distributions import Choice, Space, Uniform

_VARIANTS = ("depthwise", "attention", "lowrank", "shared", "smoothmax")

SPACE: Space = {
    "model.activation.options.variant": Choice(*_VARIANTS),
    "model.activation.options.kernel_size": Choice(3, 5, 7),
    "model.activation.options.beta": Uniform(0.5, 10.0, log=True),
    "model.activation.options.bias": Choice(False, True),
    "model.activation.sharing": Choice("site", "stage"),
    "training.optimizer.activation_lr_factor": Uniform(0.1, 10.0, log=True),
    "training.optimizer.activation_weight_decay": Uniform(1e-6, 1e-3, log=True),
}
