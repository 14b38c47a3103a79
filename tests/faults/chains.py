"""What the trainings of a chain come to when nothing happens to them, and what MLflow was told of them."""

from pathlib import Path

import torch
from mlflow.entities import Run

from pipeline.config.chain import ChainConfig
from pipeline.config.tracking import TrackingConfig
from pipeline.data import PreparedData
from pipeline.stages.graph import reported_models
from pipeline.tracking.client import open_client
from pipeline.training import Context, TrainedModel, TrainJob, train


def undisturbed(config: ChainConfig, data: Path, output: Path) -> dict[str, TrainedModel]:
    """The source and its control, trained in this process on prepared data, by branch; files in `output`/BRANCH."""
    prepared, threads, found = PreparedData.load(data), torch.get_num_threads(), {}
    torch.set_num_threads(1)  # as in a worker that reserves one CPU: sums have the same order
    try:
        for model in reported_models(config):
            if model.target == "source":
                task = model.task
                job = TrainJob(
                    model=task.model,
                    data=prepared.directory,
                    augment=task.augment,
                    training=task.training,
                    seed=task.seed,
                    output=output / model.branch,
                )
                found[model.branch] = train(job, Context())
    finally:
        torch.set_num_threads(threads)
    return found


class Mirror:
    """The MLflow database of a run root, connected once, so that a look takes milliseconds."""

    def __init__(self, root: Path) -> None:
        self.client = open_client(f"sqlite:///{root}/mlflow.db")

    def statuses(self) -> dict[str, list[str]]:
        """The statuses of all runs, by name."""
        found: dict[str, list[str]] = {}
        for run in self._runs():
            found.setdefault(run.info.run_name, []).append(run.info.status)
        return found

    def history(self, name: str) -> dict[str, list[tuple[int, float]]]:
        """(step, value) of every metric of the only run of this name."""
        run = self.run(name)
        points = {key: self.client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
        return {key: sorted((point.step, point.value) for point in history) for key, history in points.items()}

    def run(self, name: str) -> Run:
        """The only run of this name."""
        (found,) = [run for run in self._runs() if run.info.run_name == name]
        return self.client.get_run(found.info.run_id)  # with its inputs

    def _runs(self) -> list[Run]:
        experiment = self.client.get_experiment_by_name(TrackingConfig().experiment)
        return [] if experiment is None else self.client.search_runs([experiment.experiment_id])
