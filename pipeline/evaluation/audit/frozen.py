"""16: all of it again on the frozen, transferred model: its activation is frozen, and no check failed on it.

A transferred model is audited like any other; this check adds what only it must hold, after all attacks are done (17
makes none). An activation is loose where a parameter asks for a gradient, where `.train()` moves a part of it out of
eval mode, and where it normalises by the statistics of the batch, which no mode pins.
"""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.evaluation.audit.subject import Subject
from pipeline.evaluation.audit.verdict import judged, skipped
from pipeline.evaluation.records import Check
from sparta_models import Activation

WARN, FAIL = 0.0, 0.5


def check(subject: Subject) -> Check:
    """Figure: failed checks so far, plus frozen activations that are not."""
    modules = subject.model.named_modules()
    frozen = {name: module for name, module in modules if isinstance(module, Activation) and module.frozen}
    if not frozen:
        return skipped(16, "frozen", "the model has no frozen activation: it was not made by a transfer")
    loose = [name for name, module in frozen.items() if _is_loose(module, subject.learning)]
    failed = [check.name for check in subject.so_far if check.verdict == "fail"]
    return judged(
        16, "frozen", float(len(failed) + len(loose)), warn=WARN, fail=FAIL,
        summary=f"on {len(frozen)} frozen activations: checks failed: {', '.join(failed) or 'none'}; "
        f"not frozen after all: {', '.join(loose) or 'none'}",
    )  # fmt: skip


def _is_loose(module: nn.Module, learning: frozenset[nn.Parameter]) -> bool:
    learns = any(parameter in learning for parameter in module.parameters())
    unpinned = any(isinstance(part, _BatchNorm) and part.running_mean is None for part in module.modules())
    module.train()  # in eval mode, in which the audit looks at it, everything seems pinned
    moved = any(part.training for part in module.modules())
    module.eval()
    return learns or unpinned or moved
