"""What a study found: every network of every seed as one record, and the comparisons that may be drawn from them.

Two sources of chance are kept apart: seeds (a t interval over the paired differences of the seeds) and test images (a
paired t test over the images' differences, averaged over the seeds).
"""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer
from scipy import stats

from pipeline.config.base import Section
from pipeline.evaluation.stats import CONFIDENCE, Accuracy

Correct = npt.NDArray[np.bool_]
What = Literal["clean", "robust"]
Role = Literal["main", "control", "other"]


def _pack(correct: Correct) -> str:
    return f"{correct.size}:{base64.b64encode(np.packbits(correct).tobytes()).decode()}"


def _unpack(value: object) -> object:
    if not isinstance(value, str):
        return value
    count, _, text = value.partition(":")
    bits = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    if not count.isdigit() or bits.size != -(-int(count) // 8):
        raise ValueError(f"expected N:base64 of N packed bits, got {value[:24]!r}")
    return np.unpackbits(bits, count=int(count)).astype(bool)


PackedCorrect = Annotated[Correct, BeforeValidator(_unpack), PlainSerializer(_pack, return_type=str)]
"""Which test images were right, (N,); in JSON as packed bits."""


class Entry(Section):
    """One network of one seed, trained and judged."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    group: str
    """What it is compared within: same data, same recipe, same judges."""
    contender: str
    """Row of the group's table."""
    role: Role
    """main: what the study is about; control: what all are compared to; other: everything else."""
    activation: str
    """Name in `sparta_models.ACTIVATIONS`."""
    seed: int
    """Of weights, order, augmentation and attacks."""
    architecture: str
    """Network with its options."""
    dataset: str
    """Name of the data set."""
    num_parameters: int = Field(ge=0)
    """Scalars of the network."""
    training_flops: float
    """Floating-point operations of the whole training."""
    epochs: int
    """Epochs that were run."""
    precision: str
    """Arithmetic of the training, "fp32" or "bf16"; evaluations are always in float32."""
    val_clean: float
    """On the validation split, at the epoch that was kept."""
    val_robust: float
    """On the validation split, at the epoch that was kept."""
    clean: Accuracy
    """On the test split."""
    robust: Accuracy
    """On the test split: per-example worst case over all attacks."""
    attacks: dict[str, float]
    """Accuracy after each attack of the cascade."""
    audit: str
    """"passed", "off", or the names of the checks that failed."""
    trained: str
    """Fingerprint of the training."""
    evaluated: str
    """Fingerprint of the evaluation."""
    weights_sha256: str
    """Of the weights that were judged."""
    frozen_digest: str | None
    """Digest of the activation that was put in, frozen; None: the network learned its own."""
    correct_clean: PackedCorrect
    """(N,) test images classified correctly."""
    correct_robust: PackedCorrect
    """(N,) test images that no attack fooled."""

    @property
    def key(self) -> tuple[str, str, int]:
        """What is there once in a study."""
        return self.group, self.contender, self.seed

    def correct(self, what: What) -> Correct:
        """(N,) which test images were right, clean or under every attack."""
        return self.correct_clean if what == "clean" else self.correct_robust

    def accuracy(self, what: What) -> Accuracy:
        """Clean or robust accuracy."""
        return self.clean if what == "clean" else self.robust


class Mean(Section):
    """A mean over seeds with its 95 % t interval; the interval is infinite for one seed."""

    value: float
    low: float
    high: float
    num_seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Mean of one value per seed."""
        array = np.asarray(values, dtype=np.float64)
        half = float("inf")
        if array.size > 1:
            half = float(stats.t.ppf((1 + CONFIDENCE) / 2, array.size - 1) * array.std(ddof=1) / array.size**0.5)
        mean = float(array.mean())
        return cls(value=mean, low=mean - half, high=mean + half, num_seeds=array.size)


class Comparison(Section):
    """One contender minus another, paired by seed and by image."""

    group: str
    a: str
    b: str
    what: What
    over_seeds: Mean
    """Mean difference and its interval over seeds."""
    p_images: float
    """Two-sided p of a paired t test over images, of the differences averaged over seeds."""

    @property
    def clear(self) -> bool:
        """Whether the interval over seeds leaves out zero."""
        return self.over_seeds.low > 0 or self.over_seeds.high < 0


class Study(Section):
    """Everything that a study's tables are made of."""

    schema_version: Literal[1] = 1
    name: str
    """The chain's name."""
    threat: str
    """What robust means, in words."""
    entries: tuple[Entry, ...] = Field(min_length=1)

    @property
    def groups(self) -> list[str]:
        """In the order of the tables."""
        return list(dict.fromkeys(entry.group for entry in self.entries))

    def contenders(self, group: str) -> list[str]:
        """Rows of a group's table, in the order of the study."""
        return list(dict.fromkeys(entry.contender for entry in self.entries if entry.group == group))

    def judges(self, group: str) -> str:
        """In what arithmetic a group's networks were trained, and on what and by which attacks they were judged."""
        entries = [entry for entry in self.entries if entry.group == group]
        precisions = " and ".join(sorted({entry.precision for entry in entries}))
        first = entries[0]
        judged = f"{first.dataset}, {first.robust.n:,} test images; attacks: {', '.join(first.attacks)}"
        return f"{judged}; trained in {precisions}"

    def of(self, group: str, contender: str) -> list[Entry]:
        """One contender's networks, by seed."""
        found = [entry for entry in self.entries if (entry.group, entry.contender) == (group, contender)]
        return sorted(found, key=lambda entry: entry.seed)

    def mean(self, group: str, contender: str, what: What) -> Mean:
        """Mean accuracy over seeds; what an interval of few seeds has beyond 0 and 1 is cut off."""
        mean = Mean.of([entry.accuracy(what).value for entry in self.of(group, contender)])
        return mean.model_copy(update={"low": max(0.0, mean.low), "high": min(1.0, mean.high)})

    def compare(self, group: str, a: str, b: str, what: What) -> Comparison:
        """a minus b over the seeds and images that both have.

        Raises:
            ValueError: when they share no seed, or were judged on different numbers of images.
        """
        ones, others = ({entry.seed: entry for entry in self.of(group, name)} for name in (a, b))
        seeds = sorted(ones.keys() & others.keys())
        if not seeds:
            raise ValueError(
                f"expected {a} and {b} in {group} to share a seed, got {sorted(ones)} and {sorted(others)}"
            )
        pairs = [(ones[seed].correct(what), others[seed].correct(what)) for seed in seeds]
        gaps = np.stack([one.astype(np.float64) - other for one, other in pairs])  # (seeds, images)
        return Comparison(
            group=group,
            a=a,
            b=b,
            what=what,
            over_seeds=Mean.of(gaps.mean(axis=1).tolist()),
            p_images=_p_value(gaps.mean(axis=0)),
        )

    def with_role(self, group: str, role: Role) -> list[str]:
        """Contenders of a role, the best mean robust accuracy first."""
        names = {entry.contender for entry in self.entries if (entry.group, entry.role) == (group, role)}
        return sorted(names, key=lambda name: (-self.mean(group, name, "robust").value, name))

    def comparisons(self, group: str) -> list[Comparison]:
        """The main contender against the control and against the strongest of the others, robust and clean."""
        against = [*self.with_role(group, "control"), *self.with_role(group, "other")[:1]]
        whats: tuple[What, ...] = ("robust", "clean")
        return [
            self.compare(group, main, name, what)
            for main in self.with_role(group, "main")
            for name in against
            for what in whats
        ]

    def joined(self, part: Self) -> Self:
        """This study with the networks that only `part` has; those of both stay as they are here.

        The networks of both show that a group's recipe is the same: their trainings have the same fingerprint, over
        configuration and data. Trained anew they may have other weights, and then another fingerprint of the
        evaluation.

        Raises:
            ValueError: when threats differ, or a group's judges; when a network of both was trained in another way, or
                the same weights were judged in another way; when a group of both has no network in common.
        """
        if self.threat != part.threat:
            raise ValueError(f"expected a study of {self.threat!r}, got {part.threat!r}")
        mine = {entry.key: entry for entry in self.entries}
        for group in set(self.groups) & set(part.groups):
            common = [e for e in part.entries if e.group == group and e.key in mine]
            if not common:
                raise ValueError(f"expected a network of {group} that both parts have, to compare them by, got none")
            for entry in common:
                known, name = mine[entry.key], " ".join(map(str, entry.key))
                if known.trained != entry.trained:
                    raise ValueError(f"expected {name} to be trained as {known.trained[:12]}, got {entry.trained[:12]}")
                if known.weights_sha256 == entry.weights_sha256 and known.evaluated != entry.evaluated:
                    raise ValueError(
                        f"expected {name} to be evaluated as {known.evaluated[:12]}, got {entry.evaluated[:12]}"
                    )
            if self.judges(group) != part.judges(group):
                raise ValueError(f"expected {group} to be judged on {self.judges(group)}, got {part.judges(group)}")
        added = [entry for entry in part.entries if entry.key not in mine]
        return self.model_copy(update={"entries": (*self.entries, *added)})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read study.json."""
        return cls.model_validate_json(path.read_text(encoding="utf-8"))


def _p_value(gaps: npt.NDArray[np.float64]) -> float:
    if not gaps.any():
        return 1.0
    return float(stats.ttest_1samp(gaps, 0.0).pvalue)
