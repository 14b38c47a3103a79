"""13: the same image gives the same logits: called again, alone or in company, before an attack and after; and a
forward pass leaves no trace.
"""

import copy

import torch
from torch import Tensor, nn

from pipeline.evaluation.audit.subject import Subject, spread
from pipeline.evaluation.audit.verdict import judged, largest
from pipeline.evaluation.records import Check

WARN, FAIL = 1e-4, 1e-3


def check(subject: Subject) -> Check:
    """Figure: largest change of a logit, in units of the logits' spread; 1 more where the state changed."""
    x = subject.all_x[: subject.effort.num_probed]
    before = _state(subject.model)
    with torch.no_grad():
        logits = subject.model(x)
        again = subject.model(x)
        reversed_order = subject.model(x.flip(0)).flip(0)
        alone = torch.cat([subject.model(image[None]) for image in x])
        company = subject.model(torch.cat([x, 1 - x]))[: len(x)]
    changed = any(not torch.equal(old, new) for old, new in zip(before, _state(subject.model), strict=True))
    unit = spread(logits)
    others = {"called again": again, "other order": reversed_order, "alone": alone, "other company": company}
    changes = {name: float((other - logits).abs().max() / unit) for name, other in others.items()}
    if subject.pristine is not None and len(subject.x):
        changes["after the attack"] = float(_trace_of_the_attack(subject, subject.pristine) / unit)
    return judged(
        13, "determinism", largest(changes.values()) + float(changed), warn=WARN, fail=FAIL,
        summary="largest change of a logit, in units of the logits' spread, between calls and batches"
        + ("; a forward pass changed buffers of the model" if changed else ""),
        details=dict(changes),
    )  # fmt: skip


def _trace_of_the_attack(subject: Subject, pristine: nn.Module) -> Tensor:
    """Largest difference between what a model says of adversarial images that was asked many others, and one that was
    asked nothing yet: a defence that remembers queries answers as if they were the images that it saw first."""
    x_adv, fresh = subject.white_adv[: subject.effort.num_probed], copy.deepcopy(pristine)
    fresh.eval()
    with torch.no_grad():
        largest_change: Tensor = (subject.model(x_adv) - fresh(x_adv)).abs().max()
    return largest_change


def _state(model: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in model.state_dict().values()]
