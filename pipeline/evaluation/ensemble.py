"""AutoAttack and Square through pyautoattack, with its warnings collected and its habits contained.

It seeds torch's global generator, installs a trace function and counts calls in a module global; all three are put
back.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor, nn

from pipeline.config.base import ThreatModel

_NORMS = {"linf": "Linf", "l2": "L2"}


def _library() -> ModuleType:
    try:
        import pyautoattack
        import pyautoattack.checks
        import pyautoattack.square
    except ImportError as error:
        raise ValueError(
            "expected pyautoattack for the attacks 'square' and 'autoattack', got no such package: "
            "install it (`pip install pyautoattack`) or leave these attacks out of evaluation.attacks"
        ) from error
    library: ModuleType = pyautoattack
    return library


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage().replace(" See flags_doc.md for details.", "").strip()
        if message not in self.messages:
            self.messages.append(message)


@contextmanager
def _contained(device: torch.device) -> Iterator[list[str]]:
    logger, collector, trace = logging.getLogger("auto-attack"), _Collector(), sys.gettrace()
    before = logger.propagate, logger.disabled, logger.level
    # Its warnings are a result: no setting of the application's may keep them away.
    logger.propagate, logger.disabled = False, False
    logger.setLevel(logging.WARNING)
    logger.addHandler(collector)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield collector.messages
    finally:
        sys.settrace(trace)
        logger.removeHandler(collector)
        logger.propagate, logger.disabled, level = before
        logger.setLevel(level)


def square(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, *, num_queries: int, seed: int) -> Tensor:
    """Square attack (Andriushchenko et al., 2020): needs scores only, no gradient.

    Args:
        model: logits (B, num_classes) from x in [0, 1].
        x, y: images (B, C, H, W) and labels (B,).
        threat: norm and radius.
        num_queries: forward passes per example.
        seed: of the random search.

    Returns:
        x_adv (B, C, H, W) in the ball and in [0, 1].

    Raises:
        ValueError: pyautoattack is not installed.
    """
    attack = _library().square.SquareAttack(
        model, norm=_NORMS[threat.norm], eps=threat.eps, n_queries=num_queries, seed=seed, device=x.device,
        p_init=0.8, resc_schedule=True,
    )  # fmt: skip
    with _contained(x.device), torch.no_grad():
        x_adv: Tensor = attack.perturb(x, y)
    return x_adv.detach()


def autoattack(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, *, seed: int) -> tuple[Tensor, list[str]]:
    """The standard AutoAttack (Croce and Hein, 2020), on images that are classified correctly.

    With fewer than ten classes every wrong class is a target. The targeted DLR loss needs four classes: with fewer the
    ensemble is APGD-CE, untargeted FAB and Square, and a warning says so.

    Args:
        model: logits (B, num_classes) from x in [0, 1].
        x, y: images (B, C, H, W) and labels (B,).
        threat: norm and radius.
        seed: of every attack in it.

    Returns:
        x_adv (B, C, H, W), equal to x where no attack succeeded, and what the library warned about.

    Raises:
        ValueError: pyautoattack is not installed.
    """
    library = _library()
    library.checks.funcs.update(dict.fromkeys(library.checks.funcs, 0))
    with torch.no_grad():
        num_classes = model(x[:1]).shape[1]
    with _contained(x.device) as messages:
        attack = library.AutoAttack(model, norm=_NORMS[threat.norm], eps=threat.eps, seed=seed, device=x.device)
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, num_classes - 1)
        if num_classes < 4:
            attack.attacks_to_run = ["apgd-ce", "fab", "square"]
        x_adv, _ = attack.run_standard_evaluation(x, y, batch_size=len(x))
        found = list(messages)
    if num_classes < 4:
        found.append(f"with {num_classes} classes the ensemble is APGD-CE, FAB and Square, not the standard one")
    return x_adv.detach(), found
