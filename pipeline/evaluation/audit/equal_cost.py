"""15, its second half: networks of equal cost with other gates (SE, CBAM, ATAC), where such are given.

Is it this gate that makes the network robust, or would any gate do, or the operations alone? Each network is attacked
by the same white-box attack on the same images. One that costs no more and is clearly more robust makes the check
warn; it never fails, because nothing is masked by it.
"""

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from torch import nn

from pipeline.evaluation.audit.subject import FLOAT32_ONLY, Subject
from pipeline.evaluation.judged_model import attackable, evaluating
from pipeline.evaluation.records import Check
from pipeline.evaluation.stats import mcnemar
from pipeline.training.network import forward_flops

TOLERANCE = 0.05
"""Share of forward FLOPs by which a network may be dearer and still count as costing no more."""


def beside_equal_cost(subject: Subject, found: Check) -> Check:
    """`found` with every network of `subject.matched` in its details: robust accuracy, cost, paired gain over it."""
    own, cost = _robust(subject), _cost(subject, subject.model)
    details: dict[str, float | list[float]] = {"robust": float(own.mean())}
    told, better = [], []
    for name, model in subject.matched.items():
        with evaluating(model):
            other = _robust(replace(subject, model=attackable(model, subject.all_x), so_far=[]))
            share = _cost(subject, model) / cost
        gain, dearer = mcnemar(own, other), share > 1 + TOLERANCE  # a cost that is not known excuses nothing
        details |= {f"robust, {name}": float(other.mean())} | ({} if math.isnan(share) else {f"cost, {name}": share})
        details[f"gain over {name}"] = [gain.value, gain.low, gain.high]
        told.append(f"{name} {gain} at {_in_words(share)}{', dearer' if dearer else ''}")
        better += [name] if gain.high < 0 and not dearer else []
    summary = f"{found.summary}; robust accuracy of this network minus that of {'; '.join(told)}"
    if better:
        summary += f"; more robust at no more cost: {', '.join(better)}"
    verdict = "warn" if better and found.verdict in ("pass", "skip") else found.verdict
    return found.model_copy(update={"summary": summary, "verdict": verdict, "details": {**found.details, **details}})


def _cost(subject: Subject, model: nn.Module) -> float:
    """Forward FLOPs; not a number where the model does not run in float64, in which they are counted."""
    try:
        return forward_flops(model, subject.all_x)
    except FLOAT32_ONLY:
        return math.nan


def _in_words(share: float) -> str:
    return "a cost that could not be counted" if math.isnan(share) else f"{share:.2f} of its cost"


def _robust(subject: Subject) -> npt.NDArray[np.bool_]:
    """(N,) who withstands the white-box attack."""
    correct = subject.clean_correct.clone()
    correct[subject.clean_correct] = subject.survives
    return correct.cpu().numpy()
