"""What every check looks at: the model, its correctly classified images, the effort, the white-box result to beat."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from torch import Tensor, nn

from pipeline.config.base import ThreatModel
from pipeline.evaluation.attacks import Problem, pgd_on
from pipeline.evaluation.audit.chunks import Attack, attacked, fooled, predicted, worst
from pipeline.evaluation.judged_model import own_random_state, short_seed
from pipeline.evaluation.records import Check

FLOAT32_ONLY = (RuntimeError, TypeError, NotImplementedError)
"""What a model raises that does not run in float64."""


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


def spread(logits: Tensor) -> Tensor:
    """Standard deviation of logits (B, num_classes) within images: what all classes have in common decides nothing."""
    return (logits - logits.mean(1, keepdim=True)).std().clamp_min(1e-12)


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
    learning: frozenset[nn.Parameter] = frozenset()
    """Parameters that asked for a gradient before the audit, in which none does."""
    pristine: nn.Module | None = None
    """The model before anybody asked it anything; None where it cannot be copied."""
    so_far: list[Check] = field(default_factory=list)
    """Checks that are done; check 16 looks back at them."""

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
        return predicted(self.model, self.all_x) == self.all_y

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
        return Problem(self.model, x, y, threat or self.threat, short_seed(self.seed, "audit", label), self.reference)

    @property
    def everyone(self) -> Problem:
        """All images, the misclassified too, as an attack problem."""
        return Problem(self.model, self.all_x, self.all_y, self.threat, self.seed, self.reference)

    def prepare(self) -> None:
        """Attack once what all checks look at, so that a random model's numbers do not depend on which one is first."""
        with own_random_state(self.seed):
            _ = self.survives

    @cached_property
    def ce_adv(self) -> Tensor:
        """Plain PGD on cross-entropy, one start: what most papers report; the size of x."""
        return attacked(lambda part: pgd_on(part, steps=self.effort.steps), self.problem("ce"))

    @cached_property
    def white_adv(self) -> Tensor:
        """The white-box attack to beat: per example the worst of PGD on cross-entropy and on the margin."""
        steps, starts = self.effort.steps, self.effort.restarts
        margin = attacked(
            lambda part: pgd_on(part, steps=steps, restarts=starts, loss="margin"), self.problem("margin")
        )
        again = attacked(lambda part: pgd_on(part, steps=steps, restarts=starts), self.problem("ce again"))
        return worst(self.model, self.x, self.y, [self.ce_adv, margin, again])

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
        model = copy.deepcopy(self.model).double()
        model.eval()
        return model

    def correct(self, x_adv: Tensor) -> Tensor:
        """Bool over x: whether the model gets its adversarial image right."""
        return predicted(self.model, x_adv) == self.y

    def fooled(self, attack: Attack, problem: Problem | None = None) -> Tensor:
        """Bool over the survivors (or the problem's examples): whom the attack fools."""
        return fooled(attack, problem or self.survivors)
