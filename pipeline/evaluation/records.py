"""What an evaluation leaves behind: a JSON record of every number with its interval, and the per-example arrays."""

from pathlib import Path
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, ValidationError, field_validator

from pipeline.artifacts import digest_file, write_atomic
from pipeline.config.base import Section, ThreatModel, one_line
from pipeline.config.evaluation import EvaluationConfig
from pipeline.evaluation.stats import Accuracy

RECORD = "evaluation.json"
ARRAYS = "evaluation.npz"
SCHEMA = 2
Verdict = Literal["pass", "warn", "fail", "skip"]


class _Record(Section):
    """A section whose numbers may be NaN or infinite, in its file too: JSON as Python writes it."""

    model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="constants")


class AttackResult(_Record):
    """One attack of the cascade."""

    name: str
    """Name of the attack; its array is `correct/<name>` (`correct/<threat>/<name>` under another threat)."""
    threat: ThreatModel
    """The adversary."""
    attacked: int
    """Examples that came to it, still classified correctly after all attacks before it."""
    fooled: int
    """How many of them it fooled."""
    accuracy: Accuracy
    """Robust accuracy after this attack and all before it, over all examples."""


class CurvePoint(_Record):
    """Robust accuracy at one radius."""

    eps: float
    """Radius in the threat model's norm; 0 is the clean accuracy."""
    accuracy: Accuracy
    """Accuracy under PGD on the margin at this radius and all smaller ones."""


class ClassResult(_Record):
    """One class."""

    name: str
    """Name of the class."""
    clean: Accuracy
    """Share of its examples classified correctly."""
    robust: Accuracy
    """Share of its examples that no attack fooled."""


class Check(_Record):
    """One audit check."""

    number: int
    """1 to 16."""
    name: str
    """Short name, that of its module."""
    verdict: Verdict
    """pass, warn, fail; skip where it does not apply."""
    figure: float | None
    """The number that is judged; none when skipped."""
    warn_above: float | None
    """Up to here it passes."""
    fail_above: float | None
    """Above this it fails."""
    summary: str
    """What the figure is, in words, or why the check was skipped."""
    details: dict[str, float | list[float]]
    """Further numbers, e.g. histograms."""


class AuditReport(_Record):
    """All checks on one model."""

    budget: Literal["quick", "full"]
    """How much work was done."""
    n: int
    """Examples that the checks looked at."""
    threat: ThreatModel
    """The adversary."""
    seed: int | None = None
    """Of every random number in it; none in records of before it was noted."""
    model_digest: str
    """Digest of the weights that were audited."""
    reference_digest: str | None = None
    """Digest of the weights of the reference model, for check 5; none without one."""
    checks: tuple[Check, ...]
    """In their order."""
    matched: dict[str, str] = Field(default_factory=dict)
    """Digests of the networks of equal cost that check 15 looked at, by name."""

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple(check.name for check in self.checks if check.verdict == "fail")


class Evaluation(_Record):
    """How good a model is, clean and under attack."""

    schema_version: int = SCHEMA
    """Of this record."""
    dataset: str
    """Name of the data set."""
    data_digest: str
    """Digest of the prepared data."""
    model_digest: str
    """Digest of the weights."""
    reference_digest: str | None
    """Digest of the reference model's weights, for transfer attacks."""
    seed: int
    """Of every random number in it."""
    config: EvaluationConfig
    """What was asked for."""
    n: int
    """Test examples that were judged."""
    split_size: int
    """Test examples that there are."""
    clean: Accuracy
    """Accuracy on the images as they are."""
    attacks: tuple[AttackResult, ...]
    """In their order; only what is still correct goes on."""
    union: Accuracy
    """Per-example worst case over all attacks of the threat model: the robust accuracy."""
    other_threats: tuple[AttackResult, ...]
    """The same for the other adversaries."""
    curve: tuple[CurvePoint, ...]
    """Robust accuracy against eps; the first point is the clean accuracy."""
    per_class: tuple[ClassResult, ...]
    """By class."""
    warnings: tuple[str, ...]
    """What the attacks' libraries warned about."""
    arrays_sha256: str
    """Of the arrays beside this record."""
    audit: AuditReport | None = None
    """The gradient-masking audit."""

    @field_validator("schema_version")
    @classmethod
    def _is_known(cls, version: int) -> int:
        if version != SCHEMA:
            raise ValueError(f"expected schema {SCHEMA}, got {version}; evaluate the model again")
        return version

    def save(self, directory: Path) -> None:
        """Write the record into `directory`, all or nothing."""
        write_atomic(directory / RECORD, self.model_dump_json(indent=1))

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read the record; ValueError when it is missing or malformed."""
        try:
            return cls.model_validate_json((directory / RECORD).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"expected {RECORD} in {directory}, found none: evaluate the model first") from None
        except ValidationError as error:
            raise ValueError(f"{directory / RECORD} is not an evaluation: {one_line(error)}") from error

    def arrays(self, directory: Path) -> dict[str, npt.NDArray[np.generic]]:
        """The verified arrays beside the record: index, y, predicted, correct/..., picture/..., x, x_adv where kept."""
        path = directory / ARRAYS
        if not path.is_file() or digest_file(path).sha256 != self.arrays_sha256:
            raise ValueError(
                f"expected {path} as it was written with {RECORD}, it is missing or altered: evaluate again"
            )
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
