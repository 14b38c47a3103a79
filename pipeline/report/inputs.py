"""What a report is made of: the records of the trainings and evaluations, and where their files are."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.config.base import Section
from pipeline.evaluation.records import Evaluation
from pipeline.training.job import TrainedModel

Role = Literal["source", "transfer", "control"]


class ModelCard(Section):
    """One trained and evaluated network."""

    label: str = Field(min_length=1)
    """Unique name of the row, e.g. "digits-5-9"."""
    target: str
    """What it is compared within: models of one target share data, architecture and budget."""
    role: Role
    """source: trained its own activation; transfer: got the frozen one; control: what those are compared to."""
    activation: str
    """Name in `sparta_models.ACTIVATIONS`."""
    architecture: str
    """Name of the network, with its options where they matter."""
    dataset: str
    """Name of the data set."""
    class_names: tuple[str, ...]
    """By label."""
    num_parameters: int = Field(ge=0)
    """Learnable and frozen scalars of the network."""
    num_validation: int | None = Field(default=None, ge=1)
    """Validation images behind the accuracies of its training, and of the search where there was one; None: unknown."""
    trained: TrainedModel
    """Record of its training."""
    evaluation: Evaluation
    """Record of its evaluation."""
    evaluation_directory: Path
    """Where the arrays of the evaluation are."""
    model_directory: Path | None = None
    """Where `load_model` finds the network, for its gate maps and response curves; None: they are left out."""


class Trial(Section):
    """One trial of a hyperparameter search."""

    name: str
    """Name of the trial."""
    clean: float
    """Validation accuracy on clean images."""
    robust: float
    """Validation accuracy under attack."""
    settings: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """What was varied, by dotted key."""
    best: bool = False
    """Whether its settings were taken."""


class Learned(Section):
    """Where the activation was trained that all others got."""

    dataset: str
    """Name of the data set."""
    architecture: str
    """Network it was trained in."""
    activation: str
    """Name in `sparta_models.ACTIVATIONS`."""


class ReportInputs(Section):
    """Everything on the page."""

    title: str
    """Heading."""
    models: tuple[ModelCard, ...] = Field(min_length=1)
    """In the order of the rows; the first is the source, where it was trained."""
    learned: Learned | None = None
    """Where the activation was trained, if not in the first model."""
    trials: tuple[Trial, ...] = ()
    """The sweep, when there was one."""
    sweep_pictures: tuple[Path, ...] = ()
    """PNG files that the sweep left: parallel coordinates, importance of the parameters, learning curves, front."""
    lineage: str | None = None
    """Where the registered activation comes from, as text."""
    reference: str | None = None
    """NAME/VERSION of the registered activation."""
    facts: dict[str, str] = Field(default_factory=dict)
    """Further lines of provenance: commit, seed, hardware, time."""

    @model_validator(mode="after")
    def _unique_labels(self) -> Self:
        labels = [model.label for model in self.models]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"expected models with different labels, got {', '.join(twice)} twice")
        return self

    @property
    def origin(self) -> Learned:
        """Where the activation was trained."""
        first = self.models[0]
        return self.learned or Learned(
            dataset=first.dataset, architecture=first.architecture, activation=first.activation
        )

    def control_of(self, card: ModelCard) -> ModelCard | None:
        """The control that a model is compared to: the one of its target."""
        if card.role == "control":
            return None
        return next((other for other in self.models if other.role == "control" and other.target == card.target), None)
