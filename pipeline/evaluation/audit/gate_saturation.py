"""9: the gates work between their ends. A saturated gate has no slope, phi (1 - phi) = 0: it hides its input.

A share of saturated gates is normal: behind a sharp gate (Sparta with init "relu" has beta = 10) every |x| > 0.69
counts. So the mean over the sites is judged; and beside it the worst site, beyond an allowance, because a single site
that is saturated all over hides its gates from every gradient, and drowns in the mean of a deep network.
"""

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.evaluation.audit.chunks import slices
from pipeline.evaluation.audit.gates import gate_maps, gated_sites
from pipeline.evaluation.audit.subject import Subject
from pipeline.evaluation.audit.verdict import judged, skipped
from pipeline.evaluation.records import Check

WARN, FAIL = 0.3, 0.6
ALLOWANCE = 0.35
"""How much more than the mean may be at one site: above 0.65 it warns, above 0.95 it fails."""
SLOPE = 1e-3
"""A gate is saturated where phi (1 - phi) is below this: 250 times flatter than at its middle."""
_BINS = 10


def check(subject: Subject) -> Check:
    """Figure: share of saturated gates on adversarial images, the worse of the sites' mean and the worst site's excess;
    histograms in the details."""
    if not gated_sites(subject.model):
        return skipped(9, "gate_saturation", "the model has no gates")
    if not len(subject.y):
        return skipped(9, "gate_saturation", "no image is classified correctly")
    clean, adversarial = _count(subject, subject.x), _count(subject, subject.white_adv)
    saturated = adversarial.saturated
    details: dict[str, float | list[float]] = {
        "saturated, by site": saturated,
        "saturated, by site, clean": clean.saturated,
    }
    for name, found in (("clean", clean), ("adversarial", adversarial)):
        details |= {f"histogram {name} {i}": histogram for i, histogram in enumerate(found.histograms)}
    mean, highest = sum(saturated) / len(saturated), max(saturated)
    return judged(
        9, "gate_saturation", max(mean, highest - ALLOWANCE), warn=WARN, fail=FAIL,
        summary=f"{mean:.1%} of the gates have phi (1 - phi) < {SLOPE:g} on adversarial images, mean over the sites; "
        f"{highest:.1%} at the worst, number {saturated.index(highest) + 1} of {len(saturated)} "
        f"(warns above {WARN + ALLOWANCE:.0%}, fails above {FAIL + ALLOWANCE:.0%})",
        details=details,
    )  # fmt: skip


class _Sites(NamedTuple):
    """Of every site, in the order of the calls."""

    saturated: list[float]
    """Share of its gates."""
    histograms: list[list[float]]
    """Shares of its gates by value, from 0 to 1."""


def _count(subject: Subject, x: Tensor) -> _Sites:
    """Count on the images x (B, C, H, W), in chunks: the gates of a large network fill the memory."""
    flat, total, bins = Counter[int](), Counter[int](), dict[int, Tensor]()
    for piece in slices(len(x)):
        with torch.no_grad():
            maps = gate_maps(subject.model, x[piece])[1]
        for i, phi in enumerate(maps):
            flat[i] += int((~(phi * (1 - phi) >= SLOPE)).sum())  # a gate that is not a number has no slope either
            total[i] += phi.numel()
            bins[i] = bins.get(i, 0) + torch.histc(phi.double().cpu(), bins=_BINS, min=0, max=1)
    histograms = [[round(share, 6) for share in (counts / counts.sum()).tolist()] for counts in bins.values()]
    return _Sites([flat[i] / total[i] for i in total], histograms)
