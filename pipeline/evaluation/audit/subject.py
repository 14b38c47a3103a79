"""What every check looks at: the model, its correctly classified images, the effort, the white-box result to beat."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.config.evaluation import ThreatModel
from pipeline.evaluation.attacks import Problem, pgd_on, worst_of
from pipeline.evaluation.blocks import derived_seed, predict
from pipeline.evaluation.records import Check
from pipeline.evaluation.stats import Accuracy


@dataclass(frozen=True)
class Effort:
    """How much work the checks do; steps, queries, flips and draws are per example."""

    steps: int
    restarts: int
    square_queries: int
    spsa_steps: int
    spsa_samples: int
    hard_label_flips: int
    noise_draws: int
    num_targets: int
    num_probed: int
    """Examples for checks that look at each one closely (finite differences, loss surface)."""
    line_points: int


EFFORTS: dict[str, Effort] = {
    "quick": Effort(
        steps=20, restarts=1, square_queries=100, spsa_steps=8, spsa_samples=8, hard_label_flips=30, noise_draws=5,
        num_targets=2, num_probed=16, line_points=33,
    ),
    "full": Effort(
        steps=50, restarts=4, square_queries=2000, spsa_steps=50, spsa_samples=64, hard_label_flips=300,
        noise_draws=50, num_targets=9, num_probed=64, line_points=129,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A model under audit, in eval mode.

    all_x (N, C, H, W), all_y (N,): every image. x, y: those classified correctly, which most checks attack.
    """

    model: nn.Module
    all_x: Tensor
    all_y: Tensor
    threat: ThreatModel
    budget: Literal["quick", "full"]
    seed: int
    reference: nn.Module | None
    matched: Mapping[str, nn.Module] = field(default_factory=dict)
    """Networks of equal cost with other activations, by name."""
    so_far: list[Check] = field(default_factory=list)
    """Checks that are done; the last one looks back at them."""

    @property
    def effort(self) -> Effort:
        """Work per check."""
        return EFFORTS[self.budget]

    @property
    def n(self) -> int:
        """All examples, the denominator of every share."""
        return len(self.all_y)

    @cached_property
    def clean_correct(self) -> Tensor:
        """(N,) bool."""
        return predict(self.model, self.all_x) == self.all_y

    @cached_property
    def x(self) -> Tensor:
        """Correctly classified images."""
        return self.all_x[self.clean_correct]

    @cached_property
    def y(self) -> Tensor:
        """Their labels."""
        return self.all_y[self.clean_correct]

    def problem(self, label: str, *, keep: Tensor | None = None, threat: ThreatModel | None = None) -> Problem:
        """The correct images (those of the mask `keep`) as an attack problem with its own random numbers."""
        x, y = (self.x, self.y) if keep is None else (self.x[keep], self.y[keep])
        return Problem(self.model, x, y, threat or self.threat, derived_seed(self.seed, "audit", label), self.reference)

    @cached_property
    def ce_adv(self) -> Tensor:
        """Plain PGD on cross-entropy, one start: what most papers report; the size of x."""
        return pgd_on(self.problem("ce"), steps=self.effort.steps)

    @cached_property
    def white_adv(self) -> Tensor:
        """The white-box attack to beat: per example the worst of PGD on cross-entropy and on the margin."""
        starts = self.effort.restarts
        margin = pgd_on(self.problem("margin"), steps=self.effort.steps, restarts=starts, loss="margin")
        again = pgd_on(self.problem("ce again"), steps=self.effort.steps, restarts=starts)
        return worst_of(self.model, self.x, self.y, [self.ce_adv, margin, again])

    @cached_property
    def survives(self) -> Tensor:
        """Bool over x: correct after the white-box attack."""
        return self.correct(self.white_adv)

    @cached_property
    def survivors(self) -> Problem:
        """The examples that the white-box attack did not fool."""
        return self.problem("survivors", keep=self.survives)

    @cached_property
    def double(self) -> nn.Module:
        """A float64 copy of the model."""
        return copy.deepcopy(self.model).double().eval()

    def correct(self, x_adv: Tensor) -> Tensor:
        """Bool over x: whether the model gets its adversarial image right."""
        return predict(self.model, x_adv) == self.y

    def fooled(self, candidates: Sequence[Tensor], problem: Problem | None = None) -> int:
        """How many of the survivors (or of the problem's examples) at least one of the candidates fools."""
        problem = problem or self.survivors
        if not len(problem.y):
            return 0
        x_adv = worst_of(self.model, problem.x, problem.y, list(candidates))
        return int((predict(self.model, x_adv) != problem.y).sum())


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
    """A check on a share of examples; its figure is the lower end of the 95 % interval: chance does not condemn."""
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


BEATEN_WARN, BEATEN_FAIL = 0.005, 0.02
"""An attack that knows less, or follows doctored gradients, must not beat the white-box attack: on more than 2 % of the
examples it fails, whatever the sample's size (the lower end of the interval is what counts)."""


def beats(number: int, name: str, subject: Subject, attacks: dict[str, Tensor], what: str) -> Check:
    """A check that none of `attacks` (name -> x_adv of the survivors) fools what the white-box attack did not."""
    each: dict[str, float | list[float]] = {
        f"fooled by {key}": float(subject.fooled([x_adv])) for key, x_adv in attacks.items()
    }
    return judged_share(
        number, name, subject.fooled(list(attacks.values())) if attacks else 0, subject.n, warn=BEATEN_WARN,
        fail=BEATEN_FAIL, summary=f"withstand the white-box attack and are fooled by {what}",
        details={"survivors": float(len(subject.survivors.y)), **each},
    )  # fmt: skip


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{i != y} z_i - z_y, (B,): positive where misclassified."""
    return logits.scatter(1, y[:, None], -torch.inf).amax(1) - logits.gather(1, y[:, None]).squeeze(1)
