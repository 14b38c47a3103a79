"""The cost model of `pipeline.plan.scale` against what is measured here with one and two workers.

    python benchmarks/scaling.py [--epochs 3] [--images 768] [--width 16] [--json FILE]

Workers are processes of one thread each over gloo, bound to a core of their own; the training is ResNet-8 on random
CIFAR-sized images by PGD-3. Measured first, for the model's inputs:
  alone      images per second of one worker, the other core idle
  beside     the same with an independent training on the other core: what memory and clock take away
  alpha, beta  from all-reduces of 4 bytes and of the network's gradients between two workers
Then two workers train together, and the model's images per second stand beside theirs.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.config.data import DataConfig
from pipeline.config.model import ModelConfig
from pipeline.config.training import AttackConfig, OptimizerConfig, PGDATConfig, SelectionConfig, TrainingConfig
from pipeline.data import prepare
from pipeline.plan.scale import Link, Machine, Training, scale
from pipeline.tracking.journal import read_history
from pipeline.training import Context, TrainJob, train
from sparta_models import build_model

BATCH = 64
SMALL, ROUNDS = 4, 30


def bind(rank: int) -> None:
    """One thread on one core."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)


def work(rank: int, world_size: int, directory: str, jobs: list[str], gradient_bytes: int) -> None:
    """Train jobs[rank] alone (len(jobs) > 1), or jobs[0] together; two together also time the all-reduce first."""
    bind(rank)
    warnings.simplefilter("ignore")
    together = len(jobs) == 1 and world_size > 1
    if together:
        dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world_size)
        timed = {size: all_reduce_seconds(size) for size in (SMALL, gradient_bytes)}
        if rank == 0:
            Path(directory, "all_reduce.json").write_text(json.dumps(timed))
    job = TrainJob.model_validate_json(jobs[0] if len(jobs) == 1 else jobs[rank])
    train(job, Context.from_process_group() if together else Context())
    if together:
        dist.destroy_process_group()


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


def images_per_second(job: TrainJob) -> float:
    """Of all workers, median over the epochs after the first."""
    values = [value for _, value in read_history(job.output / "metrics.jsonl")["images_per_second"]]
    return statistics.median(values[1:] or values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=768)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        measured = measure(Path(place), options)
    report(measured)
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1))


def measure(place: Path, options: argparse.Namespace) -> dict[str, float]:
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", options.images * 10 // 9 + 1), ("test", 40)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 10
    np.savez(place / "random.npz", **arrays)
    config = DataConfig(dataset="npz", path=str(place / "random.npz"), loader="memory", limit={"train": options.images})
    data = prepare(config, place / "data", seed=0)

    def job(name: str, batch: int) -> TrainJob:
        training = TrainingConfig(
            epochs=options.epochs,
            batch_size=batch,
            method=PGDATConfig(attack=AttackConfig(steps=3)),
            optimizer=OptimizerConfig(lr=0.01),
            selection=SelectionConfig(attack=AttackConfig(steps=1), every=options.epochs, max_samples=16),
            precision="fp32",
        )
        model = ModelConfig(name="resnet8", options={"width": options.width})
        return TrainJob(model=model, data=data.directory, training=training, output=place / name)

    gradient_bytes = 4 * sum(p.numel() for p in build_model("resnet8", width=options.width).parameters())
    alone, first, second = job("alone", BATCH), job("first", BATCH), job("second", BATCH)
    together = job("together", 2 * BATCH)
    for workers, jobs in ((1, [alone]), (2, [first, second]), (2, [together])):
        arguments = (workers, str(place), [one.model_dump_json() for one in jobs], gradient_bytes)
        mp.spawn(work, arguments, nprocs=workers)
    small, large = json.loads((place / "all_reduce.json").read_text()).values()
    return {
        "images": data.splits["train"].count,
        "gradient_bytes": gradient_bytes,
        "alone": images_per_second(alone),
        "beside": (images_per_second(first) + images_per_second(second)) / 2,
        "all_reduce_small_s": small,
        "all_reduce_large_s": large,
        "together": images_per_second(together),
    }


def report(measured: dict[str, float]) -> None:
    alpha = measured["all_reduce_small_s"] / 2
    beta = measured["gradient_bytes"] / max(1e-9, measured["all_reduce_large_s"] - measured["all_reduce_small_s"])
    print(f"one worker alone {measured['alone']:.0f} img/s, beside another {measured['beside']:.0f} img/s")
    print(
        f"alpha {1e6 * alpha:.0f} us, beta {beta / 1e9:.2f} GB/s; gradients {measured['gradient_bytes'] / 1e6:.2f} MB"
    )
    training = Training(
        epochs=1, images=int(measured["images"]), forward_equivalents=9, validation_passes=0,
        gradient_bytes=measured["gradient_bytes"], checkpoint_bytes=0, checkpoints_per_epoch=0,
        steps_per_checkpoint=None,
    )  # fmt: skip
    print("\n| model's input | predicted img/s, 2 workers | measured | measured / predicted |\n|---|---:|---:|---:|")
    for name in ("alone", "beside"):
        link = Link(alpha, beta)
        machine = Machine(measured[name], 1e9, 2, link, link, 1e9)
        row = scale(training, machine, 2, BATCH)
        predicted = row.batch / (row.compute + row.all_reduce)
        ratio = measured["together"] / predicted
        print(f"| one worker {name} | {predicted:.0f} | {measured['together']:.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
