"""Attack strength, activation and learning rate together: the parameters that move robustness most, of each of them."""

from tune_spaces.activation import SPACE as ACTIVATION
from tune_spaces.attack import SPACE as ATTACK
from tune_spaces.distributions import Space
from tune_spaces.optim import SPACE as OPTIM

_KEYS = (
    "training.threat.eps",
    "training.method.kind",
    "training.method.beta",
    "training.method.attack.steps",
    "model.activation.options.variant",
    "model.activation.options.kernel_size",
    "model.activation.options.beta",
    "training.optimizer.activation_lr_factor",
    "training.optimizer.lr",
    "training.optimizer.weight_decay",
)
_ALL = {**ATTACK, **ACTIVATION, **OPTIM}

SPACE: Space = {key: _ALL[key] for key in _KEYS}
