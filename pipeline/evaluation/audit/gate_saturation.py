"""9: the gates work between their ends. A saturated gate has no slope, phi (1 - phi) = 0: it hides its input."""

import torch
from torch import Tensor

from pipeline.evaluation.audit.gates import gate_maps, gated_sites
from pipeline.evaluation.audit.subject import Subject, judged, skipped
from pipeline.evaluation.records import Check

WARN, FAIL = 0.3, 0.6
SLOPE = 1e-3
"""A gate is saturated where phi (1 - phi) is below this: 250 times flatter than at its middle."""
_BINS = 10


def check(subject: Subject) -> Check:
    """Figure: share of saturated gates, mean over the sites, on adversarial images; histograms in the details."""
    if not gated_sites(subject.model):
        return skipped(9, "gate_saturation", "the model has no gates")
    with torch.no_grad():
        clean, adversarial = (gate_maps(subject.model, x)[1] for x in (subject.x, subject.white_adv))
    saturated = [_saturated(phi) for phi in adversarial]
    details: dict[str, float | list[float]] = {"saturated, by site": saturated}
    details["saturated, by site, clean"] = [_saturated(phi) for phi in clean]
    for name, maps in (("clean", clean), ("adversarial", adversarial)):
        for i, phi in enumerate(maps):
            details[f"histogram {name} {i}"] = _histogram(phi)
    figure = sum(saturated) / len(saturated)
    summary = f"{figure:.1%} of the gates have phi (1 - phi) < {SLOPE:g} on adversarial images"
    return judged(9, "gate_saturation", figure, warn=WARN, fail=FAIL, summary=summary, details=details)


def _saturated(phi: Tensor) -> float:
    return float((phi * (1 - phi) < SLOPE).float().mean())


def _histogram(phi: Tensor) -> list[float]:
    counts = torch.histc(phi.float().cpu(), bins=_BINS, min=0, max=1)
    return [round(share, 6) for share in (counts / counts.sum()).tolist()]
