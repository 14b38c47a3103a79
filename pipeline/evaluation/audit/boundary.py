"""17: where the class changes, the logits of the two classes meet.

An attack climbs the margin, so a margin that says nothing about the decision leads every one of them astray, with exact
and smooth gradients: the class may be an ordinary network's, and its logit anything. Of a network whose logits depend
continuously on the image the two best are level at the change of class; one that only pretends has a jump there.
"""

import torch
from torch import Tensor

from pipeline.evaluation.audit.subject import Subject, spread
from pipeline.evaluation.audit.verdict import judged, skipped
from pipeline.evaluation.records import Check

WARN, FAIL = 0.05, 0.2
JUMP = 0.01
"""Share of the logits' spread by which the best logit may lead at the change of class: far above float32's rounding."""
_HALVINGS = 40
"""More than the 24 after which two points in [0, 1] are neighbours in float32."""


def check(subject: Subject) -> Check:
    """Figure: share of changes of class, on lines between two images, at which the margin jumps."""
    x = subject.all_x[: subject.effort.num_probed]
    with torch.no_grad():
        logits = subject.model(x)
        classes = logits.argmax(1)
        other = _of_another_class(classes)
        if other is None:
            return skipped(17, "boundary", "the model sees one class alone")
        near, far = _change(subject, x, x[other], classes)
        jumps = torch.maximum(*(_margin(subject.model(end)) for end in (near, far))) / spread(logits)
    return judged(
        17, "boundary", float((~(jumps <= JUMP)).float().mean()), warn=WARN, fail=FAIL,
        summary=f"share of changes of class at which the two best logits differ by more than {JUMP:.0%} of the logits' "
        "spread",
        details={"median jump": float(jumps.median())},
    )  # fmt: skip


def _of_another_class(classes: Tensor) -> Tensor | None:
    """For each of (B,) the place of the next one of another class; None where there is none."""
    n = len(classes)
    for_each = [next((j % n for j in range(i + 1, i + n) if classes[j % n] != classes[i]), None) for i in range(n)]
    return None if None in for_each or not n else torch.tensor(for_each, device=classes.device)


def _change(subject: Subject, near: Tensor, far: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """The two sides (B, C, H, W) of a change of class between `near`, of these classes, and `far`, of others."""
    for _ in range(_HALVINGS):
        middle = (near + far) / 2
        same = (subject.model(middle).argmax(1) == classes).view(-1, 1, 1, 1)
        near, far = torch.where(same, middle, near), torch.where(same, far, middle)
    return near, far


def _margin(logits: Tensor) -> Tensor:
    """(B,) by how much the best logit is above the second."""
    best = logits.topk(2, dim=1).values
    return best[:, 0] - best[:, 1]
