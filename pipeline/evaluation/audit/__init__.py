"""The gradient-masking audit: seventeen checks on any model, one module each.

Each gives a verdict (pass, warn, fail, or skip where it does not apply), its figure and its thresholds. They follow
Athalye et al. (2018, arXiv 1802.00420), Carlini et al. (2019, 1902.06705) and Tramer et al. (2020, 2002.08347), and add
what a gated activation calls for.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from pipeline.config.base import ThreatModel
from pipeline.evaluation.audit import (
    black_box,
    boundary,
    bpda,
    convergence,
    determinism,
    eps_curve,
    finite_difference,
    frozen,
    gate_attack,
    gate_saturation,
    gradient_census,
    loss_surface,
    losses,
    noise,
    one_step,
    random_gate,
    transfer,
)
from pipeline.evaluation.audit.kept import Kept
from pipeline.evaluation.audit.subject import Subject
from pipeline.evaluation.judged_model import attackable, copied, evaluating, model_digest, own_random_state, short_seed
from pipeline.evaluation.records import AuditReport, Check

CHECKS: tuple[Callable[[Subject], Check], ...] = (
    one_step.check,
    convergence.check,
    eps_curve.check,
    black_box.check,
    transfer.check,
    noise.check,
    losses.check,
    gradient_census.check,
    gate_saturation.check,
    bpda.check,
    gate_attack.check,
    finite_difference.check,
    determinism.check,
    loss_surface.check,
    random_gate.check,
    frozen.check,
    boundary.check,
)
_LOG = logging.getLogger(__name__)


def audit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    budget: Literal["quick", "full"],
    *,
    seed: int,
    reference: nn.Module | None = None,
    matched: Mapping[str, nn.Module] | None = None,
    directory: Path | None = None,
    pristine: nn.Module | None = None,
) -> AuditReport:
    """Look for gradient masking. Memory grows with the images alone: the model sees them in chunks of 128.

    Args:
        model: logits (B, num_classes) from x in [0, 1]; float32. It is looked at in eval mode and left as it was.
        x, y: images (N, C, H, W) and labels (N,).
        threat: the adversary that the robustness claim is about.
        budget: effort of the attacks; promotion in the registry needs "full".
        seed: of every random number.
        reference: another model on the same data, say the ReLU control, for transfer attacks.
        matched: networks of equal cost with other gates (SE, CBAM, ATAC) by name, trained on the same data with the
            same budget, for check 15.
        directory: where each finished check is kept as a file; called again with the same arguments it goes on with
            those that are missing. None: nowhere.
        pristine: a copy of the model from before anybody asked it anything, for check 13; None: as it is now.

    Raises:
        ValueError: no images.
    """
    if not len(y):
        raise ValueError("expected images to audit, got none")
    report = AuditReport(
        budget=budget,
        n=len(y),
        threat=threat,
        seed=seed,
        model_digest=model_digest(model if pristine is None else pristine),
        reference_digest=None if reference is None else model_digest(reference),
        checks=(),
        matched={name: model_digest(other) for name, other in (matched or {}).items()},
    )
    digests = (report.model_digest, report.reference_digest, report.matched)
    learning = frozenset(parameter for parameter in model.parameters() if parameter.requires_grad)
    pristine = copied(model) if pristine is None else pristine
    with evaluating(model), own_random_state(seed):
        asked = attackable(model, x)
        subject = Subject(asked, x, y, threat, budget, seed, reference, matched or {}, learning, pristine)
        kept = Kept(directory, subject, digests)
        for number, check in enumerate(CHECKS, start=1):
            found = kept.load(number) or _run(number, check, subject, kept)
            subject.so_far.append(found)
            _LOG.info("audit %2d %-18s %-4s %s", found.number, found.name, found.verdict, found.summary)
    return report.model_copy(update={"checks": tuple(subject.so_far)})


def _run(number: int, check: Callable[[Subject], Check], subject: Subject, kept: Kept) -> Check:
    """Each check draws its own random numbers, so that it finds the same whether or not others ran before it."""
    if check is frozen.check:  # looks at the model and at the checks before it alone, and is never kept
        return check(subject)
    subject.prepare()
    with own_random_state(short_seed(subject.seed, "check", number)):
        found = check(subject)
    kept.save(found)
    return found
