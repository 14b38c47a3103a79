"""A training that changes its number of workers, also to one that does not divide the batch, sees every sample once."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.data import PreparedData, open_split
from pipeline.training import Context, TrainingStopped, TrainJob, loop, train
from tests.faults.toys import run_ranks

pytestmark = pytest.mark.slow


def hashes(x: torch.Tensor) -> list[str]:
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in x.contiguous()]


def train_until(group: Context, directory: Path, job: TrainJob, ask: int | None, stops: int | None) -> None:
    """Note every image by epoch; asked to stop in step `ask`, the training stops after step `stops`."""
    done, step = 0, loop.train_step

    def noting(run: object, x: torch.Tensor, y: torch.Tensor) -> bool:
        nonlocal done
        done = run.state.step + 1  # type: ignore[attr-defined]
        with (directory / f"{run.state.epoch}-{group.rank}.txt").open("a") as file:  # type: ignore[attr-defined]
            file.writelines(f"{line}\n" for line in hashes(x))
        return step(run, x, y)  # type: ignore[arg-type]

    loop.train_step = noting  # type: ignore[assignment]
    context = replace(group, stop_requested=lambda: ask is not None and done >= ask)
    if stops is None:
        train(job, context)
    else:
        with pytest.raises(TrainingStopped, match=f"after step {stops};"):
            train(job, context)


def test_every_sample_of_every_epoch_is_seen_once(
    make_job: Callable[[Path], TrainJob], digits: PreparedData, tmp_path: Path
) -> None:
    """64 images in batches of 20: three workers take 7, 7 and 6. The last batch has 4, too few to pause before it."""
    job = make_job(tmp_path / "run")
    training = job.training.model_copy(update={"epochs": 4, "batch_size": 20})
    job = job.model_copy(update={"training": training})
    (tmp_path / "seen").mkdir()
    for world_size, ask, stops in ((3, 6, 6), (2, 11, 12), (5, 13, 13), (1, None, None)):
        run_ranks(world_size, train_until, tmp_path / "seen", job, ask, stops)
    with open_split(digits, "train", batch_size=64) as every:
        expected = sorted(hashes(next(iter(every))[0]))
    assert len(set(expected)) == 64
    for epoch in range(4):
        seen = [line for path in (tmp_path / "seen").glob(f"{epoch}-*.txt") for line in path.read_text().split()]
        assert sorted(seen) == expected, f"epoch {epoch}"
