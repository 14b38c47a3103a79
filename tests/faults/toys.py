"""Trainings in processes of their own, which may be killed, starved and lied to."""

import json
import logging
import multiprocessing
import time
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from pipeline.tracking.journal import read_journal
from pipeline.training import TrainJob
from pipeline.training.files import read_directory

# Its children are forked from a process that has imported everything (an optimizer imports dynamo) and has no threads.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["tests.faults.toys", "pipeline.training.loop", "torch._dynamo"])
_FIGURES = ("epoch", "train_loss", "lr", "val_clean", "val_robust")


class Result(NamedTuple):
    """What has to be the same, whatever happened on the way."""

    weights: str
    history: list[dict[str, object]]
    metrics: list[tuple[int, str, float]]
    state: dict[str, bytes]
    """Network, optimizer and average of the last checkpoint."""


def start(job: TrainJob, *, pause: float = 0.0, clock: float = 0.0) -> BaseProcess:
    """Train in a process of its own, which waits `pause` seconds after every step and whose clock is off by `clock`."""
    process = _PROCESSES.Process(target=_train, args=(job.model_dump_json(), pause, clock))
    process.start()
    return process


def _train(job_json: str, pause: float, clock: float) -> None:
    import torch

    from pipeline.training import Context, loop, train

    job = TrainJob.model_validate_json(job_json)
    logging.basicConfig(filename=log_of(job), level=logging.WARNING, force=True)
    torch.set_num_threads(1)
    step, now, now_ns = loop.train_step, time.time, time.time_ns

    def slow_step(*arguments: object) -> bool:
        time.sleep(pause)
        return step(*arguments)  # type: ignore[arg-type]

    loop.train_step = slow_step
    time.time, time.time_ns = lambda: now() + clock, lambda: now_ns() + int(clock * 1e9)
    try:
        train(job, Context())
    except OSError:
        logging.exception("the training ended")
        raise SystemExit(1) from None


def log_of(job: TrainJob) -> Path:
    """What the process had to say."""
    return job.output.parent.parent / f"{job.output.parent.name}-{job.output.name}.log"


def steps_done(job: TrainJob) -> int:
    """The step of the newest checkpoint; 0 while there is none."""
    steps = [0]
    for record in (job.output / "checkpoints").glob("[ab]/state.json"):
        try:
            steps.append(json.loads(record.read_text())["progress"]["step"])
        except (OSError, ValueError):  # is being replaced
            continue
    return max(steps)


def wait_for_step(job: TrainJob, process: BaseProcess, step: int) -> None:
    """Wait until a checkpoint of this step, or a later one, is written."""
    deadline = time.monotonic() + 120
    while steps_done(job) < step:
        assert process.is_alive(), log_of(job).read_text() if log_of(job).exists() else "ended early"
        assert time.monotonic() < deadline, f"no step {step}"
        time.sleep(0.005)


def kill_at(job: TrainJob, step: int, *, clock: float = 0.0) -> None:
    """Train until a step is checkpointed, then end the process as the kernel would."""
    process = start(job, pause=0.03, clock=clock)
    wait_for_step(job, process, step)
    process.kill()
    process.join()
    assert process.exitcode == -9


def newest(job: TrainJob) -> Path:
    """The newest checkpoint."""
    slots = [slot for slot in (job.output / "checkpoints").glob("[ab]") if (slot / "state.json").exists()]
    return max(slots, key=lambda slot: json.loads((slot / "state.json").read_text())["progress"]["step"])


def finish(job: TrainJob, process: BaseProcess) -> Result:
    """Wait for the end of a training and collect what came out."""
    process.join(120)
    assert process.exitcode == 0, log_of(job).read_text()
    record = json.loads((job.output / "trained.json").read_text())
    groups, _ = read_directory(newest(job), record="state.json")
    state = {f"{g}/{n}": t.numpy().tobytes() for g, tensors in groups.items() for n, t in tensors.items()}
    return Result(record["weights_sha256"], record["history"], figures(job.output), state)


def figures(output: Path) -> list[tuple[int, str, float]]:
    """What the journal of a training says besides times: (step, name, value), each once, no time before another's."""
    entries = read_journal(output / "metrics.jsonl")[0]
    assert [entry.time for entry in entries] == sorted(entry.time for entry in entries)
    metrics = [(e.step, key, value) for e in entries for key, value in e.metrics.items() if key in _FIGURES]
    assert len({point[:2] for point in metrics}) == len(metrics), "a metric was logged twice"
    return metrics


def run_ranks(world_size: int, function: Callable[..., object], directory: Path, *arguments: object) -> None:
    """Call function(context, directory, *arguments) on gloo ranks in processes of their own; all have to return."""
    (directory / "rendezvous").unlink(missing_ok=True)
    ranks = [
        _PROCESSES.Process(target=_rank, args=(rank, world_size, function, directory, arguments), daemon=True)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0] * world_size


def _rank(rank: int, world_size: int, function: Callable[..., object], directory: Path, arguments: tuple) -> None:
    import torch
    import torch.distributed as dist

    from pipeline.training import Context

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world_size)
    try:
        function(Context.from_process_group(torch.device("cpu")), directory, *arguments)
    finally:
        dist.destroy_process_group()


def run_apart(function: Callable[..., object], *arguments: object, log: Path) -> tuple[int, str]:
    """Call a function in a process of its own; its exit code (below 0: the signal that ended it) and its last words."""
    log.unlink(missing_ok=True)
    process = _PROCESSES.Process(target=_call, args=(function, arguments, str(log)), daemon=True)
    process.start()
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode, log.read_text() if log.exists() else ""


def _call(function: Callable[..., object], arguments: tuple[object, ...], log: str) -> None:
    warnings.simplefilter("ignore")
    try:
        function(*arguments)
    except (OSError, ValueError) as error:
        Path(log).write_text(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None
