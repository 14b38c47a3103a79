"""The hyperparameter search before the training: what is varied, how trials are chosen, stopped and judged."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from pipeline.config.base import ChosenThreat, Section

Objective = Literal["robust", "clean"]


class SearchConfig(Section):
    """A sweep of short trainings; the best one's values are laid over the configuration of the stages after it."""

    enabled: bool = False
    """Run the search before the training."""
    space: str = "joint"
    """A space of `tune_spaces` by name, or the path of a Python or YAML file with one."""
    num_trials: PositiveInt = 16
    """Trials in all; a grid takes its first so many points."""
    algorithm: Literal["random", "grid", "optuna"] = "optuna"
    """random draws; grid walks; optuna learns (TPE; NSGA-II's sorting with two objectives)."""
    grid_points: Annotated[int, Field(ge=2, le=100)] = 3
    """Points that a grid takes along every continuous parameter, both ends among them."""
    scheduler: Literal["none", "asha", "pbt"] = "asha"
    """none; asha stops weak trials early (arXiv 1810.05934); pbt lets weak ones copy strong ones (arXiv 1711.09846)."""
    objectives: tuple[Objective, ...] = ("robust",)
    """Accuracies to maximise, the first one chooses the best trial. ("robust", "clean") gives a Pareto front."""
    threat: ChosenThreat | None = None
    """What every trial is validated against, whatever it trained against. None: evaluation.threat."""
    epochs: PositiveInt | None = None
    """Epochs of one trial. None: training.epochs."""
    grace_epochs: PositiveInt = 1
    """asha stops no trial before so many epochs; pbt changes weak ones every so many, but not after the last."""
    reduction_factor: Annotated[int, Field(ge=2, le=16)] = 3
    """asha keeps the best 1 / so many at every rung."""
    num_workers: PositiveInt = 1
    """Workers of one trial. More than one nests a distributed training in the trial."""
    max_concurrent: PositiveInt | None = None
    """Most trials at a time. None: as many as the cluster has room for."""

    @model_validator(mode="after")
    def _consistent(self) -> "SearchConfig":
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"search.objectives expected one or two different names, got {list(self.objectives)}")
        if self.scheduler != "none" and len(self.objectives) > 1:
            raise ValueError(
                f"search.scheduler={self.scheduler!r} compares trials by one number, but search.objectives has "
                f"{len(self.objectives)}; set search.scheduler=none"
            )
        if self.scheduler == "pbt" and self.num_workers > 1:
            raise ValueError(
                f"search.scheduler='pbt' exchanges checkpoints between one-worker trials, got search.num_workers="
                f"{self.num_workers}; set it to 1 or take another scheduler"
            )
        if self.scheduler == "pbt" and self.algorithm != "random":
            raise ValueError(
                f"search.scheduler='pbt' changes values while it runs, which search.algorithm={self.algorithm!r} "
                "cannot follow; set search.algorithm=random"
            )
        return self
