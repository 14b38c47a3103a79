"""A study: the chain's networks trained again and again, with several activations and several seeds."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from pipeline.config.base import Section
from pipeline.config.evaluation import EvaluationConfig
from pipeline.config.model import ActivationConfig, Option
from pipeline.config.training import TrainingConfig

# The roles of the chain's own networks, at the source and on targets.
RESERVED = ("sparta", "control", "frozen", "learned", "untrained")


class Contender(Section):
    """One more network that is trained beside the source and its control, on the same data with the same recipe."""

    name: str = Field(pattern="^[a-z0-9][a-z0-9._]{0,23}$")
    """Names its branches and rows."""
    activation: ActivationConfig
    """What stands at its sites."""
    options: Mapping[str, Option] = Field(default_factory=dict)
    """Laid over the options of the source's architecture, e.g. a width that matches the source's parameters."""
    epochs: PositiveInt | None = None
    """Its own number of epochs, e.g. for equal training FLOPs; None: as the source."""
    activation_lr_factor: float | None = Field(default=None, ge=0)
    """Its own training.optimizer.activation_lr_factor, where another suits it better; None: as the source."""

    def own(self, training: TrainingConfig) -> TrainingConfig:
        """The common training with what this one has of its own.

        Raises:
            ValidationError: where the two do not go together.
        """
        return training.varied(epochs=self.epochs, activation_lr_factor=self.activation_lr_factor)


class RegimeConfig(Section):
    """Another way to train the source, its control and the contenders, judged in another way."""

    training: TrainingConfig
    """How they are trained."""
    evaluation: EvaluationConfig
    """How they are judged."""


class FinalConfig(Section):
    """A second, harder judgement of the networks that matter most: the source, the controls, the frozen ones."""

    contenders: tuple[str, ...] = ()
    """Names of contenders that are judged with them."""
    targets: tuple[str, ...] | None = None
    """Names of the transfer targets whose networks are judged too; None: all."""
    evaluation: EvaluationConfig
    """How they are judged."""


class StudyConfig(Section):
    """Makes the chain a study: every training for every seed, compared pairwise."""

    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=2)] = (0, 1, 2)
    """Seeds of weights, data order, augmentation and attacks; the split of the data stays that of the chain's seed."""
    contenders: tuple[Contender, ...] = ()
    """Activations beside the source's ("sparta") and the control's ("control")."""
    on_targets: tuple[Literal["learned", "untrained"], ...] = ("learned", "untrained")
    """On every transfer target beside the frozen activation and the control: the same activation learned there from
    scratch, and frozen as it starts."""
    standard: RegimeConfig | None = None
    """The same networks trained without an attack; None: left out."""
    final: FinalConfig | None = None
    """Judges the finalists again, in groups of their own; None: all are judged once, by the chain's evaluation."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [contender.name for contender in self.contenders]
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"study.seeds expected different seeds, got {list(self.seeds)}")
        if len(set(names)) < len(names):
            raise ValueError(f"study.contenders expected different names, got {', '.join(names)}")
        if taken := sorted(set(names) & set(RESERVED)):
            raise ValueError(f"study.contenders: {', '.join(taken)} names the chain's own network; rename it")
        if self.final and (unknown := sorted(set(self.final.contenders) - set(names))):
            known = f"names among {', '.join(names)}" if names else "none, as study.contenders has none"
            raise ValueError(f"study.final.contenders expected {known}, got {', '.join(unknown)}")
        return self
