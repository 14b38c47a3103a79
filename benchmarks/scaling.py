"""The cost model of `pipeline.plan.scale` against what is measured here with one and two workers.

    python benchmarks/scaling.py [--epochs 4] [--images 2560] [--width 16] [--json FILE]

Workers are processes of one thread each over gloo, bound to a core of their own; the training is ResNet-8 by PGD-3 on
CIFAR-sized images that are easy to tell apart, so that validation attacks them all, as the model takes for granted.

The model's inputs, each measured by itself:
  alone        training images per second of one worker, the other core idle
  beside       the same with an independent training on the other core: what memory and clock take away
  alpha, beta  from all-reduces of 4 bytes and of the network's gradients between two workers
  loader       images per second that one worker's loader delivers when nobody computes, the other core idle
  disk         bytes per second of a file of a checkpoint's size, written and forced to disk; likewise of ResNet-50's
The rest (passes of a step and of a validation, bytes of a checkpoint) is what the model makes of the configuration.
Then one worker trains, and two together; every part of their epochs stands beside the model's, medians without the
first epoch. "epoch" is the wall time; what is in it besides the parts (the selected network's file, the journal) the
model does not have. Last, a checkpoint of ResNet-50's size, since that of ResNet-8 is too small to say much.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import pipeline.training.epoch
import pipeline.training.loop
from pipeline.config.chain import ChainConfig
from pipeline.data import PreparedData, open_split, prepare
from pipeline.plan.scale import Link, Machine, Scaled, Training, scale, training_of
from pipeline.tracking.journal import read_history
from pipeline.training import Context, TrainJob, train
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.progress import Progress
from pipeline.training.run import Run

BATCH = 64
SMALL, ROUNDS = 4, 30
LARGE = 205 * 10**6  # bytes of a checkpoint of ResNet-50: 25.6 million parameters with their momenta
PARTS = ("steps", "validation", "checkpoints", "epoch")
Measured = dict[str, Any]


def bind(rank: int) -> None:
    """One thread on one core."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)


class Clock:
    """Seconds of every call of the parts of a training, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[name].append(time.perf_counter() - begin)
            return result

        return call

    def watch_training(self) -> None:
        """Of this process, from here on."""
        loop, epoch = pipeline.training.loop, pipeline.training.epoch
        loop.train_epoch = self.timed("steps", loop.train_epoch)
        loop.end_epoch = self.timed("end", loop.end_epoch)
        epoch.validate = self.timed("validation", epoch.validate)
        Run.save = self.timed("checkpoints", Run.save)  # type: ignore[method-assign]

    def medians(self) -> dict[str, float]:
        """Of an epoch, the first one left out."""
        whole = [steps + end for steps, end in zip(self.seconds["steps"], self.seconds["end"], strict=True)]
        parts = {**self.seconds, "epoch": whole}
        return {name: statistics.median(parts[name][1:]) for name in PARTS}


def work(rank: int, world_size: int, directory: str, jobs: list[str], gradient_bytes: int) -> None:
    """Train jobs[rank] alone (len(jobs) > 1), or jobs[0] together; two together also time the all-reduce first."""
    bind(rank)
    warnings.simplefilter("ignore")
    together = len(jobs) == 1 and world_size > 1
    job = TrainJob.model_validate_json(jobs[0] if len(jobs) == 1 else jobs[rank])
    if together:
        dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world_size)
        timed = {size: all_reduce_seconds(size) for size in (SMALL, gradient_bytes)}
        if rank == 0:
            Path(directory, "all_reduce.json").write_text(json.dumps(timed))
    context = Context.from_process_group() if together else Context()
    delivered = loader_rate(job, context)
    clock = Clock()
    clock.watch_training()
    train(job, context)
    if together:
        dist.destroy_process_group()
    if rank == 0 or not together:
        (job.output / "measured.json").write_text(json.dumps({**clock.medians(), "loader": delivered}))


def all_reduce_seconds(num_bytes: int) -> float:
    """Median time of a sum over all workers."""
    tensor = torch.ones(max(1, num_bytes // 4))
    times = []
    for _ in range(ROUNDS):
        dist.barrier()
        begin = time.perf_counter()
        dist.all_reduce(tensor)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def loader_rate(job: TrainJob, context: Context) -> float:
    """Images per second of this worker's loader while nobody computes: the second of two epochs."""
    share = {"rank": context.rank, "world_size": context.world_size, "batch_size": job.training.batch_size}
    data = PreparedData.load(job.data)
    with open_split(data, "train", joint=True, shuffle=True, augment=job.augment, **share) as loader:
        for epoch in range(2):
            loader.set_epoch(epoch)
            begin = time.perf_counter()
            images = sum(len(y) for _, y in loader)
    return images / (time.perf_counter() - begin)


def disk_rate(place: Path, num_bytes: int, *, rounds: int = ROUNDS) -> float:
    """Bytes per second of a file of that size, forced to disk."""
    content, times = os.urandom(num_bytes), []
    for number in range(rounds):
        begin = time.perf_counter()
        with (place / f"probe-{number}").open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        times.append(time.perf_counter() - begin)
        (place / f"probe-{number}").unlink()
    return num_bytes / statistics.median(times)


def checkpoint_seconds(place: Path, num_bytes: int) -> float:
    """A checkpoint of so many bytes, model and momenta half each, in tensors of 1 MiB."""
    tensors = {f"t{number}": torch.randn(2**18) for number in range(num_bytes // 2**21)}
    checkpoints, times = Checkpoints(place / "large", "f"), []
    for step in range(1, 6):
        begin = time.perf_counter()
        checkpoints.save({"model": tensors, "optimizer": tensors}, Progress(step=step))
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def images_per_second(job: TrainJob) -> float:
    """Of all workers' steps, median over the epochs after the first."""
    values = [value for _, value in read_history(job.output / "metrics.jsonl")["images_per_second"]]
    return statistics.median(values[1:])


def make_images(path: Path, count: int) -> None:
    """Ten classes, each an image of its own under noise."""
    rng = np.random.default_rng(0)
    classes = rng.integers(40, 216, (10, 32, 32, 3))
    arrays = {}
    for split, number in (("train", count * 10 // 9 + 1), ("test", 40)):
        labels = np.arange(number) % 10
        images = classes[labels] + rng.normal(0, 10, (number, 32, 32, 3))
        arrays |= {f"{split}_images": images.clip(0, 255).astype(np.uint8), f"{split}_labels": labels}
    np.savez(path, **arrays)


def configured(place: Path, options: argparse.Namespace, batch: int) -> ChainConfig:
    return ChainConfig.model_validate(
        {
            "data": {
                "dataset": "npz",
                "path": str(place / "images.npz"),
                "loader": "memory",
                "limit": {"train": options.images},
            },
            "model": {"name": "resnet8", "options": {"width": options.width}},
            "training": {
                "epochs": options.epochs,
                "batch_size": batch,
                "method": {"kind": "pgd_at", "attack": {"steps": 3}},
                "selection": {"attack": {"steps": 10}},
                "precision": "fp32",
            },
        }
    )


def measure(place: Path, options: argparse.Namespace) -> Measured:
    make_images(place / "images.npz", options.images)
    model = training_of(configured(place, options, BATCH))
    data = prepare(configured(place, options, BATCH).data, place / "data", seed=0)

    def job(name: str, batch: int) -> TrainJob:
        config = configured(place, options, batch)
        return TrainJob(model=config.model, data=data.directory, training=config.training, output=place / name)

    alone, first, second = job("alone", BATCH), job("first", BATCH), job("second", BATCH)
    together = job("together", 2 * BATCH)
    for workers, jobs in ((1, [alone]), (2, [first, second]), (2, [together])):
        arguments = (workers, str(place), [one.model_dump_json() for one in jobs], int(model.gradient_bytes))
        mp.spawn(work, arguments, nprocs=workers)
    small, large = json.loads((place / "all_reduce.json").read_text()).values()
    measured = {one.output.name: json.loads((one.output / "measured.json").read_text()) for one in (alone, together)}
    newest = max((together.output / "checkpoints").glob("?"), key=lambda slot: slot.stat().st_mtime)
    return {
        "epochs": options.epochs,
        "images": data.splits["train"].count,
        "val": data.splits["val"].count,
        "speed": {
            "alone": images_per_second(alone),
            "beside": (images_per_second(first) + images_per_second(second)) / 2,
            "together": images_per_second(together),
        },
        "alpha": small / 2,
        "beta": model.gradient_bytes / max(1e-9, large - small),
        "disk": disk_rate(place, int(model.checkpoint_bytes)),
        "checkpoint_bytes": sum(file.stat().st_size for file in newest.iterdir()),
        "large": {"disk": disk_rate(place, LARGE, rounds=5), "seconds": checkpoint_seconds(place, LARGE)},
        "measured": measured,
    }


def report(measured: Measured, model: Training) -> None:
    speed, link = measured["speed"], Link(measured["alpha"], measured["beta"])
    print(
        f"{measured['images']} training images, {measured['val']} for validation, {BATCH} per worker and step; "
        f"a step is {model.forward_equivalents:g} forward passes, a validation {model.validation_passes:g}\n"
        f"one worker alone {speed['alone']:.0f} img/s, beside another {speed['beside']:.0f} img/s; "
        f"alpha {1e6 * link.alpha:.0f} us, beta {link.beta / 1e9:.2f} GB/s, disk {measured['disk'] / 1e6:.0f} MB/s\n"
        f"gradients {model.gradient_bytes / 1e6:.2f} MB; a checkpoint {model.checkpoint_bytes / 1e6:.2f} MB by the "
        f"model, {measured['checkpoint_bytes'] / 1e6:.2f} MB on disk\n"
    )
    loader = measured["measured"]["alone"]["loader"]
    cases = [("alone", 1, "alone"), ("together", 2, "alone"), ("together", 2, "beside")]
    print("| workers | speed of one | | predicted | measured | measured / predicted |\n|---:|---|---|---:|---:|---:|")
    for name, workers, basis in cases:
        machine = Machine(speed[basis], loader, 2, link, link, measured["disk"])
        predicted = parts(scale(model, machine, workers, BATCH), model, machine)
        found = {**measured["measured"][name], "images/s": speed[name]}
        for part, (value, digits) in predicted.items():
            key = part.partition(",")[0]
            if workers == 1 and key in ("images/s", "loader"):
                continue  # one worker's are the model's inputs
            line = f"{value:,.{digits}f} | {found[key]:,.{digits}f} | {found[key] / value:.2f}"
            print(f"| {workers} | {basis} | {part} | {line} |")
    large = measured["large"]
    value = LARGE / large["disk"]
    line = f"{value:.2f} | {large['seconds']:.2f} | {large['seconds'] / value:.2f}"
    print(f"| 1 | | checkpoint of {LARGE / 1e6:.0f} MB at {large['disk'] / 1e6:.0f} MB/s, s | {line} |")


def parts(row: Scaled, model: Training, machine: Machine) -> dict[str, tuple[float, int]]:
    """What the model says of an epoch, with the digits to show."""
    steps = row.steps * max(row.compute + row.all_reduce, row.loader)
    return {
        "images/s, of the steps": (row.batch / (row.compute + row.all_reduce), 0),
        "loader, img/s of a worker": (machine.decoded_per_second, 0),
        "steps, s": (steps, 2),
        "validation, s": (row.validation, 2),
        "checkpoints, s": (row.checkpoints, 4),
        "epoch, s": (row.hours * 3600 / model.epochs, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=2560)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        measured = measure(place, options)
        model = training_of(configured(place, options, BATCH))
    report(measured, model)
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
