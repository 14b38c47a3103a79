"""What a study found: every network of every seed as one record, and the comparisons that may be drawn from them.

Two sources of chance are kept apart: seeds (a t interval over the paired differences of the seeds) and test images (a
paired t test over the images' differences, averaged over the seeds).
"""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator
from scipy import stats

from pipeline.config.base import Section
from pipeline.data.sample import sample
from pipeline.evaluation.stats import CONFIDENCE, Accuracy

Correct = npt.NDArray[np.bool_]
What = Literal["clean", "robust"]
Role = Literal["main", "control", "other"]
_COMPARED: tuple[Role, Role] = ("control", "other")
FINALISTS = ": finalists"
"""How the name of a group ends whose networks are those of another one, judged once more on some of its images."""


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
    split_size: int
    """Images of the test split, of which `clean.n` were judged."""
    clean: Accuracy
    """On the test split."""
    robust: Accuracy
    """On the test split: per-example worst case over all attacks."""
    trained_by: str
    """Method of the training and, where it has one, its adversary, e.g. "pgd_at at linf 8/255"."""
    judged_under: str
    """The adversary of the evaluation, e.g. "linf 8/255"."""
    attacks: dict[str, float]
    """Accuracy after each attack of the cascade."""
    audit: str
    """"passed", "off", or the names of the checks that failed."""
    audited: str
    """Effort of the audit, e.g. "quick, 64 images: 10 pass, 1 warn, 0 fail, 5 skip"; empty without one."""
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
    def judges(self) -> tuple[str, ...]:
        """What has to be the same wherever two networks are compared."""
        return (self.dataset, f"{self.robust.n:,}", self.trained_by, self.judged_under, ", ".join(self.attacks))

    @property
    def form(self) -> tuple[object, ...]:
        """What the seeds of a contender have in common: they differ in nothing else."""
        what = (self.role, self.activation, self.architecture, self.num_parameters, self.epochs, self.precision)
        return (*what, "frozen" if self.frozen_digest else "its own")

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
    """A mean over seeds, or over images, with its 95 % t interval; the interval is infinite for one of them."""

    model_config = ConfigDict(allow_inf_nan=True)

    value: float
    low: float
    high: float
    num: int
    """How many values it is the mean of."""

    @classmethod
    def of(cls, values: Sequence[float] | npt.NDArray[np.float64]) -> Self:
        """Mean of one value per seed, or per image."""
        array = np.asarray(values, dtype=np.float64)
        half = float("inf")
        if array.size > 1:
            half = float(stats.t.ppf((1 + CONFIDENCE) / 2, array.size - 1) * array.std(ddof=1) / array.size**0.5)
        mean = float(array.mean())
        return cls(value=mean, low=mean - half, high=mean + half, num=array.size)


class Comparison(Section):
    """One contender minus another, paired by seed and by image; p is no number for one image that differs."""

    model_config = ConfigDict(allow_inf_nan=True)

    group: str
    a: str
    b: str
    what: What
    means: tuple[float, float]
    """Accuracy of a and of b over the seeds that both have."""
    over_seeds: Mean
    """Mean difference and its interval over seeds, on these images."""
    over_images: Mean
    """The same mean, with its interval over images, of these networks: the differences are averaged over seeds."""
    p_images: float
    """Two-sided p of the paired t test that belongs to the interval over images."""

    @property
    def clear(self) -> bool:
        """Whether the interval over seeds leaves out zero; one without a width, of differences that happen to be equal,
        tells nothing of other seeds."""
        over = self.over_seeds
        return over.high - over.low > 1e-9 and (over.low > 0 or over.high < 0)


class Study(Section):
    """Everything that a study's tables are made of."""

    schema_version: Literal[2] = 2
    name: str
    """The chain's name."""
    entries: tuple[Entry, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _groups_have_the_same_judges(self) -> Self:
        for group in self.groups:
            first, *others = [entry for entry in self.entries if entry.group == group]
            for entry in others:
                if entry.judges != first.judges:
                    raise ValueError(f"expected {group} to be judged on {first.judges}, got {entry.judges}")
        return self

    @model_validator(mode="after")
    def _seeds_of_a_contender_differ_in_nothing_else(self) -> Self:
        forms: dict[tuple[str, str], tuple[object, ...]] = {}
        for entry in self.entries:
            form = forms.setdefault((entry.group, entry.contender), entry.form)
            if entry.form != form:
                raise ValueError(f"expected {' '.join(map(str, entry.key))} to be {form}, got {entry.form}")
        return self

    @property
    def groups(self) -> list[str]:
        """In the order of the tables: as they came, the finalists of a group right behind it."""
        names = list(dict.fromkeys(entry.group for entry in self.entries))
        judged_first = list(dict.fromkeys(name.removesuffix(FINALISTS) for name in names))
        return sorted(names, key=lambda name: (judged_first.index(name.removesuffix(FINALISTS)), name))

    def contenders(self, group: str) -> list[str]:
        """Rows of a group's table, in the order of the study."""
        return list(dict.fromkeys(entry.contender for entry in self.entries if entry.group == group))

    def judges(self, group: str) -> str:
        """How a group's networks were trained, and on what and by which attacks they were judged."""
        entries = [entry for entry in self.entries if entry.group == group]
        precisions = " and ".join(sorted({entry.precision for entry in entries}))
        dataset, n, trained_by, judged_under, attacks = entries[0].judges
        trained = f"trained by {trained_by}, in {precisions}"
        return f"{dataset}; {trained}; judged under {judged_under} on {n} test images; attacks: {attacks}"

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
            means=(_mean_of(ones, seeds, what), _mean_of(others, seeds, what)),
            over_seeds=Mean.of(gaps.mean(axis=1)),
            over_images=Mean.of(gaps.mean(axis=0)),
            p_images=_p_value(gaps.mean(axis=0)),
        )

    def with_role(self, group: str, role: Role) -> list[str]:
        """Contenders of a role, those with most seeds first, then the best mean robust accuracy."""
        names = {entry.contender for entry in self.entries if (entry.group, entry.role) == (group, role)}
        means = {name: self.mean(group, name, "robust") for name in names}
        return sorted(names, key=lambda name: (-means[name].num, -means[name].value, name))

    def comparisons(self, group: str) -> list[Comparison]:
        """The main contender against the control, against what the control's activation reaches when it is given more
        (width, epochs), and against the two strongest of the others; robust and clean."""
        seeds = {entry.seed for main in self.with_role(group, "main") for entry in self.of(group, main)}
        control, others = (
            [name for name in self.with_role(group, role) if seeds & {entry.seed for entry in self.of(group, name)}]
            for role in _COMPARED
        )
        activations = {self.of(group, name)[0].activation for name in control}
        given_more = [name for name in others if self.of(group, name)[0].activation in activations]
        against = [*control, *given_more, *[name for name in others if name not in given_more][:2]]
        whats: tuple[What, ...] = ("robust", "clean")
        return [
            self.compare(group, main, name, what)
            for main in self.with_role(group, "main")
            for name in against
            for what in whats
        ]

    def first_judgement(self, group: str) -> Self | None:
        """What the finalists of a group reached in the group that they come from, on those of its images that they are
        judged on again. None where a network or an image is not the same."""
        known = {entry.key: entry for entry in self.entries}
        origin, entries = group.removesuffix(FINALISTS), []
        for final in self.entries:
            if final.group != group:
                continue
            first = known.get((origin, final.contender, final.seed))
            if first is None or first is final or first.weights_sha256 != final.weights_sha256:
                return None
            there = {image: place for place, image in enumerate(sample(first.split_size, first.robust.n).tolist())}
            images: list[int] = sample(final.split_size, final.robust.n).tolist()
            chosen = [there[image] for image in images if image in there]
            if not np.array_equal(first.correct_clean[chosen], final.correct_clean):
                return None
            robust = first.correct_robust[chosen]
            cut = {"robust": Accuracy.of(int(robust.sum()), final.robust.n), "clean": final.clean}
            entries.append(
                first.model_copy(update={**cut, "correct_robust": robust, "correct_clean": final.correct_clean})
            )
        return type(self)(name=self.name, entries=tuple(entries))

    def joined(self, part: Self) -> Self:
        """This study with the networks that only `part` has.

        Networks of both are the proof that the parts belong together: same configuration, data and judges (their
        fingerprints), and same code, libraries and kind of processor (their weights, and what they get right, to the
        last bit).

        Raises:
            ValueError: when a network of both was not trained or judged in the same way, has other weights, or is right
                on other images; when a group of both has no network in common; when a contender of both has another
                form in the part.
        """
        mine = {entry.key: entry for entry in self.entries}
        for group in set(self.groups) & set(part.groups):
            common = [e for e in part.entries if e.group == group and e.key in mine]
            if not common:
                raise ValueError(f"expected a network of {group} that both parts have, to compare them by, got none")
            for entry in common:
                _expect_the_same(mine[entry.key], entry)
        added = [entry for entry in part.entries if entry.key not in mine]
        return type(self)(name=self.name, entries=(*self.entries, *added))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read study.json."""
        return cls.model_validate_json(path.read_text(encoding="utf-8"))


def _expect_the_same(known: Entry, entry: Entry) -> None:
    for what, one, other in (
        ("the training", known.trained, entry.trained),
        ("the weights", known.weights_sha256, entry.weights_sha256),
        ("the evaluation", known.evaluated, entry.evaluated),
        ("the images that are right clean", _pack(known.correct_clean), _pack(entry.correct_clean)),
        ("the images that are right under attack", _pack(known.correct_robust), _pack(entry.correct_robust)),
    ):
        if one != other:
            raise ValueError(
                f"{' '.join(map(str, entry.key))}: expected {what} {one[:12]}, got {other[:12]}; networks of another "
                "configuration, code or kind of processor cannot stand beside these: run the whole group with it"
            )


def _mean_of(entries: Mapping[int, Entry], seeds: Sequence[int], what: What) -> float:
    return float(np.mean([entries[seed].accuracy(what).value for seed in seeds]))


def _p_value(gaps: npt.NDArray[np.float64]) -> float:
    if not gaps.any():
        return 1.0
    return float(stats.ttest_1samp(gaps, 0.0).pvalue)
