"""From a figure to a verdict: the forms that checks come in."""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch

from pipeline.evaluation.audit.chunks import Attack
from pipeline.evaluation.audit.subject import Subject
from pipeline.evaluation.records import Check
from pipeline.evaluation.stats import Accuracy

BEATEN_WARN, BEATEN_FAIL = 0.005, 0.02
"""An attack that knows less, or follows doctored gradients, must not beat the white-box attack: on more than 2 % of the
examples it fails, whatever the sample's size (the lower end of the interval is what counts)."""


def largest(figures: Iterable[float]) -> float:
    """The largest figure; not a number where any of them is none, wherever it stands: max() would lose it."""
    return float(torch.tensor(list(figures), dtype=torch.float64).max())


def judged(
    number: int, name: str, figure: float, *, warn: float, fail: float, summary: str,
    details: dict[str, float | list[float]] | None = None,
) -> Check:  # fmt: skip
    """A check whose verdict is where its figure lies; a figure that is not a number fails."""
    verdict: Literal["pass", "warn", "fail"] = "pass" if figure <= warn else "warn" if figure <= fail else "fail"
    return Check(
        number=number, name=name, verdict=verdict, figure=figure, warn_above=warn, fail_above=fail, summary=summary,
        details=details or {},
    )  # fmt: skip


def judged_share(
    number: int, name: str, count: int, n: int, *, warn: float, fail: float, summary: str,
    details: dict[str, float | list[float]] | None = None,
) -> Check:  # fmt: skip
    """A check on a share of examples; its figure is the lower end of the 95 % interval: chance does not condemn.

    Where so few could be counted that all of them would show nothing, ask `in_vain` before.
    """
    share = Accuracy.of(count, n)
    return judged(
        number, name, share.low if count else 0.0, warn=warn, fail=fail,
        summary=f"{count} of {n} examples {summary}; the figure is the lower end of the interval of this share",
        details={"count": float(count), "share": share.value, **(details or {})},
    )  # fmt: skip


def skipped(number: int, name: str, reason: str) -> Check:
    """A check that does not apply."""
    return Check(
        number=number,
        name=name,
        verdict="skip",
        figure=None,
        warn_above=None,
        fail_above=None,
        summary=reason,
        details={},
    )


def in_vain(number: int, name: str, possible: int, n: int, warn: float) -> Check | None:
    """A skipped check, where even all of the `possible` examples that are left would be taken for chance."""
    if possible and Accuracy.of(possible, n).low > warn:
        return None
    return skipped(number, name, f"{possible} of {n} examples withstand the attack before: too few to show anything")


def beats(number: int, name: str, subject: Subject, attacks: Mapping[str, Attack], what: str) -> Check:
    """A check that none of `attacks` fools what the white-box attack did not."""
    if (vain := in_vain(number, name, len(subject.survivors.y), subject.n, BEATEN_WARN)) is not None:
        return vain
    masks = {key: subject.fooled(attack) for key, attack in attacks.items()}
    each: dict[str, float | list[float]] = {f"fooled by {key}": float(mask.sum()) for key, mask in masks.items()}
    return judged_share(
        number, name, int(torch.stack(list(masks.values())).any(0).sum()), subject.n, warn=BEATEN_WARN,
        fail=BEATEN_FAIL, summary=f"withstand the white-box attack and are fooled by {what}",
        details={"survivors": float(len(subject.survivors.y)), **each},
    )  # fmt: skip
