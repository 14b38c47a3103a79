"""What one trial does, in the process that Ray Tune gives it."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts import canonical, write_atomic
from pipeline.cluster.launch import run_jobs
from pipeline.cluster.outcome import done, failed
from pipeline.cluster.sweep.adopt import CHECKPOINTS, mend, take_over
from pipeline.cluster.sweep.space import trial_config
from pipeline.cluster.sweep.trials import Trial
from pipeline.cluster.tasks import reserved_device
from pipeline.cluster.worker import Train, worth_retrying
from pipeline.config.chain import ChainConfig
from pipeline.config.scaling import ScalingConfig
from pipeline.tracking.journal import Entry
from pipeline.training import Context, TrainedModel, TrainJob

ROBUST, CLEAN, EPOCH = "val_robust", "val_clean", "epoch"


@dataclass(frozen=True)
class Sweep:
    """What all trials of a sweep share. Pickled into them."""

    run: str
    base: ChainConfig
    data: Path
    root: Path
    scaling: ScalingConfig
    """The workers of one trial."""
    train: Train

    @property
    def storage(self) -> Path:
        """Where Ray keeps its files while the sweep runs."""
        return self.root / "ray" / self.run

    @property
    def perturbs(self) -> bool:
        """Whether trials take over checkpoints from each other."""
        return self.base.search.scheduler == "pbt"

    def job(self, trial: Trial) -> TrainJob:
        """The training of `trial` with its present values."""
        config = trial_config(self.base, trial.values)
        return TrainJob(
            model=config.model,
            data=self.data,
            training=config.training,
            augment=config.augment,
            seed=config.seed,
            output=self.root / trial.job_directory,
        )


def run_trial(settings: Mapping[str, Any], sweep: Sweep) -> None:
    """Train one trial and report every epoch; its outcome is left in its directory.

    An error of the trial's own settles it as failed. What may come from outside, such as the death of a worker, is
    raised: Tune runs the trial again, and it goes on from its last checkpoint.
    """
    trial = _own_trial(settings, sweep).with_values(settings["values"])
    job = sweep.job(trial)
    with _own_log(job.output):
        if sweep.perturbs:
            _take_over(job)
        if sweep.scaling.max_workers > 1:
            run_jobs(
                [job], sweep.scaling, train=sweep.train, result_type=TrainedModel, on_progress=_nested, run=sweep.run
            )
        else:
            _train_here(job, sweep)


def _own_trial(settings: Mapping[str, Any], sweep: Sweep) -> Trial:
    """The trial that this process runs; the settings of a copy of another trial name the other one."""
    from ray import tune

    path = sweep.storage / "own" / f"{tune.get_context().get_trial_id()}.json"
    if not path.exists():
        write_atomic(path, canonical(settings["trial"]))
    return Trial.model_validate_json(path.read_text(encoding="utf-8"))


def _train_here(job: TrainJob, sweep: Sweep) -> None:
    try:
        result = sweep.train(job, Context(device=reserved_device(), report=_reporter(job, sweep)))
    except Exception as error:
        if worth_retrying(error):
            raise
        failed(sweep.run, error).save(job.output)
    else:
        done(sweep.run, result).save(job.output)


def _reporter(job: TrainJob, sweep: Sweep) -> Callable[[Mapping[str, float], Path | None], None]:
    from ray import tune

    def report(metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        # Only population-based training hands checkpoints on; all else resumes from the files of the job itself.
        held = tune.Checkpoint.from_directory(job.output / CHECKPOINTS) if sweep.perturbs and checkpoint else None
        tune.report(_point(metrics), checkpoint=held)

    return report


def _nested(job: Any, entry: Entry) -> None:
    from ray import tune

    del job
    if ROBUST in entry.metrics:
        tune.report(_point(entry.metrics))


def _point(metrics: Mapping[str, float]) -> dict[str, float]:
    return {"epoch": int(metrics[EPOCH]), "robust": metrics[ROBUST], "clean": metrics[CLEAN]}


def _take_over(job: TrainJob) -> None:
    """Continue from the checkpoint of the trial that Tune made this one a copy of, with this one's own settings."""
    from ray import tune

    mend(job.output)
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return
    run, owner, number = Path(checkpoint.path).parts[-3:]
    if owner == tune.get_context().get_trial_id():
        return  # started again after a pause or a crash: its own files are as new
    with checkpoint.as_directory() as source:
        take_over(Path(source), f"{run}/{owner}/{number}", job)


@contextlib.contextmanager
def _own_log(directory: Path) -> Iterator[None]:
    """Keep a trial's progress lines out of the table that the driver shows."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "trial.log").open("a", buffering=1, encoding="utf-8") as log, contextlib.redirect_stdout(log):
        yield
