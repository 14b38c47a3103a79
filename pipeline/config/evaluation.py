"""How a model is judged: the threat model, the attacks in their order, and the budget of the gradient-masking audit."""

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from pipeline.config.base import ChosenThreat, Eps, Section, ThreatModel

Loss = Literal["ce", "margin", "dlr"]


class NoiseAttack(Section):
    """Uniform random noise in the ball, the worst of several draws: the least that a model must withstand."""

    kind: Literal["noise"] = "noise"
    num_draws: int = Field(default=10, ge=1)
    """Random points tried per example."""

    @property
    def name(self) -> str:
        """Name in tables and of the arrays."""
        return "noise"


class FGSMAttack(Section):
    """One signed (linf) or normalised (l2) gradient step of length eps from the image (Goodfellow et al., 2015)."""

    kind: Literal["fgsm"] = "fgsm"

    @property
    def name(self) -> str:
        """Name in tables and of the arrays."""
        return "fgsm"


class PGDAttack(Section):
    """Projected gradient ascent of a loss (Madry et al., 2018); margin is the loss of Carlini and Wagner (2017)."""

    kind: Literal["pgd"] = "pgd"
    steps: int = Field(default=20, ge=1)
    """Gradient steps."""
    restarts: int = Field(default=1, ge=1)
    """Random starts; the worst is kept per example."""
    loss: Loss = "ce"
    """Cross-entropy, the difference of the best wrong logit and the true one, or its scale-free form (DLR)."""
    step_size: Eps | None = None
    """Length of a step in pixel units; none means 2.5 eps / steps."""

    @property
    def name(self) -> str:
        """Name in tables and of the arrays."""
        return f"pgd-{self.loss}-{self.steps}x{self.restarts}"


class TargetedAttack(Section):
    """PGD towards each of the most likely wrong classes in turn."""

    kind: Literal["targeted"] = "targeted"
    steps: int = Field(default=20, ge=1)
    """Gradient steps per target."""
    num_targets: int = Field(default=4, ge=1)
    """Wrong classes tried, by falling logit; at most the number of classes minus one."""

    @property
    def name(self) -> str:
        """Name in tables and of the arrays."""
        return f"targeted-{self.steps}x{self.num_targets}"


class SquareAttack(Section):
    """Score-based black-box random search with squares (Andriushchenko et al., 2020)."""

    kind: Literal["square"] = "square"
    num_queries: int = Field(default=500, ge=1)
    """Queries per example; the standard evaluation uses 5000."""

    @property
    def name(self) -> str:
        """Name in tables and of the arrays."""
        return f"square-{self.num_queries}"


class AutoAttack(Section):
    """The standard ensemble of Croce and Hein (2020): APGD-CE, APGD-T, FAB-T and Square with 5000 queries."""

    kind: Literal["autoattack"] = "autoattack"

    @property
    def name(self) -> str:
        """Name in tables and of the arrays."""
        return "autoattack"


class TransferAttack(Section):
    """Adversarial examples made on the reference model (say, the ReLU twin) and tried on this one."""

    kind: Literal["transfer"] = "transfer"
    steps: int = Field(default=20, ge=1)
    """Gradient steps on the reference model."""
    loss: Loss = "margin"
    """Loss ascended on the reference model."""

    @property
    def name(self) -> str:
        """Name in tables and of the arrays."""
        return f"transfer-{self.loss}-{self.steps}"


AnyAttack = Annotated[
    NoiseAttack | FGSMAttack | PGDAttack | TargetedAttack | SquareAttack | AutoAttack | TransferAttack,
    Field(discriminator="kind"),
]

_QUICK: tuple[AnyAttack, ...] = (
    NoiseAttack(num_draws=5),
    FGSMAttack(),
    PGDAttack(steps=20),
    PGDAttack(steps=20, restarts=2, loss="margin"),
    TargetedAttack(steps=10, num_targets=2),
    SquareAttack(num_queries=200),
)
_STANDARD: tuple[AnyAttack, ...] = (
    NoiseAttack(),
    FGSMAttack(),
    PGDAttack(steps=20),
    PGDAttack(steps=50, restarts=5),
    PGDAttack(steps=50, loss="margin"),
    TargetedAttack(),
    SquareAttack(num_queries=1000),
    TransferAttack(),
)
SUITES: dict[str, tuple[AnyAttack, ...]] = {
    "quick": _QUICK,
    "standard": _STANDARD,
    "full": (*_STANDARD[:6], AutoAttack(), TransferAttack()),
}
"""Attacks by name: quick for a demo, standard without AutoAttack, full with it."""


def _named_suite(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value not in SUITES:
        raise ValueError(f"unknown attack suite {value!r}; known: {', '.join(SUITES)} (or a list of attacks)")
    return SUITES[value]


def _rising(values: tuple[float, ...]) -> tuple[float, ...]:
    if any(b <= a for a, b in pairwise(values)):
        raise ValueError(f"expected strictly rising multiples of eps, got {list(values)}: sort them")
    return values


def _distinct_threats(threats: tuple[ThreatModel, ...]) -> tuple[ThreatModel, ...]:
    keys = [threat.key for threat in threats]
    if len(set(keys)) < len(keys):
        raise ValueError(f"expected adversaries that differ in four digits, got {', '.join(keys)}")
    return threats


def _distinct(attacks: tuple[AnyAttack, ...]) -> tuple[AnyAttack, ...]:
    names = [attack.name for attack in attacks]
    if len(set(names)) < len(names):
        raise ValueError(f"expected every attack once, got {', '.join(names)}: remove the doubled ones")
    return attacks


class CurveConfig(Section):
    """Robust accuracy against the radius, by PGD on the margin."""

    multiples: Annotated[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], AfterValidator(_rising)] = (
        0.25,
        0.5,
        1.0,
        1.5,
        2.0,
    )
    """Radii as multiples of the threat model's eps, rising; none means no curve."""
    steps: int = Field(default=20, ge=1)
    """Gradient steps at each radius."""
    num_examples: int | None = Field(default=None, ge=1)
    """Only so many of the test images, the same for every model; none means all that are evaluated."""


FULL_AUDIT_EXAMPLES = 1000


class AuditConfig(Section):
    """The gradient-masking audit: how much work it may be."""

    budget: Literal["off", "quick", "full"] = "quick"
    """off: none; quick: at most 2 minutes on 2 cores for a small network; full: what promotion needs."""
    num_examples: int | None = Field(default=None, ge=16)
    """Images the checks look at, at most those evaluated; none means 128 (quick) or 1000 (full)."""

    @property
    def resolved_num_examples(self) -> int:
        """Number of images the checks look at."""
        return self.num_examples or (FULL_AUDIT_EXAMPLES if self.budget == "full" else 128)


class EvaluationConfig(Section):
    """The attack suite and the audit."""

    threat: ChosenThreat = ThreatModel()
    """The adversary that the headline numbers are about."""
    attacks: Annotated[
        tuple[AnyAttack, ...], BeforeValidator(_named_suite), AfterValidator(_distinct), Field(min_length=1)
    ] = _QUICK
    """Attacks in their order, as a list or as the name of a suite: quick, standard or full. Only images that are still
    classified correctly go on to the next attack."""
    other_threats: Annotated[tuple[ChosenThreat, ...], AfterValidator(_distinct_threats)] = ()
    """More adversaries (say, l2 beside linf), each judged by PGD on cross-entropy and on the margin."""
    curve: CurveConfig = CurveConfig()
    """Robust accuracy against eps."""
    num_examples: int | None = Field(default=None, ge=1)
    """Only so many test images, drawn once and the same for every model; none means the whole test split."""
    block_size: int = Field(default=256, ge=1)
    """Images attacked together. Random numbers are drawn by block: results depend on its size, not on the workers."""
    num_pictures: int = Field(default=8, ge=0)
    """Pairs (image, adversarial image) kept for the report."""
    save_adversarial: bool = False
    """Keep every adversarial image, to be judged by another tool."""
    audit: AuditConfig = AuditConfig()
    """The gradient-masking audit."""
