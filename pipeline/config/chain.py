"""The whole configuration of a chain: one section per concern, and the rules between them."""

from typing import Self

from pydantic import Field, ValidationError, model_validator

from pipeline.config.bank import BankConfig
from pipeline.config.base import Section, one_line
from pipeline.config.data import AugmentConfig, DataConfig
from pipeline.config.evaluation import EvaluationConfig
from pipeline.config.model import ActivationConfig, ArchitectureConfig, ModelConfig
from pipeline.config.plan import PlanConfig
from pipeline.config.report import ReportConfig
from pipeline.config.scaling import ScalingConfig
from pipeline.config.search import SearchConfig
from pipeline.config.study import StudyConfig
from pipeline.config.tracking import TrackingConfig
from pipeline.config.training import TrainingConfig

_SLUG = "^[a-z0-9][a-z0-9._-]{0,47}$"


class TransferTarget(Section):
    """One place the frozen activation is taken to: another architecture, another data set, or both."""

    name: str = Field(pattern=_SLUG)
    """Names the branch, its runs and its row in the report."""
    model: ArchitectureConfig | None = None
    """The target's architecture; None: the source's."""
    data: DataConfig | None = None
    """The target's data set; None: the source's."""
    augment: AugmentConfig | None = None
    """The target's augmentation; None: the source's."""
    training: TrainingConfig | None = None
    """The target's training; None: the source's."""
    adapt: str | None = None
    """How the activation's parameters are fitted to other channel widths; None: a difference is an error."""


class ChainConfig(Section):
    """Everything that `python -m pipeline.run` needs; each field is a section of the YAML file."""

    name: str = Field("demo", pattern=_SLUG)
    """Names the chain: its folder under the run root, and its MLflow run."""
    seed: int = Field(0, ge=0)
    """Seed of weights, data order, augmentation and attacks."""
    data: DataConfig = DataConfig()
    """The source data set."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation of the training images."""
    model: ModelConfig = ModelConfig()
    """The source network and the activation that is trained in it."""
    control: ActivationConfig = ActivationConfig(name="relu")
    """The activation that every result is shown beside, trained with the same budget."""
    training: TrainingConfig = TrainingConfig()
    """Adversarial training of the source, and of the targets that do not bring their own."""
    transfer: tuple[TransferTarget, ...] = ()
    """Where the frozen activation is taken to."""
    bank: BankConfig | None = None
    """An activation trained elsewhere, to be taken to the targets in place of `model.activation`; no source is trained
    then. None: the source trains it."""
    study: StudyConfig | None = None
    """Repeat everything over seeds and beside more activations; None: one chain, one seed."""
    search: SearchConfig = SearchConfig()
    """Hyperparameter search before the training; off by default."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Threat model, attacks and audit."""
    scaling: ScalingConfig = ScalingConfig()
    """Ray workers. Not part of any result's identity."""
    plan: PlanConfig = PlanConfig()
    """What `--dry-run` may take for granted. Not part of any result's identity."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow. Not part of any result's identity."""
    report: ReportConfig = ReportConfig()
    """What the report shows."""

    @model_validator(mode="after")
    def _grace_within_a_trial(self) -> Self:
        name, epochs = ("search", self.search.epochs) if self.search.epochs else ("training", self.training.epochs)
        if self.search.enabled and self.search.scheduler != "none" and self.search.grace_epochs > epochs:
            raise ValueError(
                f"search.grace_epochs={self.search.grace_epochs} is above {name}.epochs={epochs}, the length of a "
                "trial; lower the first"
            )
        return self

    @model_validator(mode="after")
    def _nothing_at_the_source_beside_a_bank(self) -> Self:
        if self.bank is None:
            return self
        if not self.transfer:
            raise ValueError("bank expected a transfer target to be taken to, got none; name one in transfer")
        study = self.study
        trained = {
            "search.enabled": self.search.enabled,
            "study.contenders": bool(study and study.contenders),
            "study.standard": bool(study and study.standard),
        }
        if asked := [name for name, is_asked in trained.items() if is_asked]:
            raise ValueError(
                f"bank is transferred without training the source, which {' and '.join(asked)} would need; "
                "leave out one or the other"
            )
        return self

    @model_validator(mode="after")
    def _contenders_can_be_trained(self) -> Self:
        """What a contender has of its own may not go together with the rest: fewer epochs than a warm-up has."""
        study = self.study
        for contender in study.contenders if study else ():
            for training in (self.training, *((study.standard.training,) if study and study.standard else ())):
                try:
                    contender.own(training)
                except ValidationError as error:
                    raise ValueError(f"study.contenders {contender.name}: {one_line(error)}") from None
        return self

    @model_validator(mode="after")
    def _two_images_for_every_worker(self) -> Self:
        standard = self.study.standard if self.study else None
        trainings = {
            "training": self.training,
            **{f"transfer {target.name}: training": target.training for target in self.transfer},
            "study.standard.training": standard.training if standard else None,
        }
        workers, trial = self.scaling.max_workers, self.search.num_workers if self.search.enabled else 1
        if trial > workers:
            workers, setting = trial, "search.num_workers"
        else:
            setting = "scaling.num_workers"
        for name, training in trainings.items():
            if workers > 1 and training is not None and training.batch_size < 2 * workers:
                raise ValueError(
                    f"{name}.batch_size={training.batch_size} is less than two images for each of {workers} workers; "
                    f"raise it, or lower {setting}"
                )
        return self

    @model_validator(mode="after")
    def _unique_targets(self) -> Self:
        names = [target.name for target in self.transfer]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"expected transfer targets with different names, got twice: {', '.join(twice)}")
        final = self.study.final if self.study else None
        if final and final.targets and (unknown := sorted(set(final.targets) - set(names))):
            raise ValueError(f"study.final.targets expected names among {', '.join(names)}, got {', '.join(unknown)}")
        if self.study and (taken := [name for name in names if name.split("-")[0] in ("final", "standard")]):
            raise ValueError(
                f'expected transfer targets whose names don\'t begin with "final" or "standard", as the study\'s own '
                f"branches do, got {', '.join(taken)}; rename it"
            )
        branches = {"source", *(f"{name}-control" for name in ("source", *names))}
        if taken := [name for name in names if name in branches]:
            raise ValueError(
                f'expected transfer target names other than "source" and NAME-control, as the source and the controls '
                f"are called, got {', '.join(taken)}; rename it"
            )
        return self
