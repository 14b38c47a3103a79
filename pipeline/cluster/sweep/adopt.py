"""Going on from another training's checkpoint with other hyperparameters (Jaderberg et al., arXiv 1711.09846)."""

import json
import shutil
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.artifacts import write_atomic
from pipeline.cluster.sweep.trials import Trial
from pipeline.data import PreparedData
from pipeline.training import TrainJob
from pipeline.training.checkpoint import Checkpoints

CHECKPOINTS = "checkpoints"
_MARK = "taken.json"


class _Taken(BaseModel):
    """What the checkpoints of a job were taken over from."""

    model_config = ConfigDict(frozen=True)

    source: str
    epoch: int


def take_over(source: Path, name: str, job: TrainJob) -> None:
    """Put a copy of another job's checkpoints, in `source`, in the place of those of `job`, which then goes on from it.

    Once for every `name` of a source: what was trained since stays. Whenever it is killed, the job has its old
    checkpoints or all of the new ones, the former perhaps only after `mend`.

    Raises ValueError when there is no whole checkpoint in `source`.
    """
    target = job.output / CHECKPOINTS
    if (taken := _taken(target)) is not None and taken.source == name:
        return
    copy = target.with_name(f".{CHECKPOINTS}.new")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy)
    write_atomic(copy / _MARK, _Taken(source=name, epoch=adopt(copy, job)).model_dump_json())
    old = _old(job.output)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    copy.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def mend(output: Path) -> None:
    """Bring the old checkpoints of the job in `output` back, where a kill fell between the two renames above."""
    if _old(output).exists() and not (output / CHECKPOINTS).exists():
        _old(output).rename(output / CHECKPOINTS)


def adopt(directory: Path, job: TrainJob) -> int:
    """Make `job` the owner of the checkpoints in `directory`, a copy of another job's; return the epoch they are of.

    The newest state is written again in the name of `job`, whose training then resumes from it.

    Raises ValueError when none of them is whole.
    """
    for record in directory.glob("*/state.json"):
        donor = json.loads(record.read_text(encoding="utf-8"))["fingerprint"]
        found = Checkpoints(directory, donor).load()
        if found is not None:
            own = job.fingerprint(PreparedData.load(job.data).digest, job.bank_digest)
            Checkpoints(directory, own).save(*found)
            return found[1].epoch
    raise ValueError(f"expected a whole checkpoint to go on from in {directory}, found none")


def inherited(output: Path) -> int:
    """How many epochs the job in `output` has from the one that its checkpoints were taken over from."""
    taken = _taken(output / CHECKPOINTS)
    return taken.epoch if taken else 0


def without_lost_legs(trial: Trial, root: Path) -> Trial:
    """An interrupted trial less the values that it never trained with: it was killed before it had their weights.

    With them it would begin anew. So it goes on from its own last checkpoint, with the values that belong to it.
    """
    for count in range(len(trial.legs), 0, -1):
        shorter = trial.model_copy(update={"legs": trial.legs[:count]})
        if trial.finished or (root / shorter.job_directory / CHECKPOINTS).exists():
            return shorter
    return trial


def _old(output: Path) -> Path:
    return output / f".{CHECKPOINTS}.old"


def _taken(checkpoints: Path) -> _Taken | None:
    try:
        return _Taken.model_validate_json((checkpoints / _MARK).read_bytes())
    except (OSError, ValidationError):
        return None
